"""What callers of a task receive: its whole result."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tasks
from llambo.mesh.wire.errors import Code, LlamboError, printable
from llambo.mesh.wire.tokens import Logprob

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The tokens of a text."""

    #: Their ids.
    ids: list[int]
    #: The text of each, as bytes, because a character may be split across tokens.
    pieces: list[bytes]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of texts."""

    #: One for each text, in the same order.
    vectors: list[list[float]]
    #: The number of tokens of each text.
    tokens: list[int]
    #: How the vectors of the tokens of a text were combined: "mean", "cls" (that of the first token) or "last".
    pooling: str
    #: The model that made them.
    model: str = ""
    #: A fake engine made them up. False as well if the broker did not report which model it was.
    fake: bool = False


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """A document with its score."""

    #: Its place among the documents that were given, from 0.
    index: int
    #: How well it fits the query: from 0 to 1, unless raw scores were asked for.
    score: float
    #: As it was given.
    document: str


@dataclass(frozen=True, slots=True)
class Ranking:
    """Documents by how well they fit a query."""

    #: The best first; as many as were asked for.
    results: list[RankedDocument]
    #: The number of tokens that were read for each document, in the order in which they were given.
    tokens: list[int]
    #: The model that made the scores.
    model: str = ""
    #: A fake engine made them up. False as well if the broker did not report which model it was.
    fake: bool = False


class Collector:
    """The pieces of the result of a task, and the whole result when it has ended."""

    def __init__(self, on_wait: Callable[[str], None] | None = None) -> None:
        self.result: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._pieces: list[bytes] = []
        self._on_wait = on_wait
        self.model = ""
        #: What is in the result is made up.
        self.fake = False

    def _deliver(self, ids: list[int], pieces: list[bytes], logprobs: Sequence[Logprob | None]) -> None:
        self._pieces += pieces

    def _set_place(self, ahead: int, model: str, *, fake: bool) -> None:
        """Its place in the queue is not shown."""
        self.model, self.fake = model, fake

    def _set_note(self, note: str) -> None:
        if self._on_wait is not None and note:
            self._on_wait(printable(note))

    def _set_end(self, end: m.End) -> None:
        if end.reason == "stop":
            self._settle(lambda: self.result.set_result(b"".join(self._pieces)))
        elif end.error is not None:
            self._set_error(LlamboError.of(end.error))
        else:
            self._set_error(LlamboError(Code.CANCELLED, f"request {end.id.hex()} was cancelled"))

    def _set_error(self, error: LlamboError) -> None:
        self._settle(lambda: self.result.set_exception(error))

    def _settle(self, settle: Callable[[], None]) -> None:
        if not self.result.done():
            settle()


def decoded(data: bytes, kind: type[T], what: str) -> T:
    """A result of a worker or broker, checked: it may have sent anything."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise LlamboError(Code.BAD_MESSAGE, f"{what} cannot be read: {error}") from error


def embeddings_of(found: tasks.EmbedResult, dimensions: int | None, by: Collector) -> Embeddings:
    try:
        vectors = tasks.vectors_of(found)
    except ValueError as error:
        raise LlamboError(Code.BAD_MESSAGE, f"the result of embed cannot be read: {error}") from error
    if dimensions is not None:
        if not 0 < dimensions <= found.size:
            text = f"{dimensions} dimensions; the vectors of this model have {found.size}"
            raise LlamboError(Code.BAD_REQUEST, text, hint=f"ask for 1 to {found.size}")
        vectors = [tasks.shortened(vector, dimensions, normalized=found.normalized) for vector in vectors]
    return Embeddings(vectors, found.tokens, found.pooling, by.model, by.fake)


def ranking_of(found: tasks.RerankResult, documents: list[str], top_n: int | None, by: Collector) -> Ranking:
    if len(found.scores) != len(documents) or len(found.tokens) != len(documents):
        text = f"{len(found.scores)} scores for {len(documents)} documents"
        raise LlamboError(Code.BAD_MESSAGE, f"the result of rerank cannot be read: {text}")
    ranked = list(map(RankedDocument, range(len(documents)), found.scores, documents))
    ranked.sort(key=lambda each: (-each.score, each.index))
    return Ranking(ranked[:top_n], found.tokens, by.model, by.fake)
