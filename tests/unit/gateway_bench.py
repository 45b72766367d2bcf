"""An API of the gateway without one: bodies are read as the gateway reads them, and answers are played to renderers."""

from __future__ import annotations

import json
import random
from typing import Any, TypeVar

import msgspec

from llambo.gateway.answers.asking import About, Event, Prepared, Renderer, Token
from llambo.gateway.answers.problems import unread
from llambo.gateway.apis import responses
from llambo.gateway.apis.responses_input import ResponsesRequest
from llambo.gateway.apis.responses_store import Store
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.tokens import Logprob

T = TypeVar("T")
ABOUT = About("0123456789abcdef" * 2, 1_700_000_000, "tiny")


def read(kind: type[T], body: dict[str, Any]) -> T:
    try:
        return msgspec.json.decode(json.dumps(body), type=kind)
    except msgspec.MsgspecError as error:
        raise unread(error) from error


def ready(store: Store | None = None, owner: str = "", /, **body: Any) -> Prepared:
    """A request to `/v1/responses`."""
    asked = read(ResponsesRequest, {"model": "tiny", "input": "hi", **body})
    return responses.prepare(asked, 2_048, Store() if store is None else store, owner)


def prompt_of(prepared: Prepared) -> dict[str, Any]:
    """Its messages, and its tools if the model is told of any: whichever form it has."""
    found = json.loads(prepared.ask.prompt)
    assert prepared.ask.options["form"] == ("messages" if isinstance(found, list) else "chat")
    return {"messages": found} if isinstance(found, list) else dict(found)


def answer(
    text: str, reason: m.Reason = "stop", *, stop: str = "", tokens: int = 7, logprobs: list[Logprob] | None = None,
    pieces: list[bytes] | None = None,
) -> Answer:  # fmt: skip
    """Of a prompt of ten tokens, four of which were in a cache."""
    return Answer(
        text, list(range(tokens)), reason, m.Usage(10, 4, 1.0, 2.0), "w0", 1, ABOUT.id, 3,
        list(logprobs or []), pieces or [], stop,
    )  # fmt: skip


def play(renderer: Renderer, tokens: list[Token], whole: Answer) -> list[Event]:
    events = list(renderer.begin(ABOUT))
    for token in tokens:
        events += renderer.token(token)
    events += renderer.end(0, whole)
    return events + list(renderer.done([whole]))


def events(prepared: Prepared, tokens: list[Token], whole: Answer) -> list[Event]:
    assert prepared.renderer is not None, "it asks for a stream"
    return play(prepared.renderer, tokens, whole)


def tokens_of(*texts: str) -> list[Token]:
    return [Token(0, text, number, text.encode()) for number, text in enumerate(texts)]


def cut(text: str, seed: int) -> list[Token]:
    """In pieces of one to some characters, with empty ones between."""
    chance = random.Random(seed)
    texts, at = [], 0
    while at < len(text):
        length = chance.choice((0, 1, 1, 2, 3, 5, 8))
        texts.append(text[at : at + length])
        at += length
    return tokens_of(*texts)


def told(events: list[Event]) -> list[dict[str, Any]]:
    """What the events say; each has its own name as its type."""
    found = [json.loads(event.data) for event in events]
    assert [event.name for event in events] == [each["type"] for each in found]
    return found
