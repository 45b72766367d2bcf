"""How fast workers are, and what follows from it.

Each heartbeat says at what pace the worker's streams go: tokens per second and stream, from the moment a stream is
given to the engine, so that slow prompts count as well. Once a second the workers of a model are compared:

    weight    a worker that is less than half as fast as the fastest counts for less when the least loaded is chosen:
              1/2, 1/4, ... A fast one is filled before a much slower one gets anything, and the slow one is there
              when it is needed. Small differences do not count, or noise would decide.
    ejected   one that is many times slower than its peers (the same model, the same node class) gets no new work for
              a while. Then it is tried with one request at a time: at its pace again it is a worker like the others,
              otherwise it goes for twice as long. Never more than half of those who serve a model are ejected,
              and none that has just started: on a full machine its start makes it slow, and others as well.

Nothing here runs when a worker is chosen: the weight is a part of its load, and an ejected worker is in no pool.
"""

from __future__ import annotations

from collections import defaultdict

from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.state import State

#: A measured pace is forgotten after so long without another: the worker has to show its speed again.
STALE_MS = 30_000
#: What a new measurement counts beside those before it.
FRESH = 0.4
#: So many measurements are needed before a worker is compared with others.
ENOUGH = 5
#: The least that a worker may count for, as a power of a half.
LEAST = 6
#: How far over the border between two weights a pace has to be before the weight changes.
MARGIN = 1.25
#: The first pause of a slow worker; it doubles up to the last.
PAUSE_MS = 10_000
LONGEST_PAUSE_MS = 320_000


def measured(worker: WorkerEntry, pace: float, now_ms: int) -> None:
    speed = worker.speed
    speed.pace = pace if speed.measurements == 0 else (1 - FRESH) * speed.pace + FRESH * pace
    speed.measurements += 1
    speed.measured_at = now_ms


def compare(state: State, now_ms: int) -> None:
    """All workers, once a second. Pools are only refreshed for those that have changed."""
    serving: dict[str, list[WorkerEntry]] = defaultdict(list)
    for worker in state.registry.workers.values():
        if worker.speed.measurements and now_ms - worker.speed.measured_at >= STALE_MS:
            worker.speed.forget()
        if worker.state == "ready" and not worker.drain.drained:
            for model in worker.serving.models:
                serving[model].append(worker)
    for pool in serving.values():
        _weigh(state, pool)
        _eject_slow(state, pool, now_ms)


def _weigh(state: State, pool: list[WorkerEntry]) -> None:
    fastest = max((worker.speed.pace for worker in pool if worker.speed.measurements >= ENOUGH), default=0.0)
    for worker in pool:
        level = 0 if worker.speed.measurements < ENOUGH else _level(worker.speed.level, worker.speed.pace / fastest)
        if level != worker.speed.level:
            worker.speed.weigh(level, worker.slots)
            state.pools.touch(worker)


def _level(level: int, share: float) -> int:
    """How often to halve it. A border that was crossed has to be left well behind before it is crossed again."""
    while level < LEAST and share * MARGIN < 0.5 ** (level + 1):
        level += 1
    while level > 0 and share > 0.5**level * MARGIN:
        level -= 1
    return level


def _eject_slow(state: State, pool: list[WorkerEntry], now_ms: int) -> None:
    ejected = [worker for worker in pool if worker.speed.ejected]
    for worker in sorted(ejected, key=lambda worker: worker.speed.until):
        if now_ms >= worker.speed.until or 2 * len(ejected) > len(pool):
            ejected.remove(worker)
            _try_again(state, worker, now_ms)
    if not state.config.faults.slow_factor:
        return
    classes: dict[str, list[WorkerEntry]] = defaultdict(list)
    for worker in pool:
        speed = worker.speed
        if speed.measurements >= ENOUGH and not speed.ejected and now_ms >= speed.fresh_until:
            classes[worker.hello.node_class].append(worker)
    for peers in classes.values():
        usual = sorted(worker.speed.pace for worker in peers)[len(peers) // 2]
        for worker in peers:
            if worker.speed.pace * state.config.faults.slow_factor < usual:
                if 2 * (len(ejected) + 1) <= len(pool):
                    ejected.append(worker)
                    _eject(state, worker, usual, now_ms)
            elif worker.speed.trial and (len(peers) > 1 or len(pool) == 1):
                _end_trial(state, worker, now_ms)


def _eject(state: State, worker: WorkerEntry, usual: float, now_ms: int) -> None:
    pause_ms = min(PAUSE_MS * 2**worker.speed.pauses, LONGEST_PAUSE_MS)
    worker.speed.pauses += 1
    worker.speed.until = now_ms + pause_ms
    worker.speed.ejected, worker.speed.trial = True, False
    worker.speed.note = f"{worker.speed.pace:.1f} tokens/s for each stream, where others make {usual:.1f}"
    state.counters.faults.ejected += 1
    text = f"{worker.name}: {worker.speed.note}; no new work for {pause_ms // 1000} s"
    state.journal.add(now_ms, "worker slow", text, warning=True, worker=worker.name)
    state.pools.touch(worker)


def _try_again(state: State, worker: WorkerEntry, now_ms: int) -> None:
    worker.speed.ejected, worker.speed.trial = False, True
    worker.speed.forget()
    worker.speed.weigh(0, worker.slots)
    text = f"{worker.name}: one request at a time until its pace is known"
    state.journal.add(now_ms, "worker on trial", text, worker=worker.name)
    state.pools.touch(worker)


def _end_trial(state: State, worker: WorkerEntry, now_ms: int) -> None:
    worker.speed.trial, worker.speed.pauses, worker.speed.note = False, max(0, worker.speed.pauses - 1), ""
    text = f"{worker.name}: {worker.speed.pace:.1f} tokens/s for each stream"
    state.journal.add(now_ms, "worker at pace", text, worker=worker.name)
    state.pools.touch(worker)
