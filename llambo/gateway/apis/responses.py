"""OpenAI's `/v1/responses`.

The input is a text or a list of items. Items are decoded one by one, because most of them need not have a `type`.

The answer, as a stream:

    response.created, response.in_progress
    response.output_item.added, ..., response.output_item.done      for each item: a message or a function call
    response.completed, response.incomplete or response.failed

The events are counted, from 0, in `sequence_number`. The last one contains the whole response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from llambo.gateway.answers.api import AnswerHead, JsonObject, Parsed, StreamEvent, Submission, Token
from llambo.gateway.answers.api_errors import FieldError, decode_error
from llambo.gateway.apis import openai_common as common
from llambo.gateway.apis.openai_common import Share
from llambo.gateway.apis.prompts import (
    ANY_OBJECT,
    Conversation,
    GivenId,
    LlamboFields,
    ToolName,
    bounded_schema,
    chat_prompt,
    check_depth,
)
from llambo.gateway.apis.response_store import ResponseStore
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.client.request_options import Options
from llambo.mesh.wire import limits
from llambo.mesh.wire.conversation import ChatMessage, EncodedChat, Function, Tool, ToolChoice
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.tool_calls import CallArguments, CallBegun, CallEnded, Content, Delta, Parser, parser_of

ITEMS = 4_096
#: Fields that are not supported unless they are absent, null or false; and what to use instead.
UNSUPPORTED = {
    "background": "is not supported; answers are sent at once",
    "conversation": "is not supported; use previous_response_id",
    "prompt": "is not supported; use instructions and input",
}
T = TypeVar("T")
#: OpenAI's codes for a response that failed after it had begun; any other error is `server_error`.
_FAILED_AS = {
    Code.OVER_LIMIT: "rate_limit_exceeded",
    Code.BUSY: "rate_limit_exceeded",
    Code.BAD_REQUEST: "invalid_prompt",
    Code.TOO_LONG: "invalid_prompt",
}
NamedFields = tuple[str, JsonObject]


class InputText(msgspec.Struct, tag="input_text"):
    text: str


class OutputText(msgspec.Struct, tag="output_text"):
    text: str


class Refusal(msgspec.Struct, tag="refusal"):
    """Never made here, but answers of other servers may contain it."""

    refusal: str


class InputMessage(msgspec.Struct):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText | Refusal]


class FunctionCall(msgspec.Struct):
    call_id: GivenId
    name: ToolName
    arguments: str


class FunctionCallOutput(msgspec.Struct):
    call_id: GivenId
    output: str | list[InputText]


class ResponsesTool(msgspec.Struct):
    """`type` is checked first: other tools have other fields."""

    type: str
    name: ToolName = ""
    parameters: JsonObject | None = None
    description: str | None = None
    strict: bool | None = None


class AllowedTool(msgspec.Struct):
    name: ToolName
    type: Literal["function"] = "function"


class NamedTool(msgspec.Struct, tag="function"):
    name: ToolName


class AllowedToolList(msgspec.Struct, tag="allowed_tools"):
    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Meta(max_length=limits.TOOLS)]


class TextFormat(msgspec.Struct, tag="text"):
    pass


class ObjectFormat(msgspec.Struct, tag="json_object"):
    pass


class SchemaFormat(msgspec.Struct, tag="json_schema", omit_defaults=True):
    name: str
    schema: JsonObject
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct):
    format: TextFormat | ObjectFormat | SchemaFormat | None = None


class ResponsesRequest(LlamboFields, kw_only=True):
    input: str | Annotated[list[JsonObject], Meta(min_length=1, max_length=ITEMS)]
    model: Annotated[str, Meta(max_length=limits.NAME_CHARS)] = ""
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Share | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    include: list[str] | None = None
    text: TextConfig | None = None
    tools: Annotated[list[ResponsesTool], Meta(max_length=limits.TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolList | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: GivenId | None = None
    metadata: Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
                        Meta(max_length=16)] | None = None  # fmt: skip
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None


def parse(body: ResponsesRequest, answer_tokens: int, store: ResponseStore, owner: str) -> Parsed:
    """`answer_tokens`: the longest answer if the caller sets no limit. `owner`: whose responses are stored."""
    for field, why in UNSUPPORTED.items():
        if getattr(body, field):
            raise FieldError(field, why)
    conversation = _conversation(body, _before(body, store, owner))
    # The instructions are those of this request alone: they are not stored with the conversation.
    instructions = [ChatMessage("system", body.instructions)] if body.instructions else []
    tools = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(body.tools or ())]
    prompt = chat_prompt([*instructions, *conversation.messages], tools, _tool_choice(body))

    def store_it(response: JsonObject) -> None:
        if body.store is not False:
            store.put(owner, response, _continued(conversation.messages, response["output"]))

    renderer = ResponsesRenderer(_echo(body), store_it, tools=bool(prompt.tool_options))
    return Parsed(Submission(prompt.text, _options(body, answer_tokens, prompt)), renderer, bool(body.stream))


def _before(body: ResponsesRequest, store: ResponseStore, owner: str) -> list[ChatMessage]:
    if not body.previous_response_id:
        return []
    try:
        return store.conversation(owner, body.previous_response_id)
    except LlamboError as error:
        raise FieldError("previous_response_id", error.text) from error


def _conversation(body: ResponsesRequest, before: list[ChatMessage]) -> Conversation:
    conversation = Conversation(before)
    if isinstance(body.input, str):
        conversation.add("user", body.input)
    else:
        for number, item in enumerate(body.input):
            _add(conversation, item, f"input[{number}]")
    return conversation


def _continued(before: list[ChatMessage], output: list[JsonObject]) -> list[ChatMessage]:
    """The conversation up to the end of this response, for the one that follows it."""
    conversation = Conversation(before)
    for item in output:
        if item["type"] == "message":
            conversation.add("assistant", item["content"][0]["text"])
        elif item["status"] == "completed":
            # A call that was cut is left out: its arguments cannot be read.
            conversation.add_call(item["call_id"], item["name"], item["arguments"])
    return conversation.messages


def _options(body: ResponsesRequest, answer_tokens: int, prompt: EncodedChat) -> Options:
    """The limit on tokens is only an upper bound: the context need not have room for so many (`fit`)."""
    sampling: JsonObject = {"fit": True, **prompt.tool_options, **_format(body.text)}
    if body.top_p is not None:
        sampling["top_p"] = body.top_p
    logprobs = "message.output_text.logprobs" in (body.include or ())
    if prompt.tool_options and logprobs:
        raise FieldError("include", "log probabilities are not available together with tools")
    return {
        **body.options(),
        "model": body.model_with_adapter(body.model),
        "max_tokens": min(body.max_output_tokens or answer_tokens, limits.MAX_TOKENS),
        "temperature": body.temperature,
        "logprobs": (body.top_logprobs or 0) if logprobs else None,
        "form": prompt.form,
        "sampling": sampling,
    }


def _tool_choice(body: ResponsesRequest) -> ToolChoice:
    parallel = body.parallel_tool_calls
    match body.tool_choice:
        case NamedTool(name):
            return ToolChoice("required", [name], parallel)
        case AllowedToolList(mode, tools):
            names = [tool.name for tool in tools]
            return ToolChoice(mode if names else "none", names, parallel)
        case mode:
            return ToolChoice(mode or "auto", (), parallel)


def _tool(tool: ResponsesTool, field: str) -> Tool:
    if tool.type != "function":
        raise FieldError(f"{field}.type", f"tools of type {tool.type!r} are not supported, only functions")
    if not tool.name:
        raise FieldError(f"{field}.name", "is missing")
    parameters = check_depth(tool.parameters or {}, f"{field}.parameters")
    return Tool(Function(tool.name, tool.description or "", parameters))


def _format(text: TextConfig | None) -> JsonObject:
    match text.format if text is not None else None:
        case SchemaFormat() as wanted:
            return {"json_schema": bounded_schema(wanted.schema, "text.format.schema")}
        case ObjectFormat():
            return {"json_schema": ANY_OBJECT}
    return {}


def _add(conversation: Conversation, item: JsonObject, field: str) -> None:
    match item.get("type", "message"):
        case "message":
            message = _decode(item, InputMessage, field)
            conversation.add("system" if message.role == "developer" else message.role, _text(message.content))
        case "function_call":
            call = _decode(item, FunctionCall, field)
            conversation.add_call(call.call_id, call.name, call.arguments)
        case "function_call_output":
            output = _decode(item, FunctionCallOutput, field)
            if output.call_id not in conversation.calls:
                known = f"no function_call before it has the call_id {output.call_id[:80]!r}"
                raise FieldError(f"{field}.call_id", known)
            conversation.add_result(output.call_id, _text(output.output))
        case other:
            known = "message, function_call and function_call_output"
            raise FieldError(f"{field}.type", f"{str(other)[:80]!r} is not supported, only {known}")


def _text(content: str | Sequence[InputText | OutputText | Refusal]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)


def _decode(item: JsonObject, kind: type[T], field: str) -> T:
    try:
        return msgspec.convert(item, kind)
    except msgspec.ValidationError as error:
        raise decode_error(error, field) from error


def _echo(body: ResponsesRequest) -> JsonObject:
    """The fields of a response that repeat the request."""
    text = body.text.format if body.text is not None and body.text.format is not None else TextFormat()
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": {"format": msgspec.to_builtins(text)},
        "tool_choice": msgspec.to_builtins(body.tool_choice or "auto"),
        "tools": [msgspec.to_builtins(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs,
        "top_p": body.top_p,
        "truncation": "disabled",
    }


class ResponsesRenderer:
    """`echo`: the fields of a response that repeat the request. `store` is called with the complete response.

    `tools`: the answer may contain calls.
    """

    def __init__(self, echo: JsonObject, store: Callable[[JsonObject], None], *, tools: bool) -> None:
        self._echo, self._store, self._tools = echo, store, tools
        self._head = AnswerHead("", 0, "")
        self._parser: Parser = parser_of(False, "", "")
        self._items = Items("")
        self._number = 0
        self._response: JsonObject = {}

    def begin(self, head: AnswerHead) -> Iterable[StreamEvent]:
        self._head = head
        self._parser = parser_of(self._tools, head.id, "call_")
        self._items = Items(head.id)
        begun = {"response": self._response_now("in_progress")}
        return self._events([("response.created", begun), ("response.in_progress", begun)])

    def token(self, token: Token) -> Iterable[StreamEvent]:
        if token.logprob is None:
            return self._events(self._items.add(self._parser.feed(token.text), []))
        # Also without text: a token may end within a character.
        logprobs = [common.logprob_of(token.piece, token.logprob)]
        return self._events(self._items.add([Content(token.text)], logprobs))

    def end(self, choice: int, answer: Answer) -> Iterable[StreamEvent]:
        rest = self._events(self._items.add(self._parser.finish(), []))
        return [*rest, *self._events(self._items.close(_status(answer)))]

    def done(self, answers: list[Answer]) -> Iterable[StreamEvent]:
        status = _status(answers[0])
        self._response = self._response_now(status, answer=answers[0])
        self._store(self._response)
        return self._events([(f"response.{status}", {"response": self._response})])

    def failed(self, error: LlamboError) -> Iterable[StreamEvent]:
        return self._events([("response.failed", {"response": self._response_now("failed", error=error)})])

    def body(self, answers: list[Answer]) -> JsonObject:
        return self._response

    def _events(self, named: Iterable[NamedFields]) -> list[StreamEvent]:
        events = []
        for name, fields in named:
            events.append(StreamEvent({"type": name, "sequence_number": self._number, **fields}, name))
            self._number += 1
        return events

    def _response_now(
        self, status: str, *, answer: Answer | None = None, error: LlamboError | None = None
    ) -> JsonObject:
        cost: JsonObject = {"usage": None}
        if answer is not None:
            cost = {"usage": _usage(answer), "llambo": common.llambo_fields([answer])}
        return {
            "id": f"resp_{self._head.id}",
            "object": "response",
            "created_at": self._head.created,
            "status": status,
            "background": False,
            "error": None if error is None else _error(error),
            "incomplete_details": {"reason": _why(answer)} if answer is not None and status == "incomplete" else None,
            "model": self._head.model,
            "output": list(self._items.done),
            **self._echo,
            **cost,
        }


class Items:
    """The items of one response, made one after the other. Each method yields events: their names and fields."""

    def __init__(self, id: str) -> None:
        self._id = id
        self.done: list[JsonObject] = []
        self._item: JsonObject = {}
        self._parts: list[str] = []
        self._logprobs: list[JsonObject] = []

    def add(self, deltas: list[Delta], logprobs: list[JsonObject]) -> Iterator[NamedFields]:
        """`logprobs` belong to the text in them."""
        for delta in deltas:
            match delta:
                case Content(text):
                    yield from self._text(text, logprobs)
                case CallBegun():
                    yield from self.close("completed")
                    yield from self._begin_call(delta)
                case CallArguments(_, text):
                    self._parts.append(text)
                    yield "response.function_call_arguments.delta", {**self._place(), "delta": text}
                case CallEnded(_, whole):
                    yield from self.close("completed" if whole else "incomplete")

    def close(self, status: str) -> Iterator[NamedFields]:
        """The open item is complete, or was cut."""
        if not self._item:
            return
        text = "".join(self._parts)
        if self._item["type"] == "message":
            part = _part(text, self._logprobs)
            whole = {"text": text, "logprobs": self._logprobs}
            yield "response.output_text.done", {**self._place(), "content_index": 0, **whole}
            yield "response.content_part.done", {**self._place(), "content_index": 0, "part": part}
            self._item["content"] = [part]
        else:
            call = {"name": self._item["name"], "arguments": text}
            yield "response.function_call_arguments.done", {**self._place(), **call}
            self._item["arguments"] = text
        item = {**self._item, "status": status}
        yield "response.output_item.done", {"output_index": len(self.done), "item": item}
        self.done.append(item)
        self._item, self._parts, self._logprobs = {}, [], []

    def _text(self, text: str, logprobs: list[JsonObject]) -> Iterator[NamedFields]:
        if not self._item:
            id = f"msg_{self._id}_{len(self.done)}"
            yield self._begin({"id": id, "type": "message", "role": "assistant", "content": []})
            yield "response.content_part.added", {**self._place(), "content_index": 0, "part": _part("", [])}
        self._parts.append(text)
        self._logprobs += logprobs
        delta = {"content_index": 0, "delta": text, "logprobs": logprobs}
        yield "response.output_text.delta", {**self._place(), **delta}

    def _begin_call(self, begun: CallBegun) -> Iterator[NamedFields]:
        id = f"fc_{self._id}_{len(self.done)}"
        call = {"call_id": begun.id, "name": begun.name, "arguments": ""}
        yield self._begin({"id": id, "type": "function_call", **call})

    def _begin(self, item: JsonObject) -> NamedFields:
        self._item = item
        added = {**item, "status": "in_progress"}
        return "response.output_item.added", {"output_index": len(self.done), "item": added}

    def _place(self) -> JsonObject:
        return {"item_id": self._item["id"], "output_index": len(self.done)}


def _status(answer: Answer) -> str:
    return "completed" if answer.reason == "stop" else "incomplete"


def _usage(answer: Answer) -> JsonObject:
    usage = common.usage([answer])
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


def _why(answer: Answer) -> str:
    """OpenAI has no reason for a context that is full before the maximum, which counts as it; and no deadlines."""
    return "max_output_tokens" if answer.reason == "length" else answer.reason


def _part(text: str, logprobs: list[JsonObject]) -> JsonObject:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _error(error: LlamboError) -> JsonObject:
    code = _FAILED_AS.get(error.code, "server_error")
    return {"code": code, "message": error.text, "retryable": error.retryable}
