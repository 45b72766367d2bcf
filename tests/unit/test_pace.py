"""Intervals of heartbeats follow the number of sessions, and are rare where nothing runs."""

from __future__ import annotations

from typing import Any

from llambo.broker.config import Intervals, Timing
from llambo.broker.events import PeersDisconnected
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.codec import NO_SESSION
from llambo.worker.agent import events as e
from tests.unit.broker_bench import Bench, Client
from tests.unit.test_worker_core import SESSION as WORKER_SESSION
from tests.unit.test_worker_core import Rig, dispatch, joined, loaded

#: The interval of a mesh with many sessions.
IDLE_MS = 5_000


def many() -> tuple[Bench, Client]:
    """A broker with enough clients for the longest interval."""
    bench = Bench(idle_each_ms=1_000, client_lease_ms=10**6)
    clients = [bench.client(bytes([number])) for number in range(IDLE_MS // 1_000)]
    bench.pass_time(100)
    return bench, clients[0]


def beats(bench: Bench, length_ms: int, route: bytes = b"wi") -> list[m.BrokerHeartbeat]:
    """What a worker is sent meanwhile."""
    bench.actions.clear()
    bench.pass_time(length_ms)
    sent = (action for action in bench.actions if getattr(action, "route", b"") == route)
    return [action.message for action in sent if isinstance(action.message, m.BrokerHeartbeat)]


def test_intervals_follow_the_number_of_sessions() -> None:
    timing = Timing()
    assert [timing.pace(sessions) for sessions in (1, 20, 100, 400, 1_000, 20_000)] == [
        Intervals(100, 200, 200), Intervals(100, 200, 200), Intervals(100, 200, 1_000), Intervals(200, 200, 4_000),
        Intervals(500, 500, 5_000), Intervals(500, 500, 5_000),
    ]  # fmt: skip


def test_a_worker_without_runs_gets_heartbeats_seldom_and_one_with_runs_often() -> None:
    # Given a mesh of many
    bench, client = many()
    worker = bench.worker()
    assert worker.received(m.Welcome)[-1].idle_ms == IDLE_MS
    # When nothing runs
    sent = beats(bench, 3 * IDLE_MS)
    # Then three heartbeats are sent
    assert [(beat.idle_ms, beat.busy) for beat in sent] == [(IDLE_MS, False)] * 3
    # And when something runs, one every 100 ms, which says so
    client.submit(1)
    worker.beat()
    sent = beats(bench, 1_000)
    assert len(sent) in (9, 10)
    assert all(beat.busy for beat in sent)


def test_a_worker_with_runs_has_a_short_lease() -> None:
    bench, client = many()
    bench.worker().beat()
    # Given a worker that was silent for longer than the lease because it has nothing to do
    bench.pass_time(5_000)
    assert bench.state.registry.workers
    # When it gets a request, and stays silent
    client.submit(1)
    bench.pass_time(1_900)
    assert bench.state.registry.workers
    bench.pass_time(300)
    # Then it is lost after the short lease, and one without runs after four of its intervals
    assert not bench.state.registry.workers
    bench.worker("other", model="other").beat()
    bench.pass_time(4 * IDLE_MS - 200)
    assert bench.state.registry.workers
    bench.pass_time(400)
    assert not bench.state.registry.workers


def test_a_worker_of_an_older_release_gets_what_it_expects() -> None:
    bench, _ = many()
    old = bench.worker("old", paced=False)
    assert old.received(m.Welcome)[-1].idle_ms == 0
    sent = beats(bench, 1_900, old.route)
    assert len(sent) in (9, 10)
    assert not any(beat.idle_ms or beat.heartbeat_ms or beat.busy for beat in sent)
    bench.pass_time(200)
    assert not bench.state.registry.workers


def test_an_interval_grows_step_by_step() -> None:
    # Given workers that joined when there were few, each with an interval of 200 ms
    bench = Bench(lease_ms=10**6, client_lease_ms=10**6, idle_each_ms=1)
    worker = bench.worker()
    # When there are many
    for number in range(1_000):
        bench.client(number.to_bytes(3, "big"))
    # Then each heartbeat doubles it: a peer that misses one does not take the next for late
    sent = [beat.idle_ms for beat in beats(bench, 4_000, worker.route)]
    assert sent[:4] == [400, 800, 1_001, 1_001]


def test_when_a_connection_ends_it_is_found_at_once() -> None:
    # Given one worker with a request and one without
    bench, client = many()
    worker, idle = bench.worker(), bench.worker("idle")
    client.submit(1)
    bench.pass_time(30)
    bench.actions.clear()
    # When a connection has ended
    bench.handle(PeersDisconnected())
    bench.pass_time(10)
    # Then both are sent something
    assert worker.received(m.BrokerHeartbeat)
    assert idle.received(m.BrokerHeartbeat)
    # And again a moment later, but not more often than that
    bench.actions.clear()
    for _ in range(10):
        bench.handle(PeersDisconnected())
        bench.pass_time(10)
    assert len(idle.received(m.BrokerHeartbeat)) <= 1


# --- the worker ----------------------------------------------------------------------------------------


def sent_beats(rig: Rig, length_ms: int, **fields: Any) -> int:
    """How many it sends meanwhile, to a broker whose heartbeats have these fields."""
    count = 0
    for number in range(length_ms // 100):
        rig.now += 100
        rig.on(e.Ticked())
        if number % 5 == 0:
            rig.receive(m.BrokerHeartbeat(9, echo=rig.core.links[0].beats.number, **fields))
        count += len(rig.sent(m.WorkerHeartbeat))
        rig.actions = []
    return count


def test_a_worker_without_runs_sends_heartbeats_seldom() -> None:
    rig = loaded().receive(m.Welcome(WORKER_SESSION, 7332, idle_ms=2_000), session=NO_SESSION)
    rig.on(e.Subscribed(0)).receive(m.BrokerHeartbeat(1, echo=2))
    rig.actions = []
    assert sent_beats(rig, 6_000) == 3
    # The broker says what the interval is now
    assert sent_beats(rig, 6_000, heartbeat_ms=200, idle_ms=1_000) in (5, 6)
    # It may have dispatched something that was lost
    assert sent_beats(rig, 2_000, heartbeat_ms=200, idle_ms=1_000, busy=True) in (9, 10, 11)
    # And what runs is reported often as well
    rig.receive(dispatch(1), b"prompt")
    rig.actions = []
    assert sent_beats(rig, 2_000, heartbeat_ms=500, idle_ms=1_000) in (3, 4, 5)


def test_a_worker_of_an_older_broker_sends_heartbeats_as_before() -> None:
    assert sent_beats(joined(), 2_000) == 10
