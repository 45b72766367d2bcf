"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens`.

    message_start
    content_block_start, content_block_delta, ..., content_block_stop      for each text and each call
    message_delta                                                          the stop reason and the usage
    message_stop

A `ping` follows the start of the first block. The number of prompt tokens is known at the end only, so the `usage` in
`message_start` is zero, and that in `message_delta` is complete.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from llambo.gateway.answers.api import AnswerHead, JsonObject, Parsed, StreamEvent, Submission, Token, WholeBody, encode
from llambo.gateway.answers.api_errors import FieldError, error_body
from llambo.gateway.apis.openai_common import Share, Stop, llambo_fields
from llambo.gateway.apis.prompts import (
    Conversation,
    GivenId,
    LlamboFields,
    ToolName,
    bounded_schema,
    chat_prompt,
    check_depth,
)
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.client.client import Client
from llambo.mesh.client.request_options import Options
from llambo.mesh.wire import limits
from llambo.mesh.wire.conversation import MESSAGES, EncodedChat, Function, Tool, ToolChoice
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.tool_calls import CallArguments, CallBegun, CallEnded, Content, Delta, Parser, parser_of


class TextBlock(msgspec.Struct, tag="text"):
    text: str


class ToolUseBlock(msgspec.Struct, tag="tool_use"):
    id: GivenId
    name: ToolName
    input: JsonObject = {}


class ToolResultBlock(msgspec.Struct, tag="tool_result"):
    tool_use_id: GivenId
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


class AnthropicMessage(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[TextBlock | ToolUseBlock | ToolResultBlock]


class AnthropicTool(msgspec.Struct):
    """`type` is checked first: a tool that Anthropic itself would run has other fields."""

    name: ToolName = ""
    input_schema: JsonObject | None = None
    description: str | None = None
    type: str | None = None


class AnthropicToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(msgspec.Struct):
    type: Literal["json_schema"]
    schema: JsonObject


class OutputConfig(msgspec.Struct):
    format: OutputFormat | None = None


class CountRequest(LlamboFields, kw_only=True):
    """The fields that make the prompt: all that is needed to count its tokens."""

    messages: Annotated[list[AnthropicMessage], Meta(min_length=1, max_length=MESSAGES)]
    model: Annotated[str, Meta(max_length=limits.NAME_CHARS)] = ""
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Meta(max_length=limits.TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None


class MessagesRequest(CountRequest, kw_only=True):
    max_tokens: Annotated[int, Meta(ge=1, le=2**31)]
    stream: bool | None = None
    stop_sequences: Annotated[list[Stop], Meta(max_length=limits.STOP_STRINGS)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**20)] | None = None
    output_config: OutputConfig | None = None


def parse(body: MessagesRequest) -> Parsed:
    if body.messages[-1].role == "assistant":
        # A chat template begins a new turn after it, so the model would not continue the text.
        field = f"messages[{len(body.messages) - 1}].role"
        raise FieldError(field, "the last message must not be the assistant's; it cannot be continued here")
    prompt = _prompt(body)
    renderer = MessagesRenderer(tools=bool(prompt.tool_options), max_tokens=body.max_tokens)
    return Parsed(Submission(prompt.text, _options(body, prompt)), renderer, bool(body.stream))


async def count(client: Client, body: CountRequest) -> WholeBody:
    """`/v1/messages/count_tokens`: the tokens of the prompt, with all that the chat template of the model adds."""
    prompt = _prompt(body)
    found = await client.tokenize(prompt.text, form=prompt.form, model=body.model or None)
    return WholeBody({"input_tokens": len(found.ids)})


def _options(body: MessagesRequest, prompt: EncodedChat) -> Options:
    """`max_tokens` is only an upper bound here: the context need not have room for so many (`fit`)."""
    sampling: JsonObject = {"fit": True, **prompt.tool_options}
    if body.top_p is not None:
        sampling["top_p"] = body.top_p
    if body.top_k is not None:
        sampling["top_k"] = body.top_k
    if body.output_config is not None and body.output_config.format is not None:
        sampling["json_schema"] = bounded_schema(body.output_config.format.schema, "output_config.format.schema")
    return {
        **body.options(),
        "model": body.model_with_adapter(body.model),
        "max_tokens": min(body.max_tokens, limits.MAX_TOKENS),
        "temperature": body.temperature,
        "stop": body.stop_sequences,
        "form": prompt.form,
        "sampling": sampling,
    }


def _prompt(body: CountRequest) -> EncodedChat:
    conversation = Conversation(joined=True)
    if system := _joined(body.system):
        conversation.add("system", system)
    for number, message in enumerate(body.messages):
        _add(conversation, message, f"messages[{number}]")
    if not conversation.messages:
        raise FieldError("messages", "they have no content")
    tools = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(body.tools or ())]
    return chat_prompt(conversation.messages, tools, _tool_choice(body.tool_choice))


def _tool(tool: AnthropicTool, field: str) -> Tool:
    if tool.type not in (None, "custom"):
        raise FieldError(f"{field}.type", f"tools of type {tool.type!r} are not supported, only your own")
    if not tool.name:
        raise FieldError(f"{field}.name", "is missing")
    if tool.input_schema is None:
        raise FieldError(f"{field}.input_schema", "is missing")
    parameters = check_depth(tool.input_schema, f"{field}.input_schema")
    return Tool(Function(tool.name, tool.description or "", parameters))


def _tool_choice(choice: AnthropicToolChoice | None) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    parallel = None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use
    match choice.type:
        case "tool":
            if not choice.name:
                raise FieldError("tool_choice.name", "is missing")
            return ToolChoice("required", [choice.name], parallel)
        case "any":
            return ToolChoice("required", (), parallel)
        case mode:
            return ToolChoice(mode, (), parallel)


def _add(conversation: Conversation, message: AnthropicMessage, field: str) -> None:
    if isinstance(message.content, str):
        conversation.add(message.role, message.content)
        return
    text: list[str] = []

    def flush() -> None:
        if text:
            conversation.add(message.role, "\n".join(text))
            text.clear()

    for number, block in enumerate(message.content):
        at = f"{field}.content[{number}]"
        match block:
            case TextBlock():
                text.append(block.text)
            case ToolUseBlock():
                _check_role(message.role, "assistant", at)
                flush()
                conversation.add_call(block.id, block.name, encode(check_depth(block.input, f"{at}.input")).decode())
            case ToolResultBlock():
                _check_role(message.role, "user", at)
                flush()
                if block.tool_use_id not in conversation.calls:
                    known = f"no tool_use before it has the id {block.tool_use_id[:80]!r}"
                    raise FieldError(f"{at}.tool_use_id", known)
                result = _joined(block.content)
                conversation.add_result(block.tool_use_id, f"Error: {result}" if block.is_error else result)
    flush()


def _check_role(role: str, expected: str, at: str) -> None:
    if role != expected:
        raise FieldError(f"{at}.type", f"belongs in a message of the role {expected!r}")


def _joined(content: str | list[TextBlock] | None) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content or ())


class MessagesRenderer:
    """`tools`: the answer may contain calls. `max_tokens`: as in the request."""

    def __init__(self, *, tools: bool, max_tokens: int) -> None:
        self._tools, self._max_tokens = tools, max_tokens
        self._head: JsonObject = {}
        self._parser: Parser = parser_of(False, "", "")
        #: The blocks so far. The last one is open while `_parts` of it are collected.
        self._blocks: list[JsonObject] = []
        self._parts: list[str] | None = None

    def begin(self, head: AnswerHead) -> Iterable[StreamEvent]:
        self._parser = parser_of(self._tools, head.id, "toolu_")
        self._head = {"id": f"msg_{head.id}", "type": "message", "role": "assistant", "model": head.model}
        message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None,
                   "usage": {"input_tokens": 0, "output_tokens": 0}}  # fmt: skip
        return [_event("message_start", message=message)]

    def token(self, token: Token) -> Iterable[StreamEvent]:
        return self._add(self._parser.feed(token.text))

    def end(self, choice: int, answer: Answer) -> Iterable[StreamEvent]:
        return [*self._add(self._parser.finish()), *self._close()]

    def done(self, answers: list[Answer]) -> Iterable[StreamEvent]:
        answer = answers[0]
        yield _event("message_delta", delta=self._ending(answer), usage=_usage(answer), llambo=llambo_fields(answers))
        yield _event("message_stop")

    def failed(self, error: LlamboError) -> Iterable[StreamEvent]:
        return [StreamEvent(error_body(error, "anthropic"), "error")]

    def body(self, answers: list[Answer]) -> JsonObject:
        end = self._ending(answers[0])
        return {
            **self._head, "content": self._blocks, **end, "usage": _usage(answers[0]), "llambo": llambo_fields(answers),
        }  # fmt: skip

    def _add(self, deltas: list[Delta]) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        for delta in deltas:
            match delta:
                case Content(text):
                    if self._parts is None or self._blocks[-1]["type"] != "text":
                        events += [*self._close(), *self._open({"type": "text", "text": ""})]
                    events.append(self._delta(text, {"type": "text_delta", "text": text}))
                case CallBegun(_, id, name):
                    events += [*self._close(), *self._open({"type": "tool_use", "id": id, "name": name, "input": {}})]
                case CallArguments(_, text):
                    events.append(self._delta(text, {"type": "input_json_delta", "partial_json": text}))
                case CallEnded(_, whole):
                    events += self._close(whole=whole)
        return events

    def _open(self, block: JsonObject) -> list[StreamEvent]:
        self._blocks.append(dict(block))
        self._parts = []
        begun = _event("content_block_start", index=len(self._blocks) - 1, content_block=block)
        return [begun, _event("ping")] if len(self._blocks) == 1 else [begun]

    def _delta(self, text: str, delta: JsonObject) -> StreamEvent:
        assert self._parts is not None, "a block is open"
        self._parts.append(text)
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _close(self, *, whole: bool = True) -> list[StreamEvent]:
        """`whole`: nothing is missing from the arguments of a call."""
        if self._parts is None:
            return []
        text, block, self._parts = "".join(self._parts), self._blocks[-1], None
        if block["type"] == "text":
            block["text"] = text
        elif whole:
            block["input"] = _object(text)
        return [_event("content_block_stop", index=len(self._blocks) - 1)]

    def _ending(self, answer: Answer) -> JsonObject:
        """This API has no deadlines; an answer that ran out of time says "deadline"."""
        if answer.stop:
            return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop}
        if answer.reason == "stop":
            called = any(block["type"] == "tool_use" for block in self._blocks)
            reason = "tool_use" if called else "end_turn"
        elif answer.reason == "length" and len(answer.ids) < self._max_tokens:
            reason = "model_context_window_exceeded"
        else:
            reason = "max_tokens" if answer.reason == "length" else answer.reason
        return {"stop_reason": reason, "stop_sequence": None}


def _usage(answer: Answer) -> dict[str, int]:
    """In this API `input_tokens` are those that were not in a cache."""
    cached = answer.usage.cached_tokens
    return {
        "input_tokens": max(0, answer.usage.prompt_tokens - cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": len(answer.ids),
    }


def _object(text: str) -> JsonObject:
    """The arguments of a call. If the model wrote invalid JSON, it is shown as text."""
    try:
        return msgspec.json.decode(text, type=JsonObject)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return {"_unreadable": text}


def _event(kind: str, **fields: Any) -> StreamEvent:
    return StreamEvent({"type": kind, **fields}, kind)
