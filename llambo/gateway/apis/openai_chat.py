"""OpenAI's `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llambo.gateway.answers.api import AnswerHead, JsonObject, Parsed, StreamEvent, Submission, Token
from llambo.gateway.answers.api_errors import FieldError, error_body
from llambo.gateway.apis import openai_common as common
from llambo.gateway.apis.prompts import ANY_OBJECT, chat_prompt, field_error
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.wire import limits
from llambo.mesh.wire.conversation import MESSAGES, BadConversation, ChatMessage, Tool, ToolChoice, joined
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.tool_calls import CallArguments, CallBegun, CallEnded, Content, Delta, Parser, parser_of


class RoleMessage(ChatMessage, frozen=True, kw_only=True):
    """A message of the mesh with the roles that OpenAI has."""

    role: Literal["system", "developer", "user", "assistant", "tool"]


class JsonSchema(msgspec.Struct):
    schema: JsonObject
    name: str = ""
    description: str = ""
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class FunctionName(msgspec.Struct):
    name: str


class NamedFunction(msgspec.Struct, tag="function"):
    function: FunctionName


class AllowedTools(msgspec.Struct):
    mode: Literal["auto", "required"]
    tools: Annotated[list[Tool], Meta(max_length=limits.TOOLS)]


class AllowedToolsChoice(msgspec.Struct, tag="allowed_tools"):
    allowed_tools: AllowedTools


class ChatRequest(common.OpenAIRequest, kw_only=True):
    messages: Annotated[list[RoleMessage], Meta(min_length=1, max_length=MESSAGES)]
    max_completion_tokens: common.Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=limits.TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedToolsChoice | None = None
    parallel_tool_calls: bool | None = None


def parse(body: ChatRequest, answer_tokens: int) -> Parsed:
    """`answer_tokens`: the longest answer if the caller sets no limit."""
    options = common.options_of(body, answer_tokens)
    sampling = options["sampling"] or {}
    if body.max_completion_tokens is not None:
        options["max_tokens"] = body.max_completion_tokens
    elif body.max_tokens is None:
        sampling["fit"] = True
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise FieldError("top_logprobs", "needs logprobs to be true")
    sampling |= _format(body)
    messages = [_message(message, f"messages[{number}]") for number, message in enumerate(body.messages)]
    prompt = chat_prompt(messages, body.tools or [], _tool_choice(body))
    if prompt.tool_options and (body.grammar or sampling.get("json_schema")):
        raise FieldError("tools", "cannot be combined with a grammar or a JSON schema for the answer")
    options["form"], options["sampling"] = prompt.form, {**sampling, **prompt.tool_options}
    renderer = ChatRenderer(usage=common.wants_usage(body), tools=bool(prompt.tool_options))
    return Parsed(Submission(prompt.text, options, body.n or 1), renderer, bool(body.stream))


def _message(message: ChatMessage, field: str) -> ChatMessage:
    """As chat templates know it: `developer` is called `system`, and the content is one text."""
    try:
        text = joined(message.content, f"{field}.content", between="")
    except BadConversation as error:
        raise field_error(error) from error
    for at, call in enumerate(message.tool_calls or ()):
        if not 0 < len(call.function.name) <= limits.NAME_CHARS:
            raise FieldError(f"{field}.tool_calls[{at}].function.name", f"has 1 to {limits.NAME_CHARS} characters")
    return ChatMessage(
        "system" if message.role == "developer" else message.role, text, message.tool_calls or None,
        name=message.name or None, tool_call_id=message.tool_call_id or None,
    )  # fmt: skip


def _tool_choice(body: ChatRequest) -> ToolChoice:
    parallel = body.parallel_tool_calls
    match body.tool_choice:
        case NamedFunction(function):
            return ToolChoice("required", [function.name], parallel)
        case AllowedToolsChoice(allowed):
            names = [tool.function.name for tool in allowed.tools]
            return ToolChoice(allowed.mode if names else "none", names, parallel)
        case mode:
            return ToolChoice(mode or "auto", (), parallel)


def _format(body: ChatRequest) -> JsonObject:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return {}
    if body.grammar or body.json_schema:
        raise FieldError("response_format", "cannot be combined with grammar or json_schema")
    if wanted.type == "json_object":
        return {"json_schema": ANY_OBJECT}
    if wanted.json_schema is None:
        raise FieldError("response_format.json_schema", "is missing")
    return {"json_schema": common.schema_text(wanted.json_schema.schema)}


@dataclass(slots=True)
class _Choice:
    """One choice, as far as it has come."""

    parser: Parser
    #: Text beside the calls, and the calls with the parts of their arguments.
    content: list[str] = field(default_factory=list)
    calls: list[tuple[CallBegun, list[str]]] = field(default_factory=list)
    finish: str = ""

    def add(self, delta: Delta) -> JsonObject | None:
        """The delta as a chunk has it."""
        match delta:
            case Content(text):
                self.content.append(text)
                return {"content": text}
            case CallBegun(index):
                self.calls.append((delta, []))
                return {"tool_calls": [{"index": index, **_call(delta, "")}]}
            case CallArguments(index, text):
                self.calls[index][1].append(text)
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case CallEnded():
                return None

    def message(self, answer: Answer) -> JsonObject:
        if not self.calls:
            return {"role": "assistant", "content": answer.text, "refusal": None}
        calls = [_call(begun, "".join(parts)) for begun, parts in self.calls]
        return {"role": "assistant", "content": "".join(self.content) or None, "refusal": None, "tool_calls": calls}


def _call(begun: CallBegun, arguments: str) -> JsonObject:
    return {"id": begun.id, "type": "function", "function": {"name": begun.name, "arguments": arguments}}


class ChatRenderer:
    """`tools`: the answer may contain calls."""

    def __init__(self, *, usage: bool, tools: bool) -> None:
        self._usage, self._tools = usage, tools
        self._head = AnswerHead("", 0, "")
        self._choices: dict[int, _Choice] = {}

    def begin(self, head: AnswerHead) -> Iterable[StreamEvent]:
        self._head = head
        return ()

    def token(self, token: Token) -> Iterable[StreamEvent]:
        if self._tools:
            yield from self._opened(token.choice)
            yield from self._deltas(token.choice, self._choices[token.choice].parser.feed(token.text))
        elif token.logprob is not None:
            # Also without text: a token may end within a character.
            yield from self._opened(token.choice)
            logprobs = {"content": [common.logprob_of(token.piece, token.logprob)]}
            yield self._chunk(token.choice, {"content": token.text}, logprobs=logprobs)
        elif token.text:
            yield from self._opened(token.choice)
            yield self._chunk(token.choice, {"content": token.text})

    def end(self, choice: int, answer: Answer) -> Iterable[StreamEvent]:
        yield from self._opened(choice)
        state, finish = self._choices[choice], common.finish_reason(answer)
        yield from self._deltas(choice, state.parser.finish())
        state.finish = "tool_calls" if state.calls and finish == "stop" else finish
        yield self._chunk(choice, {}, finish=state.finish)

    def done(self, answers: list[Answer]) -> Iterable[StreamEvent]:
        if self._usage:
            yield StreamEvent({**self._chunk_head(), "choices": [], **common.totals(answers)})
        yield StreamEvent("[DONE]")

    def failed(self, error: LlamboError) -> Iterable[StreamEvent]:
        return [StreamEvent(error_body(error, "openai"))]

    def body(self, answers: list[Answer]) -> JsonObject:
        choices = [
            {
                "index": number,
                "message": self._choices[number].message(answer),
                "logprobs": {"content": common.logprobs_of(answer)} if answer.logprobs else None,
                "finish_reason": self._choices[number].finish,
            }
            for number, answer in enumerate(answers)
        ]
        return {**self._chunk_head(), "object": "chat.completion", "choices": choices, **common.totals(answers)}

    def _opened(self, choice: int) -> list[StreamEvent]:
        if choice in self._choices:
            return []
        self._choices[choice] = _Choice(parser_of(self._tools, f"{self._head.id}:{choice}", "call_"))
        return [self._chunk(choice, {"role": "assistant", "content": ""})]

    def _deltas(self, choice: int, deltas: list[Delta]) -> Iterable[StreamEvent]:
        for delta in deltas:
            if (change := self._choices[choice].add(delta)) is not None:
                yield self._chunk(choice, change)

    def _chunk(
        self, choice: int, delta: JsonObject, *, logprobs: JsonObject | None = None, finish: str | None = None
    ) -> StreamEvent:
        one = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return StreamEvent({**self._chunk_head(), "choices": [one]})

    def _chunk_head(self) -> JsonObject:
        head = self._head
        return {
            "id": f"chatcmpl-{head.id}",
            "object": "chat.completion.chunk",
            "created": head.created,
            "model": head.model,
        }
