"""Requests that wait for a slot: bounded in count and bytes, ordered by class and by deadline.

Within a class the most urgent goes first: a request without a deadline of its own has the one that the
queue's age limit gives it, so nothing starves. Between classes turns are shared by weight, so that a flood
of interactive requests slows batch work down but does not stop it. A request that lost its worker goes
before all others and is exempt from the bounds: it has been admitted once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from llambo.broker.requests import Request, RequestState

#: Turns each class gets while all of them wait.
WEIGHTS = {"interactive": 16, "normal": 4, "batch": 1}


class Line:
    """The requests that wait for one model. Entries of requests that left are skipped when met."""

    def __init__(self) -> None:
        self.count = 0
        self._front: list[tuple[int, int, Request]] = []
        self._classes: dict[str, list[tuple[int, int, Request]]] = {name: [] for name in WEIGHTS}
        self._turn: dict[str, float] = dict.fromkeys(WEIGHTS, 0.0)
        self._now = 0.0

    def put(self, request: Request, due: int) -> None:
        self.count += 1
        if request.attempt:
            heapq.heappush(self._front, (request.submitted_at, request.ticket, request))
            return
        heap = self._classes[request.priority]
        if not heap:
            self._turn[request.priority] = max(self._turn[request.priority], self._now)
        heapq.heappush(heap, (due, request.ticket, request))

    def first(self) -> Request | None:
        """Whose turn it is. It stays in line until `left` is called."""
        front = _live(self._front)
        if front is not None:
            return front
        best: Request | None = None
        for name, heap in self._classes.items():
            head = _live(heap)
            if head is not None and (best is None or self._turn[name] < self._turn[best.priority]):
                best = head
        return best

    def left(self, request: Request) -> None:
        """The request is not waiting any more; if it was dispatched, its class has had a turn."""
        self.count -= 1
        if request.state is RequestState.DISPATCHED and request.attempt <= 1:
            self._now = self._turn[request.priority]
            self._turn[request.priority] += 1.0 / WEIGHTS[request.priority]

    def __iter__(self) -> Iterator[Request]:
        for heap in (self._front, *self._classes.values()):
            for _, ticket, request in heap:
                if request.state is RequestState.WAITING and request.ticket == ticket:
                    yield request


def _live(heap: list[tuple[int, int, Request]]) -> Request | None:
    while heap:
        _, ticket, request = heap[0]
        if request.state is RequestState.WAITING and request.ticket == ticket:
            return request
        heapq.heappop(heap)
    return None


class WaitingRoom:
    """All lines together, with their bounds."""

    def __init__(self, max_requests: int, max_bytes: int, max_age_ms: int) -> None:
        self.count = 0
        self.bytes = 0
        self.served = 0
        #: One for each lane that is waited for.
        self.lines: dict[str, Line] = {}
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._max_age_ms = max_age_ms
        self._tickets = 0

    def full(self, prompt_bytes: int) -> bool:
        return self.count >= self._max_requests or self.bytes + prompt_bytes > self._max_bytes

    def put(self, request: Request, now_ms: int) -> None:
        self._tickets += 1
        request.ticket = self._tickets
        request.queued_at = now_ms
        self.count += 1
        self.bytes += len(request.prompt)
        due = now_ms + self._max_age_ms
        self._line(request.lane).put(request, min(due, request.deadline_at or due))

    def left(self, request: Request) -> None:
        """Call it after the request has made its step out of WAITING."""
        self.count -= 1
        self.bytes -= len(request.prompt)
        self.served += 1
        line = self.lines[request.lane]
        line.left(request)
        if not line.count:
            del self.lines[request.lane]

    def first(self, lane: str) -> Request | None:
        line = self.lines.get(lane)
        return line.first() if line else None

    def ahead(self, request: Request) -> int:
        """About how many are served before this one: exact while nobody overtakes."""
        return max(0, min(request.ticket - self.served - 1, self.count - 1))

    def expired(self, now_ms: int) -> list[Request]:
        """Those that have waited for too long, also in their second line after losing a worker."""
        limit = now_ms - self._max_age_ms
        return [r for line in self.lines.values() for r in line if r.queued_at <= limit]

    def _line(self, lane: str) -> Line:
        return self.lines.setdefault(lane, Line())
