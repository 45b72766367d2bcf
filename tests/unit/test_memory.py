"""What a broker remembers is bounded by its settings, and not by how long it has been running."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llambo.broker.records.state import State
from llambo.mesh.wire import messages as m
from tests.unit.broker_bench import Bench

#: What must not grow may vary: lanes and alarms are tidied up from time to time.
SLACK = 1.05


def things(value: Any, seen: set[int]) -> Iterator[object]:
    """Every object that can be reached from here by fields and entries."""
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type, type(None))) or callable(value):
        return
    seen.add(id(value))
    yield value
    if isinstance(value, dict):
        inside: list[Any] = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)) or hasattr(value, "__iter__"):
        inside = list(value)
    else:
        names = [
            *getattr(value, "__dict__", ()),
            *(n for kind in type(value).__mro__ for n in vars(kind).get("__slots__", ())),
        ]
        inside = [getattr(value, name, None) for name in names]
    for item in inside:
        yield from things(item, seen)


def entries(state: State) -> int:
    """The number of entries of all containers that can be reached."""
    return sum(len(thing) if hasattr(thing, "__len__") else 1 for thing in things(state, set()))


def a_day(bench: Bench, numbers: range) -> None:
    """Requests with every outcome, workers and clients that join and leave, drains, cancels, moves."""
    for number in numbers:
        client = bench.client(b"client %d" % number)
        name = f"w{number % 3}"
        worker = bench.worker(name, slots=4, incarnation=b"%d" % number, fingerprint="f")
        worker.beat(99)
        ids = [client.submit(4 * number + kind, deadline_ms=3_600_000, detached=kind == 3) for kind in range(4)]
        for kind, id in enumerate(ids):
            at = next((n for n, dispatch in enumerate(worker.dispatches) if dispatch.id == id), None)
            if at is None:
                continue
            worker.publish(worker.chunk(0, 7, number=at))
            if kind == 0:
                client.send(m.Cancel(id))
            worker.end(1, number=at)
        if number % 5 == 0:
            client.send(m.DrainWorker(1, name, move=True))
            client.send(m.DrainWorker(2, name, undo=True))
        client.send(m.EndAck(ids))
        bench.pass_time(1_000)
        if number % 2:
            client.send(m.Goodbye())
        worker.send(m.Goodbye())
        bench.actions.clear()
        bench.state.journal.log.clear()  # as the shell does


def test_a_broker_that_runs_for_long_remembers_no_more_than_one_that_ran_for_a_while() -> None:
    bench = Bench(tombstones=50, detached_bytes=2_000, events=20, samples=20, client_lease_ms=2_000, hold_ms=500)
    a_day(bench, range(60))
    before = entries(bench.state)
    a_day(bench, range(60, 240))
    assert bench.state.counters.requests.ended > 600, "too little time passed to prove anything"
    assert entries(bench.state) <= SLACK * before
