"""What goes over a connection of the bridge: commands in, replies out, as lines of JSON or as msgpack objects.

This file does no I/O. A parser takes bytes as they come and gives a `Command` or a `Mistake` at a time. No input is
trusted: a line has a limit, and an object has limits on its bytes, its parts and its depth. A reply is a dict with
`status`; the last object of a stream is one too. The format is described in docs/bridge.md.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import msgspec

from llambo.mesh.client.request_options import Options
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import TRAITS, Code, ErrorInfo, printable
from llambo.mesh.wire.messages import Sampling

#: Each command, and the field that a plain line fills: `LOAD x` is `LOAD {"model": "x"}`.
COMMANDS = {
    "PING": "",
    "STATUS": "",
    "LOAD": "model",
    "INFER": "prompt",
    "INFER_STREAM": "prompt",
    "FREE": "model",
    "BINARY": "",
    "QUIT": "",
}
#: Fields that are passed to the sampler.
SAMPLING = frozenset(Sampling.__struct_fields__)
#: Options of a request. How the answer is returned follows from the command.
OPTIONS = (Options.__optional_keys__ - {"sampling", "stream", "logprobs", "tools"}) | SAMPLING
#: No command has a use for deeper nesting.
DEPTH = 16
TAG_CHARS = 128
TAG_LIMIT = 2**53
#: The unpacker copies what it is fed, so it is fed in slices: a hostile length must not make it copy everything.
SLICE_BYTES = 64 * 1024
#: Parts of one list, and pairs of one map: the unpacker allocates them before they arrive.
LIST_PARTS, MAP_PAIRS = 4_096, 2_048

Tag = str | int | None
Reply = dict[str, object]
Encode = Callable[[Reply], bytes]


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    fields: dict[str, Any]
    tag: Tag = None

    @property
    def streamed(self) -> bool:
        return self.name == "INFER_STREAM"


@dataclass(frozen=True, slots=True)
class Mistake:
    """Input that is not a command. `fatal`: the bytes after it cannot be understood either."""

    text: str
    hint: str = "correct it and send it again"
    tag: Tag = None
    fatal: bool = False
    #: The reader of a stream waits for an object with `final`, so a refused stream needs one as well.
    streamed: bool = False
    code: Code = Code.BAD_REQUEST


# --- commands --------------------------------------------------------------------------------------------------


def command_of(name: str, fields: dict[Any, Any]) -> Command | Mistake:
    """Check the fields a command has here. `build_request` of the client checks the values of options again."""
    name = name.upper()
    if name not in COMMANDS:
        return Mistake(f"no command is called {_short(name)}", f"the commands are {', '.join(COMMANDS)}")
    given = {key: value for key, value in fields.items() if value is not None}
    tag = given.pop("tag", None)
    streamed = name == "INFER_STREAM"
    if not _is_tag(tag):
        return Mistake(f"a tag is a whole number, or text of at most {TAG_CHARS} characters", streamed=streamed)
    wrong = "that is nested too deeply" if _is_too_deep(given) else _CHECKS.get(name, _check_unknown)(name, given)
    if not wrong and "messages" in given:
        wrong = _put_messages_into_prompt(given)
    return Mistake(wrong, tag=tag, streamed=streamed) if wrong else Command(name, given, tag)


def request_of(command: Command, model: str) -> tuple[str, Options]:
    """Prompt and options for the client. The default form is the model's chat template, as in `llambo send`."""
    rest = {"form": "user", **({"model": model} if model else {}), **command.fields}
    prompt = rest.pop("prompt")
    sampling = {key: rest.pop(key) for key in (SAMPLING & rest.keys()) - Options.__optional_keys__}
    if isinstance(bias := sampling.get("logit_bias"), dict):
        # Keys of a JSON object are always text.
        sampling["logit_bias"] = {int(key) if _is_number(key) else key: value for key, value in bias.items()}
    return prompt, {**rest, "sampling": sampling}  # type: ignore[typeddict-item]  # `build_request` checks every value


def _check_infer(name: str, given: dict[Any, Any]) -> str:
    if ("prompt" in given) == ("messages" in given):
        return "prompt and messages exclude each other" if "prompt" in given else f"{name} needs a prompt, or messages"
    if "prompt" in given and not (isinstance(given["prompt"], str) and given["prompt"]):
        return "the prompt is empty" if given["prompt"] == "" else "the prompt is not text"
    if "messages" in given and not (isinstance(given["messages"], list) and given["messages"]):
        return "messages must be a list of at least one"
    if "messages" in given and "form" in given:
        return "with messages there is no form"
    return _check_unknown(name, given, OPTIONS | {"prompt", "messages"})


def _check_load(name: str, given: dict[Any, Any]) -> str:
    model = given.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= limits.NAME_CHARS:
        return f"{name} needs the name of a model"
    return _check_unknown(name, given, frozenset({"model"}))


def _check_free(name: str, given: dict[Any, Any]) -> str:
    return _check_load(name, given) if "model" in given else _check_unknown(name, given)


def _check_unknown(name: str, given: dict[Any, Any], known: frozenset[str] = frozenset()) -> str:
    unknown = sorted(map(_short, given.keys() - known))
    return f"{name} has no field {unknown[0]}" if unknown else ""


_CHECKS = {"INFER": _check_infer, "INFER_STREAM": _check_infer, "LOAD": _check_load, "FREE": _check_free}


def _put_messages_into_prompt(given: dict[Any, Any]) -> str:
    try:
        given["prompt"], given["form"] = msgspec.json.encode(given.pop("messages")).decode(), "messages"
    except (msgspec.MsgspecError, UnicodeError, TypeError, OverflowError, ValueError) as error:
        return f"the messages cannot be written as JSON: {error}"
    return ""


def _is_tag(tag: object) -> bool:
    if isinstance(tag, str):
        return 0 < len(tag) <= TAG_CHARS and _is_utf8(tag)
    return tag is None or (isinstance(tag, int) and not isinstance(tag, bool) and -TAG_LIMIT <= tag <= TAG_LIMIT)


def _is_utf8(text: str) -> bool:
    """False for lone surrogates, which msgpack lets through."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_number(key: object) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 16


def _is_too_deep(value: object) -> bool:
    level = [value]
    for _ in range(DEPTH + 1):
        inner: list[object] = []
        for one in level:
            inner += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        if not inner:
            return False
        level = inner
    return True


def _short(word: object) -> str:
    shown = repr(word)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


# --- parsers ---------------------------------------------------------------------------------------------------

Parsed = Command | Mistake


class LineParser:
    """One command a line. A CR before the LF is ignored, and so are empty lines.

    `next`: None if the bytes so far hold no further whole command; `end`: no more bytes come, and what the last,
    unfinished piece is.
    """

    def __init__(self, line_bytes: int) -> None:
        self._limit = line_bytes
        self._buffer = bytearray()
        self._searched = 0
        #: A line that was too long has been refused, and the rest of it is thrown away.
        self._skipping = False

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> Parsed | None:
        while (end := self._buffer.find(b"\n", self._searched)) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._searched = 0
            skipped, self._skipping = self._skipping, False
            if skipped:
                continue
            if len(line) > self._limit:
                return self._too_long()
            if (parsed := _parse_line(line)) is not None:
                return parsed
        self._searched = len(self._buffer)
        if not self._skipping and len(self._buffer) <= self._limit:
            return None
        self.rest()
        skipped, self._skipping = self._skipping, True
        return None if skipped else self._too_long()

    def end(self) -> Parsed | None:
        line = self.rest()
        return None if self._skipping else _parse_line(line)

    def rest(self) -> bytes:
        """Take out the bytes that were not parsed."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        self._searched = 0
        return rest

    def _too_long(self) -> Mistake:
        return Mistake(f"the line is longer than {self._limit} bytes", "shorten it; `--line-bytes` is the limit")


_WORDS = re.compile(r"[ \t]*([^ \t]+)(?:[ \t](.*))?", re.DOTALL)
#: The first line of a request over HTTP. Any web page can make a browser send one, with commands in the lines after it.
_HTTP = re.compile(r"[A-Z]+ \S+ HTTP/[0-9.]+", re.IGNORECASE)


def _parse_line(line: bytes) -> Parsed | None:
    try:
        text = line.removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        return Mistake(f"the line is not UTF-8: byte {error.start + 1} is wrong")
    if "\0" in text:
        return Mistake("there is a NUL in the line")
    words = _WORDS.fullmatch(text)
    if words is None:
        return None
    name, rest = words[1].upper(), words[2] or ""
    if name not in COMMANDS and _HTTP.fullmatch(text.strip()):
        return Mistake("this is no web server", "`llambo gateway` is one", fatal=True)
    if rest.lstrip().startswith("{"):
        return _parse_json(name, rest)
    field = COMMANDS.get(name, "")
    if rest.strip() and name in COMMANDS and not field:
        return Mistake(f"{name} takes no argument")
    if field == "model":
        rest = rest.strip()
    return command_of(name, {field: rest} if field and rest else {})


def _parse_json(name: str, rest: str) -> Parsed:
    try:
        fields = msgspec.json.decode(rest, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        hint = 'an argument that begins with { is read as JSON; write such a prompt as {"prompt": ...}'
        return Mistake(f"that is not JSON: {error}", hint, streamed=name == "INFER_STREAM")
    return command_of(name, fields)


class ObjectParser:
    """One command a msgpack map, with its name under `command`. Bytes that are not msgpack end the connection."""

    def __init__(self, object_bytes: int) -> None:
        self._limit = object_bytes
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=object_bytes + 2 * SLICE_BYTES,
            max_array_len=LIST_PARTS,
            max_map_len=MAP_PAIRS,
            max_ext_len=0,
            strict_map_key=False,
            unicode_errors="surrogateescape",
        )
        self._slices: deque[bytes] = deque()
        self._fed_bytes = 0
        #: Where the last whole object ended.
        self._parsed_bytes = 0

    def feed(self, data: bytes) -> None:
        self._slices.extend(data[at : at + SLICE_BYTES] for at in range(0, len(data), SLICE_BYTES))

    def next(self) -> Parsed | None:
        while True:
            try:
                value = self._unpacker.unpack()
            except msgpack.OutOfData:
                if self._fed_bytes - self._parsed_bytes > self._limit:
                    return self._too_long()
                if not self._slices:
                    return None
                data = self._slices.popleft()
                self._unpacker.feed(data)
                self._fed_bytes += len(data)
            except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
                return Mistake(f"that is not valid msgpack here: {str(error) or type(error).__name__}",
                               "connect again; what follows cannot be understood", fatal=True)  # fmt: skip
            else:
                size, self._parsed_bytes = self._unpacker.tell() - self._parsed_bytes, self._unpacker.tell()
                return _parse_object(value) if size <= self._limit else self._too_long()

    def end(self) -> Parsed | None:
        return Mistake("the last object is incomplete", fatal=True) if self._fed_bytes > self._parsed_bytes else None

    def _too_long(self) -> Mistake:
        return Mistake(f"the object is longer than {self._limit} bytes", "connect again, and shorten it; "
                       "`--line-bytes` is the limit", fatal=True)  # fmt: skip


def _parse_object(value: object) -> Parsed:
    if not isinstance(value, dict) or not isinstance(value.get("command"), str):
        return Mistake("a command is a map with the command's name under `command`")
    fields = {key: item for key, item in value.items() if key != "command"}
    if isinstance(fields.get("prompt"), bytes):
        fields["prompt"] = fields["prompt"].decode(errors="surrogateescape")
    return command_of(value["command"], fields)


Parser = LineParser | ObjectParser


# --- replies ---------------------------------------------------------------------------------------------------

#: Hints that differ from those of a command line.
HINTS = {
    Code.MODEL_REQUIRED: "choose one with LOAD; STATUS lists them",
    Code.UNKNOWN_MODEL: "STATUS lists the models there are",
}
#: DEL, C1, separators and direction marks in UTF-8. A terminal acts on them, and `nc` shows what it receives.
_CONTROLS = re.compile(b"\x7f|\xc2[\x80-\x9f]|\xe2\x80[\xa8-\xae]|\xe2\x81[\xa6-\xa9]")

encode_object: Encode = msgspec.msgpack.Encoder().encode
_encode_json = msgspec.json.Encoder().encode


def encode_line(reply: Reply) -> bytes:
    """JSON with control characters as \\u escapes: a JSON parser reads the same text."""
    line = _encode_json(reply)
    if not line.isascii() or b"\x7f" in line:
        line = _CONTROLS.sub(lambda found: f"\\u{ord(found[0].decode()):04x}".encode(), line)
    return line + b"\n"


def ok(message: str, data: object) -> Reply:
    return {"status": "ok", "message": message, "data": data}


def token(text: str) -> Reply:
    return {"type": "token", "token": text, "final": False}


def final(reply: Reply) -> Reply:
    """The reply as the last object of a stream: an empty token beside its fields."""
    return {"type": "token", "token": "", "final": True, **reply}


def error_reply(info: ErrorInfo) -> Reply:
    more = {"retry_after_ms": info.retry_after_ms} if info.retry_after_ms else {}
    return _error_reply(info.text, info.code, HINTS.get(info.code) or info.hint or TRAITS[info.code].hint, more)


def mistake_reply(mistake: Mistake) -> Reply:
    return _error_reply(mistake.text, mistake.code, mistake.hint, {})


def _error_reply(text: str, code: Code, hint: str, more: Mapping[str, object]) -> Reply:
    # Text quoted from the input may hold lone surrogates, which have no UTF-8.
    shown = printable(text).encode(errors="replace").decode()
    data = {"code": code.value, "hint": hint, "retryable": TRAITS[code].retryable, **more}
    return {"status": "error", "message": shown, "data": data}
