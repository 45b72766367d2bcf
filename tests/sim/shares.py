"""Whether each identity gets what it may have and no more, seen from outside: by what a broker orders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from llambo.broker.events import ToWorker
from llambo.broker.records.request import Lane, Request, RequestState
from llambo.broker.records.state import State
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import Identity

#: Who waits for its turn sees each other identity have one before.
TURNS = 1
#: A lane, a class, and who waits there.
Place = tuple[Lane, str, str]


class Shares:
    def __init__(self) -> None:
        self._most: dict[str, int] = {}
        #: How many of each other identity have been given to workers while one waited for its turn.
        self._passed: dict[Place, Counter[str]] = {}
        self._waited: set[Place] = set()

    def begin(self, identities: Iterable[Identity]) -> None:
        """The broker has forgotten everything."""
        self._most.clear()
        self._passed.clear()
        self._waited.clear()
        self.allow(identities)

    def allow(self, identities: Iterable[Identity]) -> None:
        """What is with workers stays there when a limit becomes a lower one: the highest ever counts."""
        for identity in identities:
            most = identity.max_in_flight or 10**9
            self._most[identity.name] = max(most, self._most.get(identity.name, 0))

    def judge(self, state: State, actions: list[Any]) -> None:
        """After each event."""
        flying = Counter(r.owner for r in state.requests.values() if r.state is not RequestState.WAITING and _new(r))
        for name, count in flying.items():
            assert count <= self._most.get(name, 10**9), f"{name} has {count} with workers, more than it may"
        waiting = {_place(r) for r in state.requests.values() if _may_go(r)}
        for action in actions:
            if isinstance(action, ToWorker) and isinstance(action.message, m.Dispatch | m.Adopt):
                request = state.requests.get(action.message.id)
                if request is None or request.run.key != request.id + action.message.dispatch:
                    continue
                if isinstance(action.message, m.Adopt):
                    self._adopted(request)
                elif _new(request):
                    self._served(request, waiting & self._waited)
        self._waited = waiting
        self._passed = {place: passed for place, passed in self._passed.items() if place in waiting}

    def _served(self, request: Request, waiting: set[Place]) -> None:
        lane, priority, owner = place = _place(request)
        self._passed.pop(place, None)
        for other in waiting:
            if other[:2] == (lane, priority) and other[2] != owner:
                passed = self._passed.setdefault(other, Counter())
                passed[owner] += 1
                assert passed[owner] <= TURNS, f"{owner} had {passed[owner]} turns while {other[2]} waited for one"

    def _adopted(self, request: Request) -> None:
        """It may have waited for its turn by then (`dispatch_instead`). Its run has a slot, so that was the turn. The
        lane has its fingerprint only since the adoption.
        """
        for place in [p for p in self._passed if p[1:] == _place(request)[1:] and p[0].model == request.model]:
            del self._passed[place]


def _place(request: Request) -> Place:
    return request.lane, request.asked.priority, request.owner


def _new(request: Request) -> bool:
    """Not one that was with a worker before, here or elsewhere: those go on."""
    return request.run.attempt == 1 and (
        request.run.worker is None or request.run.key not in request.run.worker.adopted
    )


def _may_go(request: Request) -> bool:
    waits = request.state is RequestState.WAITING and not request.place.awaiting_run and not request.run.attempt
    return waits and not request.account.full
