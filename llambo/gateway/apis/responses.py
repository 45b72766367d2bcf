"""OpenAI's `/v1/responses`: from a request to what is asked of the mesh, and from its tokens to events.

    response.created, response.in_progress
    response.output_item.added, ..., response.output_item.done      for each item
    response.completed, response.incomplete or response.failed

The events are counted, from 0, in `sequence_number`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llambo.gateway.answers.asking import About, Ask, Event, Prepared, Token, encode
from llambo.gateway.answers.problems import FieldError
from llambo.gateway.apis.common_fields import called, prompt_of
from llambo.gateway.apis.openai_common import logprob_of, logprobs_of
from llambo.gateway.apis.responses_input import (
    ResponsesRequest,
    choice_of,
    functions_of,
    options_of,
    refuse_what_is_not_here,
    told,
    turns_of,
)
from llambo.gateway.apis.responses_output import PREFIX, Items, Step, remembered, response, status_of
from llambo.gateway.apis.responses_store import Store
from llambo.gateway.apis.tool_calls import Content, Delta, Parser, deltas_of, parser_of
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.wire.errors import LlamboError

#: What is done with a response that is complete.
Keep = Callable[[dict[str, Any]], None]


def prepare(asked: ResponsesRequest, answer_tokens: int, store: Store, owner: str) -> Prepared:
    """`owner`: whose responses are in question."""
    refuse_what_is_not_here(asked)
    said = turns_of(asked, _before(asked, store, owner)).messages
    tools = functions_of(asked)
    calls = called(tools, choice_of(asked), asked.parallel_tool_calls)
    form, prompt = prompt_of(told(said, asked.instructions), tools, calls)
    options = options_of(asked, answer_tokens, form, calls)

    def keep(body: dict[str, Any]) -> None:
        if asked.store is not False:
            store.keep(owner, body, remembered(said, body["output"]))

    def whole(about: About, answers: list[Answer]) -> dict[str, Any]:
        body = whole_of(asked, about, answers[0], tools=bool(calls))
        keep(body)
        return body

    renderer = ResponsesRenderer(asked, keep, tools=bool(calls)) if asked.stream else None
    return Prepared(Ask(prompt, options), renderer, whole)


def _before(asked: ResponsesRequest, store: Store, owner: str) -> list[dict[str, Any]]:
    previous = asked.previous_response_id
    if not previous:
        return []
    try:
        return store.said(owner, previous)
    except LlamboError as error:
        raise FieldError("previous_response_id", f"previous_response_id: {error.text}") from error


def whole_of(asked: ResponsesRequest, about: About, answer: Answer, *, tools: bool) -> dict[str, Any]:
    items = Items(about.id)
    status = status_of(answer)
    for _ in items.add(deltas_of(answer.text, tools, about.id, PREFIX), logprobs_of(answer)):
        pass  # nobody watches it grow
    for _ in items.close(status):
        pass
    return response(asked, about, status, items.done, answer=answer)


class ResponsesRenderer:
    """`tools`: the answer may have calls in it. `keep` gets the response when it is complete."""

    def __init__(self, asked: ResponsesRequest, keep: Keep, *, tools: bool) -> None:
        self._asked, self._keep, self._tools = asked, keep, tools
        self._about = About("", 0, "")
        self._parser: Parser = parser_of(False, "", PREFIX)
        self._items = Items("")
        self._number = 0

    def begin(self, about: About) -> Iterable[Event]:
        self._about = about
        self._parser = parser_of(self._tools, about.id, PREFIX)
        self._items = Items(about.id)
        begun = {"response": response(self._asked, about, "in_progress", [])}
        return self._events(iter([("response.created", begun), ("response.in_progress", begun)]))

    def token(self, token: Token) -> Iterable[Event]:
        if token.logprob is None:
            return self._events(self._items.add(self._parser.feed(token.text), []))
        # Also of one that has no whole character: whoever asked for them wants all.
        told: list[Delta] = [Content(token.text)]
        return self._events(self._items.add(told, [logprob_of(token.piece, token.logprob)]))

    def end(self, choice: int, answer: Answer) -> Iterable[Event]:
        rest = self._events(self._items.add(self._parser.finish(), []))
        return [*rest, *self._events(self._items.close(status_of(answer)))]

    def done(self, answers: list[Answer]) -> Iterable[Event]:
        status = status_of(answers[0])
        body = response(self._asked, self._about, status, self._items.done, answer=answers[0])
        self._keep(body)
        return self._events(iter([(f"response.{status}", {"response": body})]))

    def failed(self, error: LlamboError) -> Iterable[Event]:
        body = response(self._asked, self._about, "failed", self._items.done, error=error)
        return self._events(iter([("response.failed", {"response": body})]))

    def _events(self, steps: Iterator[Step]) -> list[Event]:
        events = []
        for name, fields in steps:
            events.append(Event(encode({"type": name, "sequence_number": self._number, **fields}), name))
            self._number += 1
        return events
