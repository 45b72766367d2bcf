"""Workers with a free slot, by the lane of the requests that they can take.

Operations of a pool cost O(log n) at most, so ten thousand workers choose as fast as ten.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.request import Lane


class Pool:
    """Workers with a free slot, for one lane: an array for picking any of them, a heap for the least loaded."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.free: list[WorkerEntry] = []
        self.cursor = 0
        self._heap: list[tuple[float, int, int, WorkerEntry]] = []
        self._pushed = 0

    def update(self, worker: WorkerEntry) -> None:
        """The worker's load or fitness has changed."""
        fit = self.takes(worker)
        if fit and self not in worker.position:
            worker.position[self] = len(self.free)
            self.free.append(worker)
        elif not fit and self in worker.position:
            self._remove(worker)
        if fit:
            self._push(worker)

    def takes(self, worker: WorkerEntry) -> bool:
        return worker.dispatchable and not (self.lane.isolated and worker.has_suspect)

    def clear(self) -> None:
        for worker in self.free:
            del worker.position[self]
        self.free.clear()

    def least_loaded(self) -> WorkerEntry | None:
        """Entries with an old load are skipped when met; each change has pushed a true one."""
        heap = self._heap
        while heap:
            load, turn, _, worker = heap[0]
            if self in worker.position and turn == worker.turn and load == _load(worker):
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
        at = worker.position.pop(self)
        last = self.free.pop()
        if last is not worker:
            self.free[at] = last
            last.position[self] = at


def _load(worker: WorkerEntry) -> float:
    # With what other brokers have given it, too.
    return worker.speed.idle_load + (len(worker.claims) + worker.last.busy) * worker.speed.step_load


class Pools(dict[Lane, Pool]):
    """Those of each lane that is needed: of every model that is served, and of requests that move."""

    def __init__(self) -> None:
        super().__init__()
        #: Workers, by session, whose load or fitness this event has changed: `dispatching.settle` looks after them.
        self.touched: dict[bytes, WorkerEntry] = {}
        #: The pools for suspects. Mostly there is none.
        self._isolated: list[Pool] = []
        self._turns = 0

    def next_turn(self) -> int:
        self._turns += 1
        return self._turns

    def touch(self, worker: WorkerEntry) -> None:
        self.touched[worker.session] = worker

    def refresh(self, worker: WorkerEntry) -> None:
        """Call it whenever a worker's load or fitness has changed."""
        for lane in worker.serving.lanes:
            pool = self.get(lane)
            if pool is None and not lane.fingerprint:
                pool = self[lane] = Pool(lane)
            if pool is not None:
                pool.update(worker)
        for pool in self._isolated:
            if serves(worker, pool.lane):
                pool.update(worker)

    def open(self, lane: Lane, workers: Iterable[WorkerEntry]) -> Pool:
        """A request moves: from now on there is a pool of those who may continue it. Most lanes never need one."""
        pool = self.get(lane)
        if pool is not None:
            return pool
        pool = self[lane] = Pool(lane)
        if lane.isolated:
            self._isolated.append(pool)
        for worker in workers:
            if serves(worker, lane):
                pool.update(worker)
        return pool

    def close(self, lane: Lane) -> None:
        pool = self.pop(lane, None)
        if pool is not None:
            pool.clear()
            if lane.isolated:
                self._isolated.remove(pool)

    def lanes_of(self, worker: WorkerEntry) -> list[Lane]:
        """Those that it takes requests from, in this order: who was interrupted goes first."""
        suspects = [pool.lane for pool in self._isolated if serves(worker, pool.lane)]
        return [*suspects, *worker.serving.lanes]


def serves(worker: WorkerEntry, lane: Lane) -> bool:
    return Lane(lane.model, lane.fingerprint) in worker.serving.lanes
