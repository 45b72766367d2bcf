"""`/v1/chat/completions`: what it reads, and what it answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from llambo.gateway import openai_common as common
from llambo.gateway.asking import About, Ask, Event, Prepared, Token, encode
from llambo.gateway.problems import FieldError, body
from llambo.mesh import limits
from llambo.mesh.client_stream import Answer
from llambo.mesh.errors import LlamboError

MESSAGES = 4_096
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


class NamedFunction(msgspec.Struct):
    name: NAME


class Named(msgspec.Struct):
    function: NamedFunction
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
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Named | None = None
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
    options["sampling"] = sampling
    options["form"] = "messages"
    prompt = encode([_told(number, message) for number, message in enumerate(asked.messages)]).decode()
    renderer = ChatRenderer(usage=common.wants_usage(asked)) if asked.stream else None
    return Prepared(Ask(prompt, options, asked.n or 1), renderer, whole)


def _told(number: int, message: Message) -> dict[str, Any]:
    """As the model's template knows it."""
    return {"role": "system" if message.role == "developer" else message.role, "content": _text(number, message)}


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
    def __init__(self, *, usage: bool) -> None:
        self._usage = usage
        self._about = About("", 0, "")
        self._begun: set[int] = set()

    def begin(self, about: About) -> Iterable[Event]:
        self._about = about
        return ()

    def token(self, token: Token) -> Iterable[Event]:
        logprob = token.logprob
        logprobs = {"content": [common.logprob_of(token.piece, logprob)]} if logprob is not None else None
        if not token.text and logprobs is None:
            return ()
        return [*self._opened(token.choice), self._chunk(token.choice, {"content": token.text}, logprobs=logprobs)]

    def end(self, choice: int, answer: Answer) -> Iterable[Event]:
        return [*self._opened(choice), self._chunk(choice, {}, finish=common.ending(answer))]

    def done(self, answers: list[Answer]) -> Iterable[Event]:
        if self._usage:
            yield Event(encode({**self._head(), "choices": [], "usage": common.usage(answers),
                                "llambo": common.story(answers)}))  # fmt: skip
        yield Event(b"[DONE]")

    def failed(self, error: LlamboError) -> Iterable[Event]:
        return [Event(encode(body(error, "openai")))]

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


def whole(about: About, answers: list[Answer]) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{about.id}",
        "object": "chat.completion",
        "created": about.created,
        "model": about.model,
        "choices": [_choice(number, answer) for number, answer in enumerate(answers)],
        "usage": common.usage(answers),
        "llambo": common.story(answers),
    }


def _choice(number: int, answer: Answer) -> dict[str, Any]:
    return {
        "index": number,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": {"content": common.logprobs_of(answer)} if answer.logprobs else None,
        "finish_reason": common.ending(answer),
    }
