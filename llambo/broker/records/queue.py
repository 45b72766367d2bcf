"""Requests that wait for a slot: bounded in count and bytes, in order of class, identity and deadline.

Between classes turns are shared by weight, so that a flood of interactive requests slows batch work down but does not
stop it. Within a class the identities that wait take turns, so that nobody's first request waits for another one's
thousandth. Within an identity the most urgent goes first: a request without a deadline of its own has the one that the
queue's age limit gives it, so nothing starves.

An identity with as many requests at work as it may have is passed over until one of them is done. A request that lost
its worker goes before all others and is exempt from the bounds: it has been admitted once.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate

from llambo.broker.records.request import Request, RequestState

#: Turns each class gets while all of them wait.
WEIGHTS = {"interactive": 16, "normal": 4, "batch": 1}


class Share:
    """What one identity has waiting in one class. Entries of requests that left are skipped when met."""

    __slots__ = ("count", "gone", "heap", "line", "placed")

    def __init__(self, line: Line) -> None:
        self.line = line
        self.count = 0
        #: How many were put here, and have left, ever.
        self.placed = self.gone = 0
        self.heap: list[tuple[int, int, Request]] = []

    def put(self, request: Request, due: int) -> None:
        self.count += 1
        self.placed += 1
        request.share, request.place = self, self.placed
        heapq.heappush(self.heap, (due, request.ticket, request))

    def first(self) -> Request:
        """Ask only if somebody waits."""
        while True:
            _, ticket, request = self.heap[0]
            if request.state is RequestState.WAITING and request.ticket == ticket:
                return request
            heapq.heappop(self.heap)

    def before(self, request: Request) -> int:
        """How many are served before this one: exact while nobody overtakes."""
        return max(0, min(request.place - self.gone, self.count) - 1)

    def __iter__(self) -> Iterator[Request]:
        for _, ticket, request in self.heap:
            if request.state is RequestState.WAITING and request.ticket == ticket:
                yield request


class Circle:
    """The identities that wait in one class, in the order of their turns. Each has somebody waiting."""

    __slots__ = ("_held", "_open", "_sums", "count", "turn")

    def __init__(self) -> None:
        self.count = 0
        #: When the class as a whole has its next turn.
        self.turn = 0.0
        self._open: OrderedDict[str, Share] = OrderedDict()
        #: Those that have as many at work as they may. They are put back by `ease`, at the end of the circle.
        self._held: dict[str, Share] = {}
        #: How many wait for each of `_open`, sorted, and the sums of that; None: it is not known now.
        self._sums: tuple[list[int], list[int]] | None = None

    def put(self, request: Request, due: int, line: Line) -> None:
        owner = request.owner
        share = self._open.get(owner) or self._held.get(owner)
        if share is None:
            share = self._open[owner] = Share(line)
        share.put(request, due)
        self.count += 1
        self._sums = None

    def first(self) -> Request | None:
        while self._open:
            owner = next(iter(self._open))
            request = self._open[owner].first()
            if not request.account.full:
                return request
            self._held[owner] = self._open.pop(owner)
            self._sums = None
        return None

    def left(self, request: Request, served: bool) -> None:
        owner = request.owner
        self.count -= 1
        self._sums = None
        if not request.share.count:
            self._open.pop(owner, None)
            self._held.pop(owner, None)
        elif served and len(self._open) > 1 and owner in self._open:
            self._open.move_to_end(owner)

    def ease(self, owner: str) -> bool:
        """One of its requests is done, or it may have more. False: it was not held back."""
        share = self._held.pop(owner, None)
        if share is None:
            return False
        self._open[owner] = share
        self._sums = None
        return True

    def before(self, request: Request) -> int:
        """About how many of this class: all others have a turn for each of its own identity up to this one."""
        rank = request.share.before(request)
        own = request.owner in self._open
        if len(self._open) == own:
            return rank
        if self._sums is None:
            counts = sorted(share.count for share in self._open.values())
            self._sums = counts, list(accumulate(counts, initial=0))
        counts, sums = self._sums
        turns = rank + 1
        few = bisect_right(counts, turns)
        return rank + sums[few] + turns * (len(counts) - few) - own * turns

    def __iter__(self) -> Iterator[Request]:
        for share in (*self._open.values(), *self._held.values()):
            yield from share


class Line:
    """The requests that wait for one model."""

    def __init__(self) -> None:
        self.count = 0
        #: Those that have lost a worker, whosever they are.
        self._front = Share(self)
        self._circles = {name: Circle() for name in WEIGHTS}
        self._now = 0.0

    def put(self, request: Request, due: int) -> None:
        self.count += 1
        if request.attempt:
            self._front.put(request, request.submitted_at)
            return
        circle = self._circles[request.priority]
        if not circle.count:
            circle.turn = max(circle.turn, self._now)
        circle.put(request, due, self)

    def first(self) -> Request | None:
        """Whose turn it is. It stays in line until `left` is called."""
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
        share = request.share
        share.count -= 1
        share.gone += 1
        if share is self._front:
            return
        served = request.state is RequestState.DISPATCHED
        circle = self._circles[request.priority]
        circle.left(request, served)
        if served:
            self._now = circle.turn
            circle.turn += 1.0 / WEIGHTS[request.priority]

    def ease(self, owner: str) -> bool:
        return sum(circle.ease(owner) for circle in self._circles.values()) > 0

    def ahead(self, request: Request) -> int:
        share = request.share
        if share.count == self.count or share is self._front:
            return share.before(request)
        weight = WEIGHTS[request.priority]
        ahead = self._circles[request.priority].before(request)
        turns = ahead + 1
        for name, circle in self._circles.items():
            if circle.count and name != request.priority:
                ahead += min(circle.count, turns * WEIGHTS[name] // weight)
        return self._front.count + ahead

    def __iter__(self) -> Iterator[Request]:
        yield from self._front
        for circle in self._circles.values():
            yield from circle


class WaitingRoom:
    """All lines together, with their bounds."""

    def __init__(self, max_requests: int, max_bytes: int, max_age_ms: int) -> None:
        self.count = 0
        self.bytes = 0
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
        request.account.queued += 1
        self.count += 1
        self.bytes += len(request.prompt)
        due = now_ms + self._max_age_ms
        lane = request.lane
        line = self.lines.get(lane)
        if line is None:
            line = self.lines[lane] = Line()
        line.put(request, min(due, request.deadline_at or due))

    def left(self, request: Request) -> None:
        """Call it after the request has made its step out of WAITING."""
        request.account.queued -= 1
        self.count -= 1
        self.bytes -= len(request.prompt)
        lane = request.lane
        line = self.lines[lane]
        line.left(request)
        if not line.count:
            del self.lines[lane]

    def first(self, lane: str) -> Request | None:
        line = self.lines.get(lane)
        return line.first() if line else None

    def ease(self, owner: str) -> list[str]:
        """This identity may have another request at work: the lanes in which one of its own was held back."""
        return [lane for lane, line in self.lines.items() if line.ease(owner)]

    def ahead(self, request: Request) -> int:
        """About how many are served before this one, as things stand now."""
        return request.share.line.ahead(request)

    def expired(self, now_ms: int) -> list[Request]:
        """Those that have waited for too long, also in their second line after losing a worker."""
        limit = now_ms - self._max_age_ms
        return [r for line in self.lines.values() for r in line if r.queued_at <= limit]
