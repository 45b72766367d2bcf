"""A broker that does not keep up says so, refuses new requests, and gives up no peer whose messages it has not read."""

from __future__ import annotations

import pytest

from llambo.broker.events import Tick
from llambo.broker.load import LONG_MS
from llambo.broker.workers import membership
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code
from tests.unit.broker_bench import Bench, request_id, small_mesh


def ticks(bench: Bench, length_ms: int, turn_ms: int = 0, unread_ms: int = 0) -> None:
    for _ in range(length_ms // 100):
        bench.now_ms += 100
        bench.handle(Tick(turn_ms, unread_ms))


def kinds(bench: Bench) -> list[str]:
    return [entry.kind for entry in bench.state.journal.entries]


def test_new_requests_are_refused_while_turns_are_long() -> None:
    # Given a request that runs
    bench, worker, client = small_mesh(lease_ms=10**6, client_lease_ms=10**6)
    client.submit(1)
    # When turns stay long
    ticks(bench, 1_200, turn_ms=LONG_MS)
    client.submit(2)
    client.submit(3)
    # Then new ones are refused with the time of the next try
    assert [problem.error.code for problem in client.problems] == [Code.BUSY] * 2
    assert all(problem.error.retry_after_ms >= 1_000 for problem in client.problems)
    # And what runs goes on
    worker.publish(worker.chunk(0, 7))
    worker.end(1)
    assert len(client.ends) == 1
    # When turns are short again for a while, Then requests are admitted
    ticks(bench, 1_200)
    client.submit(4)
    assert len(worker.dispatches) == 2
    # And there were two lines about it
    assert [kind for kind in kinds(bench) if kind.startswith("overload")] == ["overloaded", "overload over"]
    assert "2 requests were refused" in bench.state.journal.entries[-1].text


def test_messages_that_stay_unread_are_an_overload_as_well() -> None:
    bench, _, client = small_mesh(lease_ms=10**6, client_lease_ms=10**6)
    ticks(bench, 1_200, unread_ms=LONG_MS)
    client.submit(1)
    assert client.problems[-1].error.code is Code.BUSY


def test_one_long_turn_is_none() -> None:
    bench, worker, client = small_mesh(lease_ms=10**6, client_lease_ms=10**6)
    ticks(bench, 100, turn_ms=5_000)
    ticks(bench, 5_000)
    ticks(bench, 100, turn_ms=5_000)
    client.submit(1)
    assert worker.dispatches
    assert not client.problems


def test_an_overload_that_comes_and_goes_is_reported_once_a_minute() -> None:
    bench, _, _ = small_mesh(lease_ms=10**6, client_lease_ms=10**6)
    for _ in range(10):
        ticks(bench, 1_500, turn_ms=LONG_MS)
        ticks(bench, 1_500)
    assert kinds(bench).count("overloaded") == 1
    ticks(bench, 60_000)
    ticks(bench, 1_500, turn_ms=LONG_MS)
    assert kinds(bench).count("overloaded") == 2


def test_a_lease_is_not_out_while_messages_are_unread() -> None:
    # Given a worker and a client of which nothing is read any more, because other messages come first
    bench, _, _ = small_mesh(lease_ms=2_000, client_lease_ms=3_000)
    # When more time passes than their leases, Then they are not given up
    for unread_ms in range(0, 3_500, 100):
        ticks(bench, 100, unread_ms=unread_ms)
    registry = bench.state.registry
    assert registry.workers
    assert registry.clients
    # Until everything is read, and nothing of them was among it
    ticks(bench, 300)
    assert not registry.workers
    assert not registry.clients


def test_what_is_unread_does_not_extend_a_lease_for_ever() -> None:
    bench, _, _ = small_mesh(lease_ms=2_000)
    for unread_ms in range(0, 4_500, 100):
        ticks(bench, 100, unread_ms=unread_ms)
    assert not bench.state.registry.workers


def test_without_descriptors_for_more_peers_new_ones_are_refused() -> None:
    # Given a broker that has used up most of its descriptors
    bench, worker, client = small_mesh(lease_ms=10**6, client_lease_ms=10**6)
    bench.handle(Tick(crowded=1_024))
    # When others want to join, Then they are refused with the reason
    late = bench.worker("late", incarnation=b"2")
    (problem,) = late.received(m.Problem)
    assert (problem.error.code, problem.error.retry_after_ms > 0) == (Code.BUSY, True)
    assert "1024 descriptors" in problem.error.text
    host = bench.host("box")
    assert host.received(m.Problem)[-1].error.code is Code.BUSY
    # And those that are there go on; one that says hello again is no new one
    client.submit(1)
    assert worker.dispatches
    again = bench.worker(incarnation=b"another", route=worker.route)
    assert not any(problem.error.code is Code.BUSY for problem in again.received(m.Problem))
    bench.handle(Tick())
    assert bench.worker("later", incarnation=b"3").received(m.Welcome)


def test_places_in_the_queue_are_reported_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given more requests that wait than one heartbeat may report
    monkeypatch.setattr(membership, "PLACES", 4)
    bench, _, client = small_mesh(slots=1, lease_ms=10**6, client_lease_ms=10**6)
    for number in range(11):
        client.submit(number)
    bench.actions.clear()
    # When a few heartbeats have been sent
    bench.pass_time(1_000)
    # Then each had few of them, and together all
    reports = [beat.waiting for beat in client.received(m.BrokerHeartbeat)]
    assert max(map(len, reports)) == 4
    assert {id for report in reports for id in report} == {request_id(number) for number in range(1, 11)}


def test_requests_that_have_waited_too_long_are_found_without_a_look_at_the_others() -> None:
    bench, _, client = small_mesh(slots=1, lease_ms=10**6, client_lease_ms=10**6, queue_ms=5_000)
    for number in range(3):
        client.submit(number, deadline_ms=60_000 if number == 2 else 0)
    bench.pass_time(3_000)
    client.submit(3)
    bench.pass_time(3_000)
    assert list(dict.fromkeys(end.id for end in client.ends)) == [request_id(1), request_id(2)]
