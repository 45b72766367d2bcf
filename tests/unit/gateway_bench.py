"""The APIs without a gateway: bodies are read as the gateway reads them, and answers are given to the renderers."""

from __future__ import annotations

import codecs
import json
import random
from typing import Any, NamedTuple, TypeVar

import msgspec

from llambo.gateway.answers.api import AnswerHead, Parsed, Renderer, StreamEvent, Token, encode
from llambo.gateway.answers.api_errors import decode_error
from llambo.gateway.apis import responses
from llambo.gateway.apis.response_store import ResponseStore
from llambo.gateway.apis.responses import ResponsesRequest
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.tokens import Logprob
from llambo.mesh.wire.tool_calls import CallArguments, CallBegun, Content, ToolCalls

T = TypeVar("T")
FUNCTION = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
#: Answers with and without calls, whole and cut.
TEXTS = [
    "",
    "plain text",
    f"Let me see. {CALL}\n{CALL}",
    CALL,
    f"{CALL} and then",
    CALL[:50],
    "<tool_ca",
    "a < b",
]
HEAD = AnswerHead("0123456789abcdef" * 2, 1_700_000_000, "tiny")


def read(kind: type[T], body: dict[str, Any]) -> T:
    try:
        return msgspec.json.decode(json.dumps(body), type=kind)
    except msgspec.MsgspecError as error:
        raise decode_error(error) from error


def ready(store: ResponseStore | None = None, owner: str = "", /, **body: Any) -> Parsed:
    """A request to `/v1/responses`."""
    asked = read(ResponsesRequest, {"model": "tiny", "input": "hi", **body})
    return responses.parse(asked, 2_048, ResponseStore() if store is None else store, owner)


def prompt_of(parsed: Parsed) -> dict[str, Any]:
    """Its messages, and its tools if the model gets any, in either form."""
    found = json.loads(parsed.submission.prompt)
    assert parsed.submission.options["form"] == ("messages" if isinstance(found, list) else "chat")
    return {"messages": found} if isinstance(found, list) else dict(found)


def answer(
    text: str, reason: m.Reason = "stop", *, stop: str = "", tokens: int = 7, logprobs: list[Logprob] | None = None,
    pieces: list[bytes] | None = None,
) -> Answer:  # fmt: skip
    """Of a prompt of ten tokens, four of which were in a cache."""
    return Answer(
        text, list(range(tokens)), reason, m.Usage(10, 4, 1.0, 2.0), "w0", 1, HEAD.id, 3,
        list(logprobs or []), pieces or [], stop,
    )  # fmt: skip


def play(renderer: Renderer, tokens: list[Token], whole: Answer) -> list[StreamEvent]:
    events = list(renderer.begin(HEAD))
    for token in tokens:
        events += renderer.token(token)
    events += renderer.end(0, whole)
    return events + list(renderer.done([whole]))


def events(parsed: Parsed, tokens: list[Token], whole: Answer) -> list[StreamEvent]:
    return play(parsed.renderer, tokens, whole)


def whole(parsed: Parsed, answer: Answer) -> Any:
    """The body of an answer that is not streamed."""
    if answer.logprobs:
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        likely = zip(answer.pieces, answer.logprobs, strict=True)
        tokens = [Token(0, decode(piece), at, piece, logprob) for at, (piece, logprob) in enumerate(likely)]
    else:
        tokens = tokens_of(answer.text)
    play(parsed.renderer, tokens, answer)
    return parsed.renderer.body([answer])


def tokens_of(*texts: str) -> list[Token]:
    return [Token(0, text, number, text.encode()) for number, text in enumerate(texts)]


def cut(text: str, seed: int) -> list[Token]:
    """In pieces of at most eight characters, some of them empty."""
    chance = random.Random(seed)
    texts, at = [], 0
    while at < len(text):
        length = chance.choice((0, 1, 1, 2, 3, 5, 8))
        texts.append(text[at : at + length])
        at += length
    return tokens_of(*texts)


def payloads(events: list[StreamEvent]) -> list[dict[str, Any]]:
    """The data of each event; the type in it is the name of the event."""
    found = [json.loads(encode(event.data)) for event in events]
    assert [event.name for event in events] == [each["type"] for each in found]
    return found


class Call(NamedTuple):
    id: str
    name: str
    #: JSON text.
    arguments: str


def collect(text: str, seed: str, *, prefix: str = "call_") -> tuple[str, list[Call]]:
    """The content and the calls of an answer. Of a call that was cut, what arrived."""
    parser = ToolCalls(seed, prefix=prefix)
    content: list[str] = []
    calls: list[Call] = []
    for delta in [*parser.feed(text), *parser.finish()]:
        match delta:
            case Content(more):
                content.append(more)
            case CallBegun(_, id, name):
                calls.append(Call(id, name, ""))
            case CallArguments(index, more):
                calls[index] = calls[index]._replace(arguments=calls[index].arguments + more)
    return "".join(content), calls
