"""Turns of identities: of those that wait in one class, each gets a turn before one of them gets its second.

One that has as many requests running as it may (`max_in_flight`) is passed over.

Share    what one identity has waiting
Circle   the shares of one class, in the order of their turns
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING

from llambo.broker.records.request import Request, RequestState

if TYPE_CHECKING:
    from llambo.broker.records.queue import Line


class Share:
    """What one identity has waiting in one class. Entries of requests that left are skipped when met."""

    __slots__ = ("count", "gone", "heap", "held_at", "line", "placed")

    def __init__(self, line: Line) -> None:
        self.line = line
        self.count = 0
        #: How many were put here, and have left, ever.
        self.placed = self.gone = 0
        #: How many turns the circle had given when this identity was held back.
        self.held_at = 0
        self.heap: list[tuple[int, int, Request]] = []

    def put(self, request: Request, due: int) -> None:
        self.count += 1
        self.placed += 1
        request.place.share, request.place.number = self, self.placed
        heapq.heappush(self.heap, (due, request.place.ticket, request))

    def first(self) -> Request:
        """Only while `count` is not 0."""
        while True:
            _, ticket, request = self.heap[0]
            if request.state is RequestState.WAITING and request.place.ticket == ticket:
                return request
            heapq.heappop(self.heap)

    def before(self, request: Request) -> int:
        """How many are served before this one: exact while none overtakes."""
        return max(0, min(request.place.number - self.gone, self.count) - 1)

    def overdue(self, now_ms: int) -> Iterator[Request]:
        """Those that were due until now, without a look at the others."""
        heap, places = self.heap, [0]
        while places:
            at = places.pop()
            if at < len(heap) and heap[at][0] <= now_ms:
                places += (2 * at + 1, 2 * at + 2)
                _, ticket, request = heap[at]
                if request.state is RequestState.WAITING and request.place.ticket == ticket:
                    yield request

    def __iter__(self) -> Iterator[Request]:
        for _, ticket, request in self.heap:
            if request.state is RequestState.WAITING and request.place.ticket == ticket:
                yield request


class Circle:
    """The identities that wait in one class, in the order of their turns. None has an empty share."""

    __slots__ = ("_held", "_open", "_sizes", "count", "served", "turn")

    def __init__(self) -> None:
        self.count = 0
        #: Turns that were given, ever.
        self.served = 0
        #: When the class as a whole has its next turn.
        self.turn = 0.0
        self._open: OrderedDict[str, Share] = OrderedDict()
        #: Those that have as many running as they may. `readmit` puts them back: where they were, if none has had a
        #: turn meanwhile, and otherwise at the end of the circle.
        self._held: dict[str, Share] = {}
        #: How many of `_open` have so many waiting: that is what `before` needs, and cheap to keep.
        self._sizes: dict[int, int] = {}

    def put(self, request: Request, due: int, line: Line) -> None:
        owner = request.owner
        share = self._open.get(owner) or self._held.get(owner)
        if share is None:
            share = self._open[owner] = Share(line)
        share.put(request, due)
        self.count += 1
        if owner in self._open:
            self._resize(share.count - 1, share.count)

    def _resize(self, before: int, after: int) -> None:
        sizes = self._sizes
        if before:
            sizes[before] -= 1
            if not sizes[before]:
                del sizes[before]
        if after:
            sizes[after] = sizes.get(after, 0) + 1

    def first(self) -> Request | None:
        while self._open:
            owner = next(iter(self._open))
            request = self._open[owner].first()
            if not request.account.full:
                return request
            share = self._held[owner] = self._open.pop(owner)
            share.held_at = self.served
            self._resize(share.count, 0)
        return None

    def left(self, request: Request, served: bool) -> None:
        owner = request.owner
        self.count -= 1
        self.served += served
        if owner in self._open:
            left = request.place.share.count
            self._resize(left + 1, left)
        if not request.place.share.count:
            self._open.pop(owner, None)
            self._held.pop(owner, None)
        elif served and len(self._open) > 1 and owner in self._open:
            self._open.move_to_end(owner)

    def readmit(self, owners: Set[str]) -> bool:
        """One of their requests is done, or they may have more. They keep the order in which they were held back.

        False: none of them was.
        """
        held = owners & self._held.keys()
        back = [owner for owner in self._held if owner in held] if len(held) > 1 else list(held)
        for owner in back:
            share = self._open[owner] = self._held.pop(owner)
            self._resize(0, share.count)
        for owner in reversed(back):
            if self._open[owner].held_at == self.served:
                self._open.move_to_end(owner, last=False)
        return bool(back)

    def before(self, request: Request) -> int:
        """About how many of this class: all others have a turn for each of its own identity up to this one."""
        rank = request.place.share.before(request)
        own = request.owner in self._open
        if len(self._open) == own:
            return rank
        turns = rank + 1
        others = sum(min(size, turns) * shares for size, shares in self._sizes.items()) - own * turns
        return rank + others

    def overdue(self, now_ms: int) -> Iterator[Request]:
        for share in (*self._open.values(), *self._held.values()):
            yield from share.overdue(now_ms)

    def __iter__(self) -> Iterator[Request]:
        for share in (*self._open.values(), *self._held.values()):
            yield from share
