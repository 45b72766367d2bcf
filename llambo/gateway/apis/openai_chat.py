"""`/v1/chat/completions`: what it reads, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from llambo.gateway.answers.asking import About, Ask, Event, Prepared, Token, encode
from llambo.gateway.answers.problems import FieldError, body
from llambo.gateway.apis import openai_common as common
from llambo.gateway.apis.tool_calls import Arguments, Begun, Content, Delta, Ended, ToolCalls, collect
from llambo.gateway.apis.tools import chat_prompt, tool_options
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.wire import limits
from llambo.mesh.wire.conversation import MESSAGES
from llambo.mesh.wire.errors import LlamboError

NAME = Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]


class Part(msgspec.Struct):
    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct):
    name: NAME
    arguments: str = "{}"


class Called(msgspec.Struct):
    function: CalledFunction
    id: str = ""
    type: Literal["function"] = "function"


class Message(msgspec.Struct, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Called] | None = None
    tool_call_id: str | None = None


class Function(msgspec.Struct):
    name: NAME
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    function: Function
    type: Literal["function"] = "function"


class Schema(msgspec.Struct):
    schema: dict[str, Any]
    name: str = ""
    description: str = ""
    strict: bool | None = None


class Format(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class ChatRequest(common.Asked, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MESSAGES)]
    max_completion_tokens: common.Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    response_format: Format | None = None
    tools: Annotated[list[Tool], Meta(max_length=limits.TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


def prepare(asked: ChatRequest, answer_tokens: int) -> Prepared:
    options = common.options_of(asked, answer_tokens)
    sampling = options["sampling"] or {}
    if asked.max_completion_tokens is not None:
        options["max_tokens"] = asked.max_completion_tokens
    elif asked.max_tokens is None:
        sampling["fit"] = True
    if asked.logprobs:
        options["logprobs"] = asked.top_logprobs or 0
    elif asked.top_logprobs:
        raise FieldError("top_logprobs", "top_logprobs: needs logprobs to be true")
    sampling |= _format(asked)
    messages = [_told(number, message) for number, message in enumerate(asked.messages)]
    tools = [msgspec.to_builtins(tool) for tool in asked.tools or ()]
    calls = _tool_options(asked, tools)
    if calls and (asked.grammar or sampling.get("json_schema")):
        raise FieldError("tools", "tools: exclude a grammar and a JSON schema for the answer")
    options["sampling"] = {**sampling, **calls}
    if calls or any(message.role == "tool" or message.tool_calls for message in asked.messages):
        options["form"], prompt = "chat", chat_prompt(messages, tools, calls)
    else:
        options["form"], prompt = "messages", encode(messages).decode()
    renderer = ChatRenderer(usage=common.wants_usage(asked), tools=bool(calls)) if asked.stream else None
    made: Callable[[About, list[Answer]], Any] = partial(whole, bool(calls))
    return Prepared(Ask(prompt, options, asked.n or 1), renderer, made)


def _tool_options(asked: ChatRequest, tools: list[Any]) -> dict[str, Any]:
    try:
        return tool_options(tools, asked.tool_choice, asked.parallel_tool_calls)
    except LlamboError as error:
        raise FieldError(error.text.partition(":")[0], error.text) from error


def _told(number: int, message: Message) -> dict[str, Any]:
    """As the model's template knows it."""
    told: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    told["content"] = _text(number, message)
    if message.tool_calls:
        told["tool_calls"] = [msgspec.to_builtins(call) for call in message.tool_calls]
    more = {"name": message.name, "tool_call_id": message.tool_call_id}
    return told | {name: text for name, text in more.items() if text}


def _text(number: int, message: Message) -> str:
    content = message.content
    if not isinstance(content, list):
        return content or ""
    for at, part in enumerate(content):
        if part.type != "text" or part.text is None:
            field = f"messages[{number}].content[{at}]"
            raise FieldError(field, f"{field}: parts of type {part.type!r} cannot be read here, only text")
    return "".join(part.text or "" for part in content)


def _format(asked: ChatRequest) -> dict[str, Any]:
    wanted = asked.response_format
    if wanted is None or wanted.type == "text":
        return {}
    if asked.grammar or asked.json_schema:
        raise FieldError("response_format", "response_format: excludes grammar and json_schema")
    if wanted.type == "json_object":
        return {"json_schema": '{"type":"object"}'}
    if wanted.json_schema is None:
        raise FieldError("response_format.json_schema", "response_format.json_schema: is missing")
    return {"json_schema": common.schema_text(wanted.json_schema.schema)}


class ChatRenderer:
    def __init__(self, *, usage: bool, tools: bool) -> None:
        self._usage, self._tools = usage, tools
        self._about = About("", 0, "")
        self._begun: set[int] = set()
        self._calls: dict[int, ToolCalls] = {}

    def begin(self, about: About) -> Iterable[Event]:
        self._about = about
        return ()

    def token(self, token: Token) -> Iterable[Event]:
        logprob = token.logprob
        logprobs = {"content": [common.logprob_of(token.piece, logprob)]} if logprob is not None else None
        if self._tools:
            said = [self._delta(token.choice, delta) for delta in self._parser(token.choice).feed(token.text)]
            return [*self._opened(token.choice), *(event for event in said if event is not None)]
        if not token.text and logprobs is None:
            return ()
        return [*self._opened(token.choice), self._chunk(token.choice, {"content": token.text}, logprobs=logprobs)]

    def end(self, choice: int, answer: Answer) -> Iterable[Event]:
        yield from self._opened(choice)
        finish = common.ending(answer)
        if self._tools:
            parser = self._parser(choice)
            yield from (event for delta in parser.finish() if (event := self._delta(choice, delta)) is not None)
            finish = "tool_calls" if parser.count and finish == "stop" else finish
        yield self._chunk(choice, {}, finish=finish)

    def done(self, answers: list[Answer]) -> Iterable[Event]:
        if self._usage:
            yield Event(encode({**self._head(), "choices": [], "usage": common.usage(answers),
                                "llambo": common.story(answers)}))  # fmt: skip
        yield Event(b"[DONE]")

    def failed(self, error: LlamboError) -> Iterable[Event]:
        return [Event(encode(body(error, "openai")))]

    def _parser(self, choice: int) -> ToolCalls:
        found = self._calls.get(choice)
        if found is None:
            found = self._calls[choice] = ToolCalls(seed_of(self._about, choice))
        return found

    def _delta(self, choice: int, delta: Delta) -> Event | None:
        match delta:
            case Content(text):
                return self._chunk(choice, {"content": text})
            case Begun(index, id, name):
                called = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
                return self._chunk(choice, {"tool_calls": [called]})
            case Arguments(index, text):
                return self._chunk(choice, {"tool_calls": [{"index": index, "function": {"arguments": text}}]})
            case Ended():
                return None

    def _opened(self, choice: int) -> list[Event]:
        if choice in self._begun:
            return []
        self._begun.add(choice)
        return [self._chunk(choice, {"role": "assistant", "content": ""})]

    def _chunk(
        self, choice: int, delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> Event:
        told = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return Event(encode({**self._head(), "choices": [told]}))

    def _head(self) -> dict[str, Any]:
        about = self._about
        return {"id": f"chatcmpl-{about.id}", "object": "chat.completion.chunk", "created": about.created,
                "model": about.model}  # fmt: skip


def seed_of(about: About, choice: int) -> str:
    """What the ids of tool calls are made of."""
    return f"{about.id}:{choice}"


def whole(tools: bool, about: About, answers: list[Answer]) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{about.id}",
        "object": "chat.completion",
        "created": about.created,
        "model": about.model,
        "choices": [_choice(about, number, answer, tools) for number, answer in enumerate(answers)],
        "usage": common.usage(answers),
        "llambo": common.story(answers),
    }


def _choice(about: About, number: int, answer: Answer, tools: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    finish = common.ending(answer)
    if tools:
        text, calls = collect(answer.text, seed_of(about, number))
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
            finish = "tool_calls" if finish == "stop" else finish
    return {
        "index": number,
        "message": message,
        "logprobs": {"content": common.logprobs_of(answer)} if answer.logprobs else None,
        "finish_reason": finish,
    }
