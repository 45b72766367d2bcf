"""Draining a worker: the broker's side, and the worker's."""

from __future__ import annotations

import msgspec
import pytest

from llambo.broker.records.request import RequestState
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tokens
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.worker.agent import events as e
from llambo.worker.engine import protocol as proto
from tests.unit.broker_bench import Bench, Client, Worker, request_id, small_mesh
from tests.unit.test_worker_core import dispatch, joined, loaded, running

NEVER_LOST = {"lease_ms": 10**6, "client_lease_ms": 10**6}


def beat(worker: Worker, drained: bool = False, moving: bool = False, claims: dict[bytes, int] | None = None) -> None:
    """One that has received everything sent so far."""
    worker.bench.pass_time(100)
    entry = worker.bench.state.registry.workers[worker.session]
    state: m.WorkerState = "draining" if drained else "ready"
    worker.beat(entry.beats.seq, drained=drained, moving=moving, state=state, claims=claims or {})


def drained(client: Client, worker: str = "w", *, undo: bool = False, move: bool = False) -> None:
    client.send(m.DrainWorker(1, worker, undo, move))


# --- an order ----------------------------------------------------------------------------------------


def test_a_drained_worker_finishes_and_gets_nothing_new() -> None:
    _, worker, client = small_mesh(lease_ms=10**6)
    client.submit(1)
    drained(client)
    client.submit(2)
    assert worker.received(m.Drain) == [m.Drain()]
    assert len(worker.dispatches) == 1
    worker.end(0)
    assert len(worker.dispatches) == 1
    drained(client, undo=True)
    assert len(worker.dispatches) == 2
    client.send(m.DrainWorker(3, "unknown"))
    assert client.problems[-1].error.code is Code.UNKNOWN_WORKER
    assert client.problems[-1].query == 3


def test_a_request_whose_workers_are_all_drained_says_how_to_take_that_back() -> None:
    bench, worker, client = small_mesh(**NEVER_LOST)
    other = bench.worker("other", model="another")
    beat(other)

    def waits_for() -> str:
        client.send(m.Query(1, "why", request_id(1).hex()))
        return str(msgspec.msgpack.decode(client.received_last(m.Result)[-1].data)["waits_for"])

    drained(client)
    client.submit(1, model="m")
    assert waits_for() == "a worker of m, all of which are drained: `llambo drain w --undo`"
    drained(client, undo=True)
    assert len(worker.dispatches) == 1


def test_an_order_is_sent_again_until_the_worker_confirms_it() -> None:
    _, worker, client = small_mesh(**NEVER_LOST)
    drained(client)
    worker.beat()  # it may be on its way still
    assert worker.received(m.Drain) == [m.Drain()]
    beat(worker)
    assert worker.received(m.Drain) == [m.Drain()] * 2
    beat(worker, drained=True)
    drained(client, undo=True)
    beat(worker, drained=True)
    assert worker.received(m.Drain)[2:] == [m.Drain(undo=True)] * 2
    beat(worker)
    beat(worker)
    assert len(worker.received(m.Drain)) == 4


def test_a_beat_from_before_the_order_does_not_confirm_it() -> None:
    # Given a drain and its undo, so close that the worker still reports its state before both
    _, worker, client = small_mesh(**NEVER_LOST)
    beat(worker)
    drained(client)
    drained(client, undo=True)
    worker.beat()
    # When it has received the first only
    beat(worker, drained=True)
    # Then the second is sent again
    assert worker.received(m.Drain)[-1] == m.Drain(undo=True)
    assert len(worker.received(m.Drain)) == 3


def test_a_drain_by_another_broker_counts() -> None:
    bench = Bench(**NEVER_LOST)
    worker, other, client = bench.worker(slots=1), bench.worker("b", slots=1), bench.client()
    client.submit(1)
    (busy,) = [peer for peer in (worker, other) if peer.dispatches]
    (idle,) = [peer for peer in (worker, other) if not peer.dispatches]
    beat(busy, drained=True, moving=True, claims={busy.key(): 0})
    assert [d.id for d in idle.dispatches] == [request_id(1)]
    beat(busy)
    assert not bench.state.registry.drained
    assert not bench.state.registry.emptying


def test_the_order_is_sent_again_only_to_a_restarted_worker() -> None:
    bench = Bench(**NEVER_LOST)
    worker, client = bench.worker(incarnation=b"1"), bench.client()
    drained(client, move=True)
    beat(worker, drained=True, moving=True)
    worker.send(m.Goodbye())
    again = bench.worker(incarnation=b"2")
    assert again.received(m.Drain) == [m.Drain(move=True)]
    beat(again, drained=True, moving=True)
    # It comes back under a new session, and meanwhile another broker has undone the drain.
    again.send(m.Goodbye())
    once_more = bench.worker(incarnation=b"2", route=b"elsewhere")
    assert once_more.received(m.Drain) == []
    beat(once_more)
    client.submit(1)
    assert len(once_more.dispatches) == 1


def test_a_restarted_worker_that_another_broker_has_reached_is_not_drained_again() -> None:
    bench = Bench(**NEVER_LOST)
    worker, client = bench.worker(incarnation=b"1"), bench.client()
    beat(worker, drained=True)  # through another broker
    worker.send(m.Goodbye())
    # It was restarted, and that broker has ended the drain before this one heard of the new process.
    again = bench.worker(incarnation=b"2", ordered=True)
    assert again.received(m.Drain) == []
    beat(again)
    client.submit(1)
    assert len(again.dispatches) == 1


def test_an_undo_reaches_a_worker_that_is_away() -> None:
    bench, worker, client = small_mesh(**NEVER_LOST)
    drained(client)
    beat(worker, drained=True)
    worker.send(m.Goodbye())
    drained(client, undo=True)
    assert client.problems == []
    # The same process, which has not received it.
    again = bench.worker(route=b"elsewhere", state="draining")
    assert again.received(m.Drain) == [m.Drain(undo=True)]
    beat(again)
    client.submit(1)
    assert len(again.dispatches) == 1


def test_a_broker_that_was_restarted_learns_from_the_worker_who_was_drained() -> None:
    bench = Bench(**NEVER_LOST)
    worker, client = bench.worker(state="draining"), bench.client()
    beat(worker, drained=True)
    assert worker.received(m.Drain) == []
    client.send(m.Query(2, "workers", "w"))
    assert bench.state.registry.drained.keys() == {"w"}
    drained(client, undo=True)
    assert worker.received(m.Drain) == [m.Drain(undo=True)]


def test_a_worker_that_is_being_stopped_is_no_drained_one() -> None:
    # Its successor of the same name gets work.
    bench = Bench(**NEVER_LOST)
    worker, client = bench.worker(incarnation=b"1"), bench.client()
    bench.pass_time(100)
    worker.beat(99, state="draining")
    assert worker.received(m.Drain) == []
    worker.send(m.Goodbye())
    again = bench.worker(incarnation=b"2")
    client.submit(1)
    assert len(again.dispatches) == 1


# --- a move ------------------------------------------------------------------------------------------


def test_what_an_emptied_worker_runs_goes_on_elsewhere_with_what_it_has() -> None:
    # Given an answer with two tokens
    bench = Bench(**NEVER_LOST)
    first, client = bench.worker("a"), bench.client()
    client.submit(1, seed=5)
    first.publish(first.chunk(0, 11, 12))
    second = bench.worker("b")
    # When its worker is emptied
    drained(client, "a", move=True)
    # Then the next one continues, the first one is ordered to stop, and what it still sends is ignored
    assert (second.dispatches[0].prefix, second.dispatches[0].seed) == ([11, 12], 5)
    assert [c.id + c.dispatch for c in first.received(m.Cancel)] == [first.key()]
    first.publish(first.chunk(2, 99))
    second.publish(second.chunk(2, 13))
    assert client.streamed() == [11, 12, 13]
    # and it is empty when it has confirmed that.
    first.send(m.End(request_id(1), 3, "cancelled", first.dispatches[0].dispatch))
    assert not bench.state.registry.worker_names["a"].claims
    second.end(3)
    assert [(end.count, end.moves, end.worker) for end in client.ends] == [(3, 1, "b")]


def test_what_finds_no_slot_stays_until_one_is_free_and_goes_before_those_that_wait() -> None:
    # Given two workers with one slot each, both taken, and one that waits
    bench = Bench(**NEVER_LOST)
    first, second, client = bench.worker("a", slots=1), bench.worker("b", slots=1), bench.client()
    for number in (1, 2, 3):
        client.submit(number)
    first.publish(first.chunk(0, 7))
    on_first = first.dispatches[0].id
    # When the first is emptied, nothing happens to what it runs
    drained(client, "a", move=True)
    assert first.received(m.Cancel) == []
    first.publish(first.chunk(1, 8))
    # until the second one has room.
    second.end(0)
    assert (second.dispatches[1].id, second.dispatches[1].prefix) == (on_first, [7, 8])
    second.end(2, number=1)
    assert second.dispatches[2].id == request_id(3)
    assert len(first.dispatches) == 1


def test_an_undo_leaves_everything_where_it_is() -> None:
    bench = Bench(**NEVER_LOST)
    first, client = bench.worker("a", slots=1), bench.client()
    client.submit(1)
    drained(client, "a", move=True)
    drained(client, "a", undo=True)
    bench.worker("b")
    assert first.received(m.Cancel) == []
    assert not bench.state.registry.emptying


def test_a_plain_drain_after_a_move_does_not_take_the_move_back() -> None:
    bench, worker, client = small_mesh(**NEVER_LOST)
    drained(client, move=True)
    drained(client)
    assert worker.received(m.Drain) == [m.Drain(move=True)] * 2
    assert [happening.kind for happening in bench.state.journal.entries].count("drain") == 1


def test_an_answer_that_is_whole_needs_no_other_worker() -> None:
    # Its worker's END is still to come: an answer that has ended there is delivered from there.
    bench = Bench(**NEVER_LOST)
    first, client = bench.worker("a"), bench.client()
    id = client.submit(1, max_tokens=2)
    first.end(2)
    assert bench.state.requests[id].state is RequestState.COMPLETING
    second = bench.worker("b")
    drained(client, "a", move=True)
    assert second.dispatches == []
    first.publish(first.chunk(0, 1, 2, flags=tokens.FINAL))
    assert [end.count for end in client.ends] == [2]


def test_two_workers_that_are_emptied_do_not_give_each_other_their_work() -> None:
    bench = Bench(**NEVER_LOST)
    workers, client = [bench.worker("a"), bench.worker("b")], bench.client()
    client.submit(1)
    for name in ("a", "b"):
        drained(client, name, move=True)
    # The first order moved it to the other one, at most.
    bench.pass_time(1_000)
    assert sum(len(worker.dispatches) for worker in workers) <= 2


def test_a_request_that_was_moved_to_no_one_else_waits_when_its_worker_leaves() -> None:
    bench = Bench(**NEVER_LOST)
    first, client = bench.worker("a"), bench.client()
    id = client.submit(1)
    first.publish(first.chunk(0, 7))
    drained(client, "a", move=True)
    first.send(m.Goodbye("stopped"))
    assert bench.state.requests[id].state is RequestState.WAITING
    assert bench.worker("b").dispatches[0].prefix == [7]


# --- the worker --------------------------------------------------------------------------------------


def test_a_worker_reports_an_order_of_one_broker_to_all() -> None:
    rig = joined().receive(m.Drain())
    beat = rig.sent(m.WorkerHeartbeat)[-1]
    assert (beat.state, beat.drained, beat.moving) == ("draining", True, False)
    assert len(rig.receive(dispatch(1), b"p").sent(m.Reject)) == 1
    beat = rig.receive(m.Drain(move=True)).sent(m.WorkerHeartbeat)[-1]
    assert (beat.state, beat.drained, beat.moving) == ("draining", True, True)
    beat = rig.receive(m.Drain(undo=True)).sent(m.WorkerHeartbeat)[-1]
    assert (beat.state, beat.drained, beat.moving) == ("ready", False, False)
    assert len(rig.receive(dispatch(2), b"p").sent(m.Accept)) == 1


@pytest.mark.parametrize("undo", [True, False])
def test_a_worker_that_leaves_is_not_kept_by_an_order(undo: bool) -> None:
    rig = running(1).on(e.StopRequested()).receive(m.Drain(undo=undo))
    assert rig.sent(m.WorkerHeartbeat)[-1].state == "draining"
    for _ in range(51):
        rig.alive(100).on(proto.Step([]))
    assert [exit.text for exit in rig.take(e.Exit)] == ["stopped; 1 runs go on elsewhere"]


def test_a_worker_says_in_its_hello_whether_it_has_had_an_order() -> None:
    assert not loaded().sent(m.WorkerHello)[-1].ordered
    rig = joined().receive(m.Drain()).receive(m.Drain(undo=True)).clear()
    rig.receive(m.Problem(ErrorInfo(Code.UNKNOWN_SESSION, "who?"))).wait(200)
    assert rig.sent(m.WorkerHello)[-1].ordered
