"""What a peer can say: commands with fields, however they came, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from llambo.mesh.client.request_options import Options
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.sampling_options import Sampling

#: Each command, and the field that a plain line fills: `LOAD x` is `LOAD {"model": "x"}`.
COMMANDS = {
    "PING": "",
    "STATUS": "",
    "LOAD": "model",
    "INFER": "prompt",
    "INFER_STREAM": "prompt",
    "FREE": "",
    "BINARY": "",
    "QUIT": "",
}
#: These go to the sampler as they are.
SAMPLING = frozenset(Sampling.__struct_fields__)
#: And these are the request's own. How the answer comes back follows from the command.
OPTIONS = (Options.__optional_keys__ - {"sampling", "stream", "logprobs"}) | SAMPLING
#: What is nested deeper has no meaning in any command.
DEPTH = 16
TAG_CHARS = 128
TAG_LIMIT = 2**53

Tag = str | int | None


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    fields: dict[str, Any]
    tag: Tag = None


@dataclass(frozen=True, slots=True)
class Mistake:
    """It cannot be carried out. `fatal`: nor can anything be understood that follows."""

    text: str
    hint: str = "mend what is named and send it again"
    tag: Tag = None
    fatal: bool = False
    #: Whoever reads a stream waits for its last line, also when it never began.
    streamed: bool = False
    code: Code = Code.BAD_REQUEST


def command_of(name: str, fields: dict[Any, Any]) -> Command | Mistake:
    """The command, if its fields are what they should be. What the mesh is asked is checked once more, as a request."""
    name = name.upper()
    if name not in COMMANDS:
        return Mistake(f"no command is called {_short(name)}", f"the commands are {', '.join(COMMANDS)}")
    given = {key: value for key, value in fields.items() if value is not None}
    tag = given.pop("tag", None)
    streamed = name == "INFER_STREAM"
    if not _is_tag(tag):
        return Mistake(f"a tag is a whole number, or text of at most {TAG_CHARS} characters", streamed=streamed)
    wrong = "that is nested too deeply" if too_deep(given) else _WRONG.get(name, _no_fields)(name, given)
    if not wrong and "messages" in given:
        wrong = _messages_as_prompt(given)
    return Mistake(wrong, tag=tag, streamed=streamed) if wrong else Command(name, given, tag)


def request_of(command: Command, model: str) -> tuple[str, Options]:
    """What the mesh is asked. Without a word about it: with the model's chat template, as `llambo send` does."""
    rest = {"form": "user", **({"model": model} if model else {}), **command.fields}
    prompt = rest.pop("prompt")
    sampling = {key: rest.pop(key) for key in (SAMPLING & rest.keys()) - Options.__optional_keys__}
    if isinstance(bias := sampling.get("logit_bias"), dict):
        # JSON has no keys but text.
        sampling["logit_bias"] = {int(key) if _is_number(key) else key: value for key, value in bias.items()}
    return prompt, {**rest, "sampling": sampling}  # type: ignore[typeddict-item]  # `build_request` checks every value


def _messages_as_prompt(given: dict[Any, Any]) -> str:
    try:
        given["prompt"], given["form"] = msgspec.json.encode(given.pop("messages")).decode(), "messages"
    except (msgspec.MsgspecError, UnicodeError, TypeError, OverflowError, ValueError) as error:
        return f"the messages cannot be said in JSON: {error}"
    return ""


def _infer(name: str, given: dict[Any, Any]) -> str:
    if ("prompt" in given) == ("messages" in given):
        return f"{name} wants a prompt, or messages" if "prompt" not in given else "a prompt, or messages, not both"
    if "prompt" in given and not (isinstance(given["prompt"], str) and given["prompt"]):
        return "the prompt is empty" if given["prompt"] == "" else "the prompt is no text"
    if "messages" in given and not (isinstance(given["messages"], list) and given["messages"]):
        return "messages are a list of at least one"
    if "messages" in given and "form" in given:
        return "messages have a form of their own"
    return _unknown(name, given, OPTIONS | {"prompt", "messages"})


def _load(name: str, given: dict[Any, Any]) -> str:
    model = given.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= limits.NAME_CHARS:
        return "LOAD wants the name of a model"
    return _unknown(name, given, frozenset({"model"}))


def _no_fields(name: str, given: dict[Any, Any]) -> str:
    return _unknown(name, given, frozenset())


def _unknown(name: str, given: dict[Any, Any], known: frozenset[str]) -> str:
    unknown = sorted(map(_short, given.keys() - known))
    return f"{name} knows no {unknown[0]}" if unknown else ""


_WRONG = {"INFER": _infer, "INFER_STREAM": _infer, "LOAD": _load}


def _is_tag(tag: Any) -> bool:
    if isinstance(tag, str):
        return 0 < len(tag) <= TAG_CHARS and is_text(tag)
    return tag is None or (isinstance(tag, int) and not isinstance(tag, bool) and -TAG_LIMIT <= tag <= TAG_LIMIT)


def _is_number(key: Any) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 16


def is_text(text: str) -> bool:
    """Whether it can be said in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH + 1):
        inner: list[Any] = []
        for one in level:
            inner += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        if not inner:
            return False
        level = inner
    return True


def _short(word: Any) -> str:
    shown = repr(word)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
