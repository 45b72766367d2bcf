"""Requests that wait for a slot: new ones bounded in count and bytes, in order of class, identity and deadline.

Between classes turns are shared by weight, so that a flood of interactive requests slows batch work down but does not
stop it. Within a class the identities that wait take turns (fair_share.py), so that the first request of one does not
wait for the thousandth of another. Within an identity the most urgent goes first: a request without a deadline of its
own has the one that `queue_ms`, the queue's age limit, gives it, so nothing starves.

An identity with as many running requests as it may have is passed over until one of them is done. A request that was
dispatched before (its worker was lost, or refused it) goes before all others of its lane and is exempt from the bounds:
it has been admitted once. So is one that its client resumes, by the client's word (refusals.py).

A line is found by the request's lane, so nothing that the lane follows from may change while the request waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from llambo.broker.records.accounts import Account
from llambo.broker.records.fair_share import Circle, Share
from llambo.broker.records.request import Lane, Request, RequestState

#: Turns each class gets while all of them wait.
WEIGHTS = {"interactive": 16, "normal": 4, "batch": 1}


class Line:
    """The requests that wait in one lane."""

    def __init__(self) -> None:
        self.count = 0
        #: Those that were dispatched before, of all identities.
        self._front = Share(self)
        self._circles = {name: Circle() for name in WEIGHTS}
        self._now = 0.0

    def put(self, request: Request, due: int) -> None:
        self.count += 1
        if request.run.attempt:
            self._front.put(request, request.submitted_at)
            return
        circle = self._circles[request.asked.priority]
        if not circle.count:
            circle.turn = max(circle.turn, self._now)
        circle.put(request, due, self)

    def first(self) -> Request | None:
        """The request whose turn it is. It stays in line until `left` is called."""
        if self._front.count:
            return self._front.first()
        best: Request | None = None
        turn = 0.0
        for circle in self._circles.values():
            if circle.count and (best is None or circle.turn < turn):
                head = circle.first()
                if head is not None:
                    best, turn = head, circle.turn
        return best

    def left(self, request: Request) -> None:
        """The request is not waiting any more; if it was dispatched, its class and its identity have had a turn."""
        self.count -= 1
        share = request.place.share
        share.count -= 1
        share.gone += 1
        if share is self._front:
            return
        served = request.state is RequestState.DISPATCHED
        circle = self._circles[request.asked.priority]
        circle.left(request, served)
        if served:
            self._now = circle.turn
            circle.turn += 1.0 / WEIGHTS[request.asked.priority]

    def readmit(self, owners: Set[str]) -> bool:
        return sum(circle.readmit(owners) for circle in self._circles.values()) > 0

    def ahead(self, request: Request) -> int:
        share = request.place.share
        if share.count == self.count or share is self._front:
            return share.before(request)
        weight = WEIGHTS[request.asked.priority]
        ahead = self._circles[request.asked.priority].before(request)
        turns = ahead + 1
        for name, circle in self._circles.items():
            if circle.count and name != request.asked.priority:
                ahead += min(circle.count, turns * WEIGHTS[name] // weight)
        return self._front.count + ahead

    def overdue(self, now_ms: int) -> Iterator[Request]:
        """Those that may have waited for too long: all that have waited for `queue_ms` are among them."""
        yield from self._front  # in another order, and never many
        for circle in self._circles.values():
            yield from circle.overdue(now_ms)

    def __iter__(self) -> Iterator[Request]:
        yield from self._front
        for circle in self._circles.values():
            yield from circle


class RequestQueue:
    """All lines together, with their bounds."""

    def __init__(self, max_requests: int, max_bytes: int, queue_ms: int) -> None:
        self.count = 0
        self.bytes = 0
        #: One for each lane that is waited for.
        self.lines: dict[Lane, Line] = {}
        #: Accounts that may have another request running than before this event.
        self.eased: dict[str, Account] = {}
        #: Requests have begun, or ceased, to wait in a lane since placement was decided.
        self.turned = False
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._queue_ms = queue_ms
        self._tickets = 0

    def full(self, prompt_bytes: int) -> bool:
        return self.count >= self._max_requests or self.bytes + prompt_bytes > self._max_bytes

    def put(self, request: Request, now_ms: int) -> None:
        self._tickets += 1
        request.place.ticket = self._tickets
        request.place.queued_at = now_ms
        request.account.queued += 1
        self.count += 1
        self.bytes += len(request.prompt)
        due = now_ms + self._queue_ms
        lane = request.lane
        line = self.lines.get(lane)
        if line is None:
            line = self.lines[lane] = Line()
            self.turned = True
        line.put(request, min(due, request.deadline_at or due))

    def left(self, request: Request) -> None:
        """It waits in this line no more. If its state is DISPATCHED by now, its class and identity have had a turn."""
        request.account.queued -= 1
        self.count -= 1
        self.bytes -= len(request.prompt)
        lane = request.lane
        line = self.lines[lane]
        line.left(request)
        if not line.count:
            del self.lines[lane]
            self.turned = True

    def first(self, lane: Lane) -> Request | None:
        line = self.lines.get(lane)
        return line.first() if line else None

    def readmit(self) -> list[Lane]:
        """The lanes in which requests were held back that may be dispatched now, since their identity may have more."""
        owners = {name for name, account in self.eased.items() if not account.full}
        self.eased.clear()
        return [lane for lane, line in self.lines.items() if line.readmit(owners)] if owners else []

    def ahead(self, request: Request) -> int:
        """About how many are served before this one, as things stand now."""
        return request.place.share.line.ahead(request)

    def expired(self, now_ms: int) -> list[Request]:
        """Those that have waited for too long this time. A request that loses its worker begins a new wait."""
        limit = now_ms - self._queue_ms
        overdue = (request for line in self.lines.values() for request in line.overdue(now_ms))
        return [request for request in overdue if request.place.queued_at <= limit]
