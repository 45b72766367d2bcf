"""Which worker gets a request. Choosing is a pure function of the request and the pool.

A pool holds, for one model, the workers that could start something now. Its operations cost O(log n) at
most, so ten thousand workers choose as fast as ten.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.request import WARY, Request


class Pool:
    """Workers with a free slot, for one model: an array for picking any of them, a heap for the least loaded."""

    def __init__(self, model: str) -> None:
        self.model = model
        #: For suspects: a worker that has one is not free for another.
        self.wary = model.endswith(WARY)
        self.free: list[WorkerEntry] = []
        self.cursor = 0
        self._heap: list[tuple[float, int, int, WorkerEntry]] = []
        self._pushed = 0

    def update(self, worker: WorkerEntry) -> None:
        """The worker's load or fitness has changed."""
        fit = self.takes(worker)
        if fit and self.model not in worker.position:
            worker.position[self.model] = len(self.free)
            self.free.append(worker)
        elif not fit and self.model in worker.position:
            self._remove(worker)
        if fit:
            self._push(worker)

    def takes(self, worker: WorkerEntry) -> bool:
        return worker.dispatchable and not (self.wary and worker.wary)

    def clear(self) -> None:
        for worker in self.free:
            del worker.position[self.model]
        self.free.clear()

    def least_loaded(self) -> WorkerEntry | None:
        """Entries that tell an old load are skipped when met; each change has pushed a true one."""
        heap = self._heap
        while heap:
            load, turn, _, worker = heap[0]
            if self.model in worker.position and turn == worker.turn and load == _load(worker):
                return worker
            heapq.heappop(heap)
        return None

    def _push(self, worker: WorkerEntry) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (_load(worker), worker.turn, self._pushed, worker))
        if len(self._heap) > 64 + 8 * len(self.free):
            self._heap = [(_load(w), w.turn, -n, w) for n, w in enumerate(self.free)]
            heapq.heapify(self._heap)

    def _remove(self, worker: WorkerEntry) -> None:
        at = worker.position.pop(self.model)
        last = self.free.pop()
        if last is not worker:
            self.free[at] = last
            last.position[self.model] = at


def _load(worker: WorkerEntry) -> float:
    # With what other brokers have given it, too.
    return worker.idle_load + (len(worker.claims) + worker.busy) * worker.step_load


Policy = Callable[[Request, Pool], WorkerEntry | None]


def least_loaded(request: Request, pool: Pool) -> WorkerEntry | None:
    """The smallest share of busy slots, by its speed; among equals the one whose last turn is longest ago."""
    return pool.least_loaded()


def round_robin(request: Request, pool: Pool) -> WorkerEntry | None:
    """Each in turn, whatever its size."""
    if not pool.free:
        return None
    pool.cursor = (pool.cursor + 1) % len(pool.free)
    return pool.free[pool.cursor]


def random(request: Request, pool: Pool) -> WorkerEntry | None:
    """Any. The chance comes from the request's id, which its client drew."""
    if not pool.free:
        return None
    draw = int.from_bytes(request.id[-6:], "big") + request.attempt
    return pool.free[draw % len(pool.free)]


POLICIES: dict[str, Policy] = {"least-loaded": least_loaded, "round-robin": round_robin, "random": random}


def choose(policy: Policy, request: Request, pool: Pool | None) -> WorkerEntry | None:
    """The worker for this request, or None if it has to wait."""
    return policy(request, pool) if pool is not None else None
