"""What OpenAI's `/v1/responses` answers.

    response.created, response.in_progress
    response.output_item.added, ..., response.output_item.done      for each item: a message or a function call
    response.completed, response.incomplete or response.failed

The events are counted, from 0, in `sequence_number`. The last one contains the whole response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llambo.gateway.answers.api import AnswerHead, StreamEvent, Token
from llambo.gateway.apis import openai_common as common
from llambo.gateway.apis.tool_calls import CallArguments, CallBegun, CallEnded, Content, Delta, Parser, parser_of
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.wire.errors import Code, LlamboError

#: OpenAI's codes for a response that failed after it had begun; any other error is `server_error`.
_FAILED_AS = {
    Code.OVER_LIMIT: "rate_limit_exceeded",
    Code.BUSY: "rate_limit_exceeded",
    Code.BAD_REQUEST: "invalid_prompt",
    Code.TOO_LONG: "invalid_prompt",
}

NamedFields = tuple[str, dict[str, Any]]


class ResponsesRenderer:
    """`echo`: the fields of a response that repeat the request. `keep` is called with the complete response.

    `tools`: the answer may contain calls.
    """

    def __init__(self, echo: dict[str, Any], keep: Callable[[dict[str, Any]], None], *, tools: bool) -> None:
        self._echo, self._keep, self._tools = echo, keep, tools
        self._head = AnswerHead("", 0, "")
        self._parser: Parser = parser_of(False, "", "")
        self._items = Items("")
        self._number = 0
        self._response: dict[str, Any] = {}

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
        self._keep(self._response)
        return self._events([(f"response.{status}", {"response": self._response})])

    def failed(self, error: LlamboError) -> Iterable[StreamEvent]:
        return self._events([("response.failed", {"response": self._response_now("failed", error=error)})])

    def body(self, answers: list[Answer]) -> dict[str, Any]:
        return self._response

    def _events(self, named: Iterable[NamedFields]) -> list[StreamEvent]:
        events = []
        for name, fields in named:
            events.append(StreamEvent({"type": name, "sequence_number": self._number, **fields}, name))
            self._number += 1
        return events

    def _response_now(
        self, status: str, *, answer: Answer | None = None, error: LlamboError | None = None
    ) -> dict[str, Any]:
        cost: dict[str, Any] = {"usage": None}
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
        self.done: list[dict[str, Any]] = []
        self._item: dict[str, Any] = {}
        self._parts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def add(self, deltas: list[Delta], logprobs: list[dict[str, Any]]) -> Iterator[NamedFields]:
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

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[NamedFields]:
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

    def _begin(self, item: dict[str, Any]) -> NamedFields:
        self._item = item
        added = {**item, "status": "in_progress"}
        return "response.output_item.added", {"output_index": len(self.done), "item": added}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item["id"], "output_index": len(self.done)}


def _status(answer: Answer) -> str:
    return "completed" if answer.reason == "stop" else "incomplete"


def _usage(answer: Answer) -> dict[str, Any]:
    usage = common.usage([answer])
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


def _why(answer: Answer) -> str | None:
    """OpenAI has no deadlines, and no reason for a context that is full before the maximum: both count as it."""
    return "max_output_tokens" if answer.reason in ("length", "deadline") else None


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _error(error: LlamboError) -> dict[str, Any]:
    return {"code": _FAILED_AS.get(error.code, "server_error"), "message": error.text}
