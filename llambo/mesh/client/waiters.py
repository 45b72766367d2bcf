"""The callers that wait for a client: streams, submits, cancels and queries, and what reaches them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from llambo.mesh.client import client_events as e
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import ErrorInfo, LlamboError
from llambo.mesh.wire.tokens import Logprob

T = TypeVar("T")

#: Submitted requests that are remembered.
SUBMITTED, SUBMITTED_BYTES = 1_000, 16 * 2**20


class RequestReader(Protocol):
    """Who reads what a request brings: a stream, or a collector of a result."""

    def deliver(self, ids: list[int], pieces: list[bytes], logprobs: Sequence[Logprob | None]) -> None: ...
    def place(self, ahead: int, model: str) -> None: ...
    def end(self, end: m.End) -> None: ...
    def fail(self, error: LlamboError) -> None: ...


class Waiters:
    def __init__(self, error_of: Callable[[ErrorInfo], LlamboError]) -> None:
        self.streams: dict[bytes, RequestReader] = {}
        #: Those who wait for a word about a request without reading it: submits for their place, cancels for the end.
        self.submits: dict[bytes, asyncio.Future[None]] = {}
        self.cancels: dict[bytes, asyncio.Future[m.End]] = {}
        self.questions: dict[int, asyncio.Future[bytes]] = {}
        #: What was submitted to run by itself, for who attaches to it later; the oldest go first.
        self.submitted: OrderedDict[bytes, tuple[m.InferenceRequest, bytes]] = OrderedDict()
        self._submitted_bytes = 0
        self._error_of = error_of

    def remember(self, request: m.InferenceRequest, prompt: bytes) -> None:
        self.submitted[request.id] = request, prompt
        self._submitted_bytes += len(prompt)
        while len(self.submitted) > SUBMITTED or self._submitted_bytes > SUBMITTED_BYTES:
            _, (_, oldest) = self.submitted.popitem(last=False)
            self._submitted_bytes -= len(oldest)

    def deliver(
        self, delivery: e.DeliverTokens | e.ReportPlace | e.ReportEnd | e.ReportFailure | e.DeliverResult
    ) -> None:
        match delivery:
            case e.DeliverTokens(id, ids, pieces, logprobs):
                if (stream := self.streams.get(id)) is not None:
                    stream.deliver(ids, pieces, logprobs)
            case e.ReportPlace(id, ahead, model):
                if (stream := self.streams.get(id)) is not None:
                    stream.place(ahead, model)
                resolve(self.submits.get(id), None)
            case e.ReportEnd(id, end):
                if (stream := self.streams.pop(id, None)) is not None:
                    stream.end(end)
                resolve(self.submits.get(id), None)
                resolve(self.cancels.pop(id, None), end)
            case e.ReportFailure(key, info):
                self.fail(key, self._error_of(info))
            case e.DeliverResult(query, data):
                resolve(self.questions.get(query), data)

    def fail(self, key: bytes | int, error: LlamboError) -> None:
        if isinstance(key, int):
            reject(self.questions.get(key), error)
            return
        if (stream := self.streams.pop(key, None)) is not None:
            stream.fail(error)
        reject(self.submits.get(key), error)
        reject(self.cancels.pop(key, None), error)

    def fail_all(self, error: LlamboError) -> None:
        for id in {*self.streams, *self.submits, *self.cancels}:
            self.fail(id, error)
        for query in list(self.questions):
            self.fail(query, error)


def resolve(future: asyncio.Future[T] | None, value: T) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def reject(future: asyncio.Future[T] | None, error: LlamboError) -> None:
    if future is not None and not future.done():
        future.set_exception(error)
