"""Several brokers: which one a client chooses, what a worker reports to each, and clients that come from another."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from llambo.mesh.client import client_events as c
from llambo.mesh.client.client_core import ClientCore
from llambo.mesh.link import sockets
from llambo.mesh.link.link import Lookup
from llambo.mesh.link.link_core import (
    BACKOFF_MS,
    CUT_MS,
    SILENT_MS,
    SOON_MS,
    TRY_MS,
    ConnectionChange,
    LinkState,
    OpenControl,
    Send,
)
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tokens, transfer
from llambo.mesh.wire.codec import NO_SESSION
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.worker.agent import events as e
from tests.unit.broker_bench import Bench, Client, request_id, small_mesh
from tests.unit.test_worker_core import LATER, SESSION, Rig, dispatch, key_of, loaded

# --- a client's link -----------------------------------------------------------------------------------


class Wanderer:
    """A client core that knows several brokers."""

    def __init__(self, brokers: int) -> None:
        self.core = ClientCore()
        self.now = 1_000
        self.went: list[int] = []
        self.sent: list[m.Message] = []
        self.handle(c.BrokersFound(brokers))

    def handle(self, event: c.Event) -> None:
        actions = self.core.handle(event, self.now)
        self.went += [action.target for action in actions if isinstance(action, OpenControl)]
        self.sent += [action.message for action in actions if isinstance(action, Send)]

    def see(self, *signs: ConnectionChange) -> None:
        for sign in signs:
            self.handle(c.ConnectionChanged(sign))

    def welcome(self, lease_ms: int = 10_000) -> None:
        welcome = m.Welcome(b"session!", 7333, b"t" * 16, lease_ms=lease_ms)
        self.handle(c.ControlArrived(NO_SESSION, [(welcome, b"")], []))
        assert self.core.link.welcomed

    def wait(self, length_ms: int) -> None:
        end = self.now + length_ms
        while (due := self.core.next_wakeup_ms()) <= end:
            self.now = max(self.now, due)
            self.handle(c.Tick())
        self.now = end


def test_who_is_refused_goes_to_the_next_at_once_and_pauses_after_a_round() -> None:
    client = Wanderer(3)
    client.see(ConnectionChange.REFUSED, ConnectionChange.REFUSED)
    assert client.went == [0, 1, 2]
    client.see(ConnectionChange.REFUSED)
    client.wait(BACKOFF_MS[0] - 1)
    assert client.went == [0, 1, 2]
    client.wait(1)
    assert client.went == [0, 1, 2, 0]


def test_a_broker_that_does_not_answer_is_not_waited_for_long() -> None:
    client = Wanderer(2)
    client.wait(TRY_MS - 1)
    assert client.went == [0]
    client.wait(1)
    assert client.went == [0, 1]


def test_a_broken_connection_that_is_not_to_be_had_again_is_a_broker_that_is_gone() -> None:
    client = Wanderer(2)
    client.welcome()
    client.see(ConnectionChange.CONNECTED, ConnectionChange.LOST)
    assert client.went == [0]
    client.see(ConnectionChange.REFUSED)
    assert client.went == [0, 1]


def test_a_connection_that_blinks_is_stayed_with() -> None:
    client = Wanderer(2)
    client.welcome()
    client.see(ConnectionChange.LOST)
    client.wait(CUT_MS - 1)
    client.see(ConnectionChange.CONNECTED)
    client.wait(CUT_MS)
    assert client.went == [0]
    client.see(ConnectionChange.LOST)
    client.wait(CUT_MS)
    assert client.went == [0, 1]


def test_a_silent_broker_is_left_with_a_goodbye() -> None:
    client = Wanderer(2)
    client.welcome()
    client.wait(SILENT_MS)
    assert client.went == [0, 1]
    assert any(isinstance(message, m.Goodbye) for message in client.sent)


def test_with_one_broker_there_is_nowhere_to_go() -> None:
    client = Wanderer(1)
    client.welcome()
    client.see(ConnectionChange.LOST, ConnectionChange.REFUSED)
    client.wait(SILENT_MS + CUT_MS)
    assert client.went == [0]
    assert client.core.link.welcomed
    assert not any(isinstance(message, m.Goodbye) for message in client.sent)


def test_a_restarted_broker_that_does_not_know_the_session_is_asked_again() -> None:
    client = Wanderer(2)
    client.welcome()
    unknown = m.Problem(LlamboError(Code.UNKNOWN_SESSION, "say hello first").info())
    client.handle(c.ControlArrived(b"session!", [(unknown, b"")], []))
    client.wait(BACKOFF_MS[0])
    assert client.went == [0, 0]


# --- names ---------------------------------------------------------------------------------------------


def test_a_list_is_several_addresses() -> None:
    assert sockets.split_all("tcp://a:1, b ,tcp://[::1]:9") == [("a", 1), ("b", sockets.DEFAULT_PORT), ("::1", 9)]
    with pytest.raises(LlamboError):
        sockets.split_all("tcp://a:1,http://b")


def test_a_name_stands_for_all_its_addresses_of_one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    four, six = socket.AF_INET, socket.AF_INET6

    def found(host: str, port: object, **kind: object) -> list[Any]:
        if host == "nowhere":
            raise OSError("no such name")
        return [(family, 1, 6, "", (ip, 0)) for family, ip in
                ((four, "10.0.0.1"), (six, "fe80::1"), (four, "10.0.0.2"), (four, "10.0.0.1"))]  # fmt: skip

    monkeypatch.setattr(socket, "getaddrinfo", found)
    assert sockets.resolve_all("tcp://mesh:5,nowhere,127.0.0.1:6,mesh:5") == [
        ("10.0.0.1", 5), ("10.0.0.2", 5), ("127.0.0.1", 6)]  # fmt: skip
    with pytest.raises(LlamboError, match="nowhere"):
        sockets.resolve_all("nowhere")


def test_a_lookup_blocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = threading.Event()
    monkeypatch.setattr(sockets, "resolve_all", lambda addresses: [("10.0.0.1", 5)] if slow.wait(30) else [])
    lookup, dropped = Lookup("mesh"), Lookup("mesh")
    assert not lookup.done
    dropped.close()  # while its thread still waits for the resolver
    slow.set()
    with open(lookup.fileno(), "rb", closefd=False) as pipe:
        assert pipe.read(1) == b"\0"
    assert lookup.found == [("10.0.0.1", 5)]
    lookup.close()


# --- a worker ------------------------------------------------------------------------------------------


def linked(*, slots: int = 4) -> Rig:
    rig = loaded(slots, brokers=("tcp://a:1", "tcp://b:1"))
    for link, session in ((0, SESSION), (1, LATER)):
        rig.on(e.ControlArrived(link, NO_SESSION, [(m.Welcome(session, 7332), b"")]))
    rig.wait(200).clear()
    return rig


def given(rig: Rig, link: int, number: int) -> Rig:
    return rig.on(e.ControlArrived(link, (SESSION, LATER)[link], [(dispatch(number), b"p")]))


def sent(rig: Rig, kind: type[Any]) -> list[tuple[int, Any]]:
    return [(send.link, send.message) for send in rig.take(Send) if isinstance(send.message, kind)]


def test_each_broker_learns_at_once_what_the_other_has_given() -> None:
    rig = given(linked(), 0, 1).wait(SOON_MS)
    assert [(link, beat.busy) for link, beat in sent(rig, m.WorkerHeartbeat)] == [(1, 1)]
    given(rig, 1, 2).wait(SOON_MS)
    assert [(link, beat.busy) for link, beat in sent(rig, m.WorkerHeartbeat)] == [(0, 1)]


def test_a_slot_is_not_sold_twice_and_the_refusal_comes_with_the_load() -> None:
    rig = given(linked(slots=1), 0, 1).wait(SOON_MS).clear()
    given(rig, 1, 2).wait(SOON_MS)
    found = [(send.link, type(send.message).__name__) for send in rig.actions if isinstance(send, Send)]
    assert found == [(1, "Reject"), (1, "WorkerHeartbeat")]


def test_the_same_request_from_two_brokers_is_two_runs() -> None:
    rig = linked()
    twin = m.Dispatch(bytes([1]) * 16, b"another!", 1, "fake", 100, 7)
    given(rig, 0, 1).on(e.ControlArrived(1, LATER, [(twin, b"p")])).wait(200)
    claims = {link: beat.claims for link, beat in sent(rig, m.WorkerHeartbeat)}
    assert claims == {0: {key_of(1): 0}, 1: {bytes([1]) * 16 + b"another!": 0}}


def test_a_broken_connection_offers_the_runs_to_the_other_broker() -> None:
    rig = given(linked(), 0, 1).clear()
    rig.on(e.ConnectionChanged(0, ConnectionChange.LOST)).on(e.ConnectionChanged(0, ConnectionChange.REFUSED))
    assert [(link, offer.work.id) for link, offer in sent(rig, m.Orphan)] == [(1, bytes([1]) * 16)]


def test_only_who_has_a_run_may_end_it() -> None:
    rig = given(linked(), 0, 1).clear()
    rig.on(e.ControlArrived(1, LATER, [(m.Cancel(bytes([1]) * 16, b"dispatch"), b"")]))
    assert [(link, end.count, end.reason) for link, end in sent(rig, m.End)] == [(1, 0, "cancelled")]
    rig.step(key_of(1), [5], "length")
    assert [(link, end.reason) for link, end in sent(rig, m.End)] == [(0, "length")]
    rig.on(e.ControlArrived(1, LATER, [(m.EndAck([key_of(1)]), b"")]))
    assert len(rig.core.runs) == 1


def test_a_cancelled_run_is_offered_to_no_broker() -> None:
    rig = (
        given(linked(), 0, 1).on(e.ControlArrived(0, SESSION, [(m.Cancel(bytes([1]) * 16, b"dispatch"), b"")])).clear()
    )
    rig.on(e.ConnectionChanged(0, ConnectionChange.LOST)).on(e.ConnectionChanged(0, ConnectionChange.REFUSED))
    assert sent(rig, m.Orphan) == []
    assert len(rig.core.runs) == 0


# --- a broker ------------------------------------------------------------------------------------------


def back(bench: Bench, route: bytes, who: bytes = b"me") -> Client:
    """A client on a session of its own, known by its incarnation."""
    client = Client(bench, route)
    bench.state.registry.clients[client.session].hello = m.ClientHello(incarnation=who)
    return client


def held(number: int, ids: list[int], **fields: Any) -> tuple[m.InferenceRequest, bytes]:
    """The submit of a client that comes from another broker."""
    key = request_id(number) + b"\0\0\0\1old!"
    blob, size = transfer.pack(b"hello", [tokens.encode_chunk(key, 0, ids, [b"x"] * len(ids))] if ids else [])
    asked = m.InferenceRequest(request_id(number), "m", 10, have=len(ids), resume=True, prompt_bytes=size, **fields)
    return asked, blob


def comes_from_another(bench: Bench, route: bytes, ids: list[int], fingerprint: str = "") -> Client:
    """The client of request 1 again, with the tokens it holds."""
    client = back(bench, route)
    asked, blob = held(1, ids, fingerprint=fingerprint)
    client.send(asked, blob=blob)
    return client


def attach(ids: list[int], fingerprint: str) -> m.Attach:
    """Of request 1, by a client that holds these tokens of it."""
    chunk = tokens.encode_chunk(request_id(1) + bytes(8), 0, ids, [b"x"] * len(ids))
    return m.Attach(request_id(1), len(ids), [chunk], fingerprint=fingerprint)


def orphan(ids: list[int], **fields: Any) -> tuple[m.Orphan, bytes]:
    """What a worker sends of a run of request 1 that another broker has dispatched."""
    key = request_id(1) + b"\0\0\0\1old!"
    blob, size = transfer.pack(b"hello", [tokens.encode_chunk(key, 0, ids, [b"x"] * len(ids))])
    return m.Orphan(m.Dispatch(request_id(1), key[16:], 5, "m", 10, 7, prompt_bytes=size, **fields)), blob


def test_the_load_that_others_make_counts() -> None:
    bench = Bench()
    busy, idle = bench.worker("busy", slots=4), bench.worker("idle", slots=4)
    busy.beat(busy=3)
    client = bench.client()
    for number in range(3):
        client.submit(number)
    assert (len(busy.dispatches), len(idle.dispatches)) == (0, 3)


def test_a_client_that_was_elsewhere_goes_on_with_what_it_holds() -> None:
    bench = Bench(adopt_ms=100)
    worker, client = bench.worker(), back(bench, b"1")
    client.submit(1)
    worker.publish(worker.chunk(0, 1, 2, 3))
    # On the other broker its answer continued differently.
    again = comes_from_another(bench, b"2", [1, 2, 9, 9])
    assert [cancel.dispatch for cancel in worker.received(m.Cancel)] == [worker.dispatches[0].dispatch]
    worker.end(3, reason="cancelled")
    bench.pass_time(150)
    worker.beat()
    assert worker.dispatches[-1].prefix == [1, 2, 9, 9]
    assert not again.problems and not again.ends


def test_who_follows_another_continuation_here_is_not_disturbed() -> None:
    bench = Bench()
    worker, client, other = bench.worker(), back(bench, b"1"), back(bench, b"2", b"another key")
    client.submit(1)
    other.send(m.Attach(request_id(1)))
    worker.publish(worker.chunk(0, 1, 2, 3))
    again = comes_from_another(bench, b"3", [1, 9])
    assert [problem.error.code for problem in again.problems] == [Code.EXPIRED]
    assert not worker.received(m.Cancel)


def test_what_was_cancelled_for_want_of_its_client_goes_on_when_that_is_back() -> None:
    bench = Bench(adopt_ms=100)
    worker, client = bench.worker(), back(bench, b"1")
    client.submit(1)
    client.send(m.Goodbye())
    worker.end(0, reason="cancelled")
    again = comes_from_another(bench, b"2", [1, 2])
    bench.pass_time(150)
    assert not again.ends
    assert worker.dispatches[-1].prefix == [1, 2]


def test_what_its_user_has_cancelled_stays_cancelled() -> None:
    bench = Bench()
    bench.worker()
    client = back(bench, b"1")
    client.submit(1)
    client.send(m.Cancel(request_id(1)))
    again = comes_from_another(bench, b"2", [])
    assert [end.reason for end in again.ends] == ["cancelled"]


def test_an_attach_from_elsewhere_waits_for_those_who_know_but_not_for_ever() -> None:
    bench = Bench(startup_grace_ms=1_000)
    bench.worker()
    bench.pass_time(5_000)
    client = bench.client()
    client.send(m.Attach(request_id(1), resume=True))
    assert not client.problems
    bench.pass_time(3_000)
    assert [problem.error.code for problem in client.problems] == [Code.UNKNOWN_REQUEST]


def test_a_detached_run_of_another_broker_is_taken_in_for_who_attaches() -> None:
    bench = Bench(startup_grace_ms=1_000)
    worker = bench.worker()
    bench.pass_time(1_500)
    client = bench.client()
    run, blob = orphan([1, 2], detached=True)
    worker.send(run, blob=blob)
    assert not worker.received(m.Adopt)
    client.send(m.Attach(request_id(1)))
    assert [adopt.dispatch for adopt in worker.received(m.Adopt)] == [run.work.dispatch]
    assert [page.total for page in client.received(m.Page)] == [2]


def test_an_orphan_that_is_reported_twice_is_adopted_and_not_stopped() -> None:
    _, worker, client = small_mesh()
    for ids in ([1, 2], [1, 2, 3, 4]):
        run, blob = orphan(ids)
        worker.send(run, blob=blob)
        if len(ids) == 2:
            asked, given_back = held(1, [1, 2])
            client.send(asked, blob=given_back)
    assert len(worker.received(m.Adopt)) == 2 and not worker.received(m.Cancel)


def test_a_run_that_has_grown_since_it_was_reported_is_waited_for() -> None:
    _, worker, client = small_mesh()
    run, blob = orphan([1, 2])
    worker.send(run, blob=blob)
    asked, blob = held(1, [1, 2, 3])
    client.send(asked, blob=blob)
    assert not worker.received(m.Cancel) and not worker.received(m.Adopt)
    run, blob = orphan([1, 2, 3, 4])
    worker.send(run, blob=blob)
    assert worker.received(m.Adopt) and not worker.received(m.Cancel)


def test_link_states_of_a_client_that_changes_brokers_are_legal() -> None:
    client = Wanderer(2)
    for _ in range(5):
        client.welcome()
        client.see(ConnectionChange.LOST, ConnectionChange.REFUSED)
        assert client.core.link.state is LinkState.GREETING
    assert client.went == [0, 1, 0, 1, 0, 1]


def test_an_end_before_the_tokens_that_a_client_holds_is_not_its_end() -> None:
    bench = Bench(adopt_ms=100)
    worker, client = bench.worker(), back(bench, b"1")
    client.submit(1)
    worker.publish(worker.chunk(0, 1))
    worker.end(1, reason="error")
    client.send(m.EndAck([request_id(1)]))
    again = comes_from_another(bench, b"2", [1, 2, 3])
    bench.pass_time(150)
    assert not again.ends and not again.problems
    assert worker.dispatches[-1].prefix == [1, 2, 3]


@pytest.mark.parametrize(("cancelled", "ids"), [(True, [1]), (True, [1, 2, 3]), (False, [1, 2, 3])])
def test_an_end_that_is_out_of_date_is_not_the_end_of_who_attaches(cancelled: bool, ids: list[int]) -> None:
    """It was cancelled here for lack of a follower; or it ended here before the tokens that the client holds."""
    bench = Bench(adopt_ms=100, startup_grace_ms=1_000)
    bench.pass_time(2_000)
    worker, client = bench.worker(), back(bench, b"1")
    client.submit(1)
    worker.publish(worker.chunk(0, 1))
    if cancelled:
        client.send(m.Goodbye())
    worker.end(1, reason="cancelled" if cancelled else "stop")
    client.send(m.EndAck([request_id(1)]))
    follower = back(bench, b"2", b"another client")
    chunk = tokens.encode_chunk(request_id(1) + b"\0\0\0\1old!", 0, ids, [b"x"] * len(ids))
    follower.send(m.Attach(request_id(1), len(ids), [chunk], resume=True))
    assert not follower.ends and not follower.problems  # the client that submitted it may come from there as well
    comes_from_another(bench, b"3", ids)
    assert follower.received(m.Accepted) and not follower.ends
    bench.pass_time(150)
    assert worker.dispatches[-1].prefix == ids


def test_an_end_that_is_out_of_date_is_refused_to_all_who_attach() -> None:
    bench = Bench()
    worker, client = bench.worker(), back(bench, b"1")
    client.submit(1)
    worker.publish(worker.chunk(0, 1))
    client.send(m.Goodbye())
    worker.end(1, reason="cancelled")
    follower = bench.client()
    for asked in (m.Attach(request_id(1)), m.Attach(request_id(1), 2)):
        follower.send(asked)
        assert [problem.error.code for problem in follower.received_last(m.Problem)] == [Code.EXPIRED]
    assert not follower.ends


def test_who_got_further_elsewhere_goes_on_beside_those_who_follow_it_here() -> None:
    bench = Bench()
    worker, client, other = bench.worker(), back(bench, b"1"), back(bench, b"2", b"another client")
    client.submit(1)
    other.send(m.Attach(request_id(1)))
    worker.publish(worker.chunk(0, 1, 2, 3))
    again = comes_from_another(bench, b"3", [1, 2, 3, 4, 5])
    assert not again.problems and again.received(m.Accepted)
    assert [cancel.dispatch for cancel in worker.received(m.Cancel)] == [worker.dispatches[0].dispatch]
    assert worker.dispatches[-1].prefix == [1, 2, 3, 4, 5]
    other.send(m.Replay(request_id(1), 3))
    assert [page.total for page in other.received_last(m.Page)] == [5]
    # Stale tokens of the run that was cancelled do not count, those of the next one do.
    worker.publish(worker.chunk(3, 9, 9, 9, number=0), worker.chunk(5, 6, number=1))
    assert bench.state.requests[request_id(1)].transcript.ids() == [1, 2, 3, 4, 5, 6]


def test_who_brings_the_last_token_ends_it_for_all() -> None:
    bench = Bench()
    worker, client, other = bench.worker(), back(bench, b"1"), back(bench, b"2", b"another client")
    client.submit(1)
    other.send(m.Attach(request_id(1)))
    worker.publish(worker.chunk(0, 1))
    again = comes_from_another(bench, b"3", list(range(1, 11)))
    assert [(end.count, end.reason) for peer in (other, again) for end in peer.ends] == [(10, "length")] * 2


def test_who_brings_the_last_token_of_one_that_waits_ends_it_and_it_leaves_the_queue() -> None:
    bench = Bench()
    _, client, other = bench.worker(slots=1), back(bench, b"1"), back(bench, b"2", b"another client")
    client.submit(9)
    client.submit(1)
    other.send(m.Attach(request_id(1)))
    again = comes_from_another(bench, b"3", list(range(1, 11)))
    assert [(end.count, end.reason) for peer in (other, again) for end in peer.ends] == [(10, "length")] * 2
    assert bench.state.queue.count == 0


def test_who_got_further_with_one_that_waits_takes_it_to_the_workers_that_can_go_on() -> None:
    """It had a worker here, which was lost before its first token. The tokens decide who continues it."""
    bench = Bench()
    worker, client, other = bench.worker("w1", fingerprint="f"), back(bench, b"1"), back(bench, b"2", b"another client")
    client.submit(1)
    other.send(m.Attach(request_id(1)))
    worker.send(m.Goodbye())
    again = comes_from_another(bench, b"3", [1, 2, 3])
    assert not again.problems
    assert [lane.fingerprint for lane in bench.state.queue.lines] == ["f"]
    assert bench.worker("w2", fingerprint="f").dispatches[-1].prefix == [1, 2, 3]
    assert bench.state.queue.count == 0


@pytest.mark.parametrize("attaches", [False, True])
def test_who_got_further_with_another_file_goes_on_with_that_one(attaches: bool) -> None:
    bench = Bench()
    first = bench.worker("w1", fingerprint="f")
    client, other = back(bench, b"1"), back(bench, b"2", b"another client")
    client.submit(1)
    other.send(m.Attach(request_id(1)))
    assert first.dispatches
    second = bench.worker("w2", fingerprint="g")
    if attaches:
        again = bench.client()
        again.send(attach([1, 2, 3], "g"))
    else:
        again = comes_from_another(bench, b"3", [1, 2, 3], "g")
    assert not again.problems
    assert second.dispatches[-1].prefix == [1, 2, 3]
    # Who follows it here, and has no token, learns that.
    assert other.received(m.Accepted)[-1].fingerprint == "g"


def test_the_same_tokens_of_another_file_are_not_the_same_answer() -> None:
    bench = Bench(adopt_ms=100)
    first, client, other = bench.worker("w1", fingerprint="f"), back(bench, b"1"), back(bench, b"2", b"another client")
    client.submit(1)
    other.send(m.Attach(request_id(1)))
    first.publish(first.chunk(0, 1, 2, 3))
    for asked in ([1, 2], [1, 2, 3, 4]):
        late = bench.client()
        late.send(attach(asked, "g"))
        assert [problem.error.code for problem in late.received_last(m.Problem)] == [Code.EXPIRED]
    # Its only client, which holds those of the other file, begins it again with that one.
    other.send(m.Detach(request_id(1)))
    second = bench.worker("w2", fingerprint="g")
    again = comes_from_another(bench, b"3", [1, 2], "g")
    bench.pass_time(101)
    assert not again.problems
    assert second.dispatches[-1].prefix == [1, 2]


def test_an_answer_that_ended_is_not_the_rest_of_one_of_another_file() -> None:
    bench = Bench(adopt_ms=100)
    first, client = bench.worker("w1", fingerprint="f"), back(bench, b"1")
    client.submit(1)
    first.publish(first.chunk(0, 1, 2, 3))
    first.end(3)
    follower = bench.client()
    follower.send(attach([1, 2], "g"))
    assert [problem.error.code for problem in follower.problems] == [Code.EXPIRED]
    second = bench.worker("w2", fingerprint="g")
    comes_from_another(bench, b"3", [1, 2], "g")
    bench.pass_time(101)
    assert second.dispatches[-1].prefix == [1, 2]
