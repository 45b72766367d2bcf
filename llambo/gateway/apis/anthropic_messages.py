"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens`: what they read, and what they ask of the mesh.

What is answered is in `anthropic_replies`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from llambo.gateway.answers.asking import About, Ask, Event, Prepared, Token, encode
from llambo.gateway.answers.problems import FieldError, body
from llambo.gateway.apis.common_fields import Own, Turns, bounded, bounded_schema, called, own_options, prompt_of
from llambo.gateway.apis.openai_common import Share, Stop, story
from llambo.gateway.apis.tool_calls import Arguments, Begun, Content, Delta, Ended, Parser, deltas_of, parser_of
from llambo.gateway.apis.tools import Tool
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.client.client import Client
from llambo.mesh.client.request_options import Options
from llambo.mesh.wire import limits
from llambo.mesh.wire.conversation import MESSAGES, TOOL_NAME
from llambo.mesh.wire.errors import LlamboError

# --- Anthropic's `/v1/messages`: what it answers, whole or as events. ---
#
#     message_start
#     content_block_start, content_block_delta, ..., content_block_stop      for each text and each call
#     message_delta                                                          why it ended, and what it cost
#     message_stop
#
# A `ping` comes after the first block has begun. What a prompt cost is known at the end only, so the `usage` of
# `message_start` is zero, and that of `message_delta` is all of it.

PREFIX = "toolu_"


class MessagesRenderer:
    """`tools`: the answer may have calls in it. `max_tokens`: as many as were asked for."""

    def __init__(self, *, tools: bool, max_tokens: int) -> None:
        self._tools, self._max_tokens = tools, max_tokens
        self._parser: Parser = parser_of(False, "", PREFIX)
        #: Blocks so far, and the type of the last one if it is open.
        self._blocks = 0
        self._open = ""
        self._called = False

    def begin(self, about: About) -> Iterable[Event]:
        self._parser = parser_of(self._tools, about.id, PREFIX)
        message = {**_head(about), "content": [], "stop_reason": None, "stop_sequence": None,
                   "usage": {"input_tokens": 0, "output_tokens": 0}}  # fmt: skip
        return [_event("message_start", message=message)]

    def token(self, token: Token) -> Iterable[Event]:
        return self._tell(self._parser.feed(token.text))

    def end(self, choice: int, answer: Answer) -> Iterable[Event]:
        return [*self._tell(self._parser.finish()), *self._close()]

    def done(self, answers: list[Answer]) -> Iterable[Event]:
        answer = answers[0]
        end = ending(answer, self._called, self._max_tokens)
        yield _event("message_delta", delta=end, usage=usage(answer), llambo=story(answers))
        yield _event("message_stop")

    def failed(self, error: LlamboError) -> Iterable[Event]:
        return [Event(encode(body(error, "anthropic")), "error")]

    def _tell(self, deltas: list[Delta]) -> list[Event]:
        events: list[Event] = []
        for delta in deltas:
            match delta:
                case Content(text):
                    if self._open != "text":
                        events += [*self._close(), *self._begin({"type": "text", "text": ""})]
                    events.append(self._delta({"type": "text_delta", "text": text}))
                case Begun():
                    self._called = True
                    events += [*self._close(), *self._begin(_tool_use(delta, {}))]
                case Arguments(_, text):
                    events.append(self._delta({"type": "input_json_delta", "partial_json": text}))
                case Ended():
                    events += self._close()
        return events

    def _begin(self, block: dict[str, Any]) -> list[Event]:
        self._open = block["type"]
        self._blocks += 1
        begun = _event("content_block_start", index=self._blocks - 1, content_block=block)
        return [begun, _event("ping")] if self._blocks == 1 else [begun]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _close(self) -> list[Event]:
        if not self._open:
            return []
        self._open = ""
        return [_event("content_block_stop", index=self._blocks - 1)]


def whole_message(about: About, answer: Answer, *, tools: bool, max_tokens: int) -> dict[str, Any]:
    content = _blocks(deltas_of(answer.text, tools, about.id, PREFIX))
    called = any(block["type"] == "tool_use" for block in content)
    end = ending(answer, called, max_tokens)
    return {**_head(about), "content": content, **end, "usage": usage(answer), "llambo": story([answer])}


def ending(answer: Answer, called: bool, max_tokens: int) -> dict[str, Any]:
    """This API knows no deadlines: what ran out of time was cut, like what ran out of tokens."""
    if answer.stop:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop}
    if answer.reason == "stop":
        reason = "tool_use" if called else "end_turn"
    elif answer.reason == "length" and len(answer.ids) < max_tokens:
        reason = "model_context_window_exceeded"
    else:
        reason = "max_tokens"
    return {"stop_reason": reason, "stop_sequence": None}


def usage(answer: Answer) -> dict[str, int]:
    """Here `input_tokens` are those that had to be computed; the rest of the prompt was in a cache."""
    cached = answer.usage.cached_tokens
    return {
        "input_tokens": max(0, answer.usage.prompt_tokens - cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": len(answer.ids),
    }


def _blocks(deltas: list[Delta]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    arguments: list[str] = []
    for delta in deltas:
        match delta:
            case Content(text):
                if not blocks or blocks[-1]["type"] != "text":
                    blocks.append({"type": "text", "text": ""})
                blocks[-1]["text"] += text
            case Begun():
                arguments = []
                blocks.append(_tool_use(delta, {}))
            case Arguments(_, text):
                arguments.append(text)
            case Ended(_, whole):
                blocks[-1]["input"] = _object("".join(arguments)) if whole else {}
    return blocks


def _object(text: str) -> dict[str, Any]:
    """The arguments of a call. What the model got wrong is shown as what it is."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return {"_unreadable": text}


def _tool_use(begun: Begun, given: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": begun.id, "name": begun.name, "input": given}


def _head(about: About) -> dict[str, Any]:
    return {"id": f"msg_{about.id}", "type": "message", "role": "assistant", "model": about.model}


def _event(kind: str, **fields: Any) -> Event:
    return Event(encode({"type": kind, **fields}), kind)


Name = Annotated[str, Meta(pattern=f"^{TOOL_NAME.pattern}$")]
Id = Annotated[str, Meta(min_length=1, max_length=256)]


class Text(msgspec.Struct, tag="text"):
    text: str


class ToolUse(msgspec.Struct, tag="tool_use"):
    id: Id
    name: Name
    input: dict[str, Any] = {}


class ToolResult(msgspec.Struct, tag="tool_result"):
    tool_use_id: Id
    content: str | list[Text] | None = None
    is_error: bool | None = None


class Message(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[Text | ToolUse | ToolResult]


class GivenTool(msgspec.Struct):
    """`type` is looked at before the rest: a tool that Anthropic would run has other fields."""

    name: Name = ""
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None


class Choice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Format(msgspec.Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct):
    format: Format | None = None


class CountRequest(Own, kw_only=True):
    """What makes the prompt: all that is read to count its tokens."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MESSAGES)]
    model: Annotated[str, Meta(max_length=limits.NAME_CHARS)] = ""
    system: str | list[Text] | None = None
    tools: Annotated[list[GivenTool], Meta(max_length=limits.TOOLS)] | None = None
    tool_choice: Choice | None = None


class MessagesRequest(CountRequest, kw_only=True):
    max_tokens: Annotated[int, Meta(ge=1, le=2**31)]
    stream: bool | None = None
    stop_sequences: Annotated[list[Stop], Meta(max_length=limits.STOP_STRINGS)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**20)] | None = None
    output_config: OutputConfig | None = None


def prepare(asked: MessagesRequest) -> Prepared:
    if asked.messages[-1].role == "assistant":
        # A template begins a new turn after it: what was begun would not be gone on with.
        field = f"messages[{len(asked.messages) - 1}].role"
        raise FieldError(field, f"{field}: the last message must not be the assistant's; it cannot be continued here")
    calls = _calls(asked)
    form, prompt = prompt_of(_conversation(asked), _functions(asked), calls)
    tools, most = bool(calls), asked.max_tokens

    def whole(about: About, answers: list[Answer]) -> dict[str, Any]:
        return whole_message(about, answers[0], tools=tools, max_tokens=most)

    renderer = MessagesRenderer(tools=tools, max_tokens=most) if asked.stream else None
    return Prepared(Ask(prompt, _options(asked, form, calls)), renderer, whole)


async def count(client: Client, asked: CountRequest) -> dict[str, int]:
    """`/v1/messages/count_tokens`: how many tokens the prompt has, with all that the model's template adds."""
    form, prompt = prompt_of(_conversation(asked), _functions(asked), _calls(asked))
    found = await client.tokenize(prompt, form=form, model=asked.model or None)
    return {"input_tokens": len(found.ids)}


def _functions(asked: CountRequest) -> list[Tool]:
    return [_function(tool, f"tools[{number}]") for number, tool in enumerate(asked.tools or ())]


def _calls(asked: CountRequest) -> dict[str, Any]:
    return called(_functions(asked), *_choice(asked.tool_choice))


def _options(asked: MessagesRequest, form: str, calls: dict[str, Any]) -> Options:
    """`max_tokens` is no more than a bound here: there need not be room for so many."""
    sampling: dict[str, Any] = {"fit": True, **calls}
    if asked.top_p is not None:
        sampling["top_p"] = asked.top_p
    if asked.top_k is not None:
        sampling["top_k"] = asked.top_k
    if asked.output_config is not None and asked.output_config.format is not None:
        sampling["json_schema"] = bounded_schema(asked.output_config.format.schema, "output_config.format.schema")
    return {
        **own_options(asked),
        "model": asked.model or None,
        "max_tokens": min(asked.max_tokens, limits.MAX_TOKENS),
        "temperature": asked.temperature,
        "stop": asked.stop_sequences,
        "form": form,
        "sampling": sampling,
    }


def _function(tool: GivenTool, field: str) -> Tool:
    """As OpenAI's chat has it."""
    if tool.type not in (None, "custom"):
        raise FieldError(f"{field}.type", f"{field}.type: tools of type {tool.type!r} are not there, only your own")
    if not tool.name:
        raise FieldError(f"{field}.name", f"{field}.name: is missing")
    if tool.input_schema is None:
        raise FieldError(f"{field}.input_schema", f"{field}.input_schema: is missing")
    parameters = bounded(tool.input_schema, f"{field}.input_schema")
    told = {"name": tool.name, "description": tool.description or "", "parameters": parameters}
    return {"type": "function", "function": told}


def _choice(choice: Choice | None) -> tuple[str | dict[str, Any], bool | None]:
    """As OpenAI's chat has it, and whether several calls in one answer are welcome."""
    if choice is None:
        return "auto", None
    several = None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use
    if choice.type == "tool":
        if not choice.name:
            raise FieldError("tool_choice.name", "tool_choice.name: is missing")
        return {"type": "function", "function": {"name": choice.name}}, several
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type], several


def _conversation(asked: CountRequest) -> list[dict[str, Any]]:
    """As the model's template reads it."""
    turns = Turns(joined=True)
    system = _joined(asked.system)
    if system:
        turns.say("system", system)
    for number, message in enumerate(asked.messages):
        _add(turns, message, f"messages[{number}]")
    if not turns.messages:
        raise FieldError("messages", "messages: nothing is said in them")
    return turns.messages


def _add(turns: Turns, message: Message, field: str) -> None:
    if isinstance(message.content, str):
        turns.say(message.role, message.content)
        return
    text: list[str] = []
    for number, block in enumerate(message.content):
        at = f"{field}.content[{number}]"
        match block:
            case Text(said):
                text.append(said)
                continue
            case ToolUse():
                _only(message.role, "assistant", at)
                _flush(turns, message.role, text)
                turns.call(block.id, block.name, encode(bounded(block.input, f"{at}.input")).decode())
            case ToolResult():
                _only(message.role, "user", at)
                _flush(turns, message.role, text)
                if block.tool_use_id not in turns.calls:
                    at = f"{at}.tool_use_id"
                    raise FieldError(at, f"{at}: no tool_use before it has the id {block.tool_use_id[:80]!r}")
                said = _joined(block.content)
                turns.result(block.tool_use_id, f"Error: {said}" if block.is_error else said)
    _flush(turns, message.role, text)


def _only(role: str, expected: str, at: str) -> None:
    if role != expected:
        raise FieldError(f"{at}.type", f"{at}.type: belongs into a message of the role {expected!r}")


def _flush(turns: Turns, role: str, text: list[str]) -> None:
    if text:
        turns.say(role, "\n".join(text))
        text.clear()


def _joined(content: str | list[Text] | None) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content or ())
