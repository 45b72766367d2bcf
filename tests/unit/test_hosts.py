"""Hosts at a broker: sessions, wishes, what waiting requests are shown, failures, holds."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llambo.broker import housekeeping
from llambo.mesh.wire import limits, reports
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.identity import Identity
from tests.unit.broker_bench import Bench, Client, Worker, request_id

NEVER_LOST = {"lease_ms": 10**7, "client_lease_ms": 10**7}


def model(name: str, state: m.HostedState = "stored", size: int = 60, **fields: Any) -> m.HostedModel:
    return m.HostedModel(name, state=state, needs={"ram": size}, worker=f"box-{name}", **fields)


def asking(client: Client, what: str, argument: str = "") -> Any:
    client.send(m.Query(1, what, argument))
    return msgspec.msgpack.decode(client.received_last(m.Result)[-1].data)


def held(client: Client, name: str, **fields: Any) -> reports.HoldReply:
    client.send(m.HoldModel(2, name, **fields))
    return msgspec.msgpack.decode(client.received_last(m.Result)[-1].data, type=reports.HoldReply)


def notes(bench: Bench, client: Client) -> dict[bytes, str]:
    bench.pass_time(200)
    return client.received(m.BrokerHeartbeat)[-1].notes


def row(client: Client, name: str) -> reports.ModelRow:
    rows = msgspec.convert(asking(client, "models"), list[reports.ModelRow])
    return next(each for each in rows if each.model == name)


def served(bench: Bench, name: str, slots: int = 1) -> Worker:
    """The worker of a model of the host `box`."""
    return bench.worker(f"box-{name}", slots=slots, model=name)


# --- a model on demand ---------------------------------------------------------------------------------


def test_a_request_waits_while_its_model_is_loaded_and_is_told_why() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a"), model("b")), bench.client()
    # When a request comes for a model that is not loaded
    client.submit(1, model="a")
    # Then its host is asked for it, and nothing else
    assert host.wishes == (["a"], [])
    assert notes(bench, client) == {request_id(1): "box is about to load a"}
    host.report(model("a", "loading", percent=40, load_ms=10_000), model("b"))
    assert host.wishes == ([], [])
    assert notes(bench, client) == {request_id(1): "loading a on box, 40 %, about 6 s"}
    assert asking(client, "requests")[0]["waits_for"] == "loading a on box, 40 %, about 6 s"
    worker = served(bench, "a")
    assert [each.id for each in worker.dispatches] == [request_id(1)]
    host.report(model("a", "ready", load_ms=10_000, loads=1), model("b"))
    assert notes(bench, client) == {}
    story = [step["detail"] for step in asking(client, "why", request_id(1).hex())["story"] if step["what"] == "waits"]
    assert story == ["box is about to load a", "loading a on box"]


def test_a_second_request_waits_for_the_same_load() -> None:
    bench = Bench(**NEVER_LOST)
    host, other = bench.host("box", model("a")), bench.host("other", model("a"))
    client = bench.client()
    client.submit(1, model="a")
    chosen, spared = (host, other) if host.wishes[0] else (other, host)
    client.submit(2, model="a")
    chosen.report(model("a", "loading"))
    client.submit(3, model="a")
    bench.pass_time(1_000)
    assert spared.received(m.PlaceModels) == []


def test_an_idle_model_makes_room_and_a_busy_one_does_not() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a", "ready"), model("b")), bench.client()
    worker = served(bench, "a")
    client.submit(1, model="a")
    client.submit(2, model="b")
    bench.pass_time(100)
    assert host.wishes == ([], [])
    assert "in use or held" in notes(bench, client)[request_id(2)]
    worker.end(0)
    bench.pass_time(100)
    assert host.wishes == (["b"], ["a"])
    assert row(client, "a").hosts[0].idle_ms >= 0


def test_a_worker_that_another_broker_uses_is_busy() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a", "ready"), model("b")), bench.client()
    worker = served(bench, "a")
    worker.beat(busy=1)
    client.submit(1, model="b")
    bench.pass_time(500)
    assert host.wishes == ([], [])
    worker.beat(busy=0)
    bench.pass_time(100)
    assert host.wishes == (["b"], ["a"])


def test_a_model_without_a_pause_makes_room_for_one_that_has_waited_long() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a", "ready"), model("b")), bench.client()
    worker = served(bench, "a")
    for number in (1, 2, 3):
        client.submit(number, model="a")
    client.submit(9, model="b")
    worker.end(0)
    assert len(worker.dispatches) == 2
    # When b has waited for ten seconds
    bench.pass_time(10_100)
    assert host.wishes == (["b"], ["a"])
    worker.beat(claims={worker.key(): 0}, seq=10**6)
    worker.end(0)
    # Then a gets no more, until b has had its turn
    assert len(worker.dispatches) == 2
    host.report(model("a", "unloading"), model("b"))
    worker.send(m.Goodbye())
    host.report(model("a"), model("b", "loading"))
    other = served(bench, "b")
    assert [each.id for each in other.dispatches] == [request_id(9)]


def test_a_wish_is_repeated_until_the_host_reports_it() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a")), bench.client()
    client.submit(1, model="a")
    host.beat(seq=0)  # it has not read it yet
    assert len(host.received(m.PlaceModels)) == 1
    host.beat()
    assert len(host.received(m.PlaceModels)) == 2
    host.report(model("a", "loading"))
    host.beat()
    assert host.received(m.PlaceModels)[-1].load == []
    assert len(host.received(m.PlaceModels)) == 3


def test_a_wish_ends_when_no_request_waits() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a")), bench.client()
    client.submit(1, model="a")
    assert host.wishes == (["a"], [])
    client.send(m.Cancel(request_id(1)))
    bench.pass_time(100)
    assert host.wishes == ([], [])


def test_a_second_copy_where_there_is_room() -> None:
    bench = Bench(**NEVER_LOST)
    bench.host("box", model("a", "ready"))
    other, client = bench.host("other", model("a")), bench.client()
    served(bench, "a")
    client.submit(1, model="a")
    bench.pass_time(100)
    assert other.wishes == ([], [])
    client.submit(2, model="a")
    bench.pass_time(100)
    assert other.wishes == (["a"], [])


def test_a_model_under_the_name_of_a_class() -> None:
    bench = Bench(**NEVER_LOST)
    host = bench.host("box", model("a"), node_class="gpu")
    client = bench.client()
    client.submit(1, model="@gpu")
    assert host.wishes == (["a"], [])
    assert notes(bench, client) == {request_id(1): "box is about to load a@gpu"}
    assert row(client, "a@gpu").hosts[0].host == "box"


def test_a_request_without_a_name_may_have_the_only_model() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a")), bench.client()
    client.submit(1)
    assert host.wishes == (["a"], [])
    host.report(model("a"), model("b"))
    client.submit(2)
    assert client.problems[-1].error.code is Code.MODEL_REQUIRED
    client.submit(3, model="c")
    assert client.problems[-1].error.code is Code.UNKNOWN_MODEL
    assert "a, b" in client.problems[-1].error.text


# --- failures ------------------------------------------------------------------------------------------


def test_a_failed_load_ends_its_requests_with_the_cause_and_the_next_try() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a"), model("b", size=10)), bench.client()
    client.submit(1, model="a")
    client.submit(2, model="b")
    host.report(model("a", "failed", note="corrupt file", retry_ms=5_000), model("b", "loading", size=10))
    (end,) = client.ends
    assert end.id == request_id(1)
    assert end.error is not None
    assert end.error.code is Code.ENGINE_FAILED
    assert end.error.text == "'a' could not be loaded on box: corrupt file; the next try is in 5 s"
    assert 4_900 <= end.error.retry_after_ms <= 5_000
    # A request within the pause is not held; one after it makes the host try again.
    client.submit(3, model="a")
    bench.pass_time(20)
    assert [each.id for each in client.ends] == [request_id(1), request_id(3)]
    bench.pass_time(5_000)
    client.submit(4, model="a")
    assert host.wishes == (["a"], [])
    assert {each.id for each in client.ends} == {request_id(1), request_id(3)}
    assert [entry.kind for entry in bench.state.journal.entries].count("model failed") == 1


def test_a_request_that_has_waited_too_long_learns_for_what() -> None:
    bench = Bench(**NEVER_LOST, queue_ms=5_000)
    host, client = bench.host("box", model("a", "ready"), model("b")), bench.client()
    served(bench, "a").beat(busy=1)
    client.submit(1, model="b")
    host.report(model("a", "ready", holders=["x"]), model("b"))
    bench.pass_time(7_000)
    end = client.ends[-1]
    assert end.id == request_id(1)
    assert end.error is not None and end.error.code is Code.QUEUE_TIMEOUT
    assert "last waiting for memory on box: what is loaded there is in use or held" in end.error.text


def test_a_request_is_not_given_up_before_it_is_decided_where_its_model_is_loaded() -> None:
    """Its model has had no worker for longer than a request waits for one, and a sweep comes right after it."""
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a", size=10), model("b", size=10)), bench.client()
    bench.pass_time(60_000)
    host.beat()
    client.submit(1, model="a")
    client.submit(2, model="b")
    assert host.wishes == (["a"], []), "the second decision is not made yet"
    housekeeping.sweep(bench.state, bench.now_ms)
    assert request_id(2) in bench.state.requests, "it has ended"
    assert bench.state.hosts.note("b") == "box is about to load b"


def test_a_failed_load_is_tried_at_another_host_first() -> None:
    bench = Bench(**NEVER_LOST)
    client = bench.client()
    hosts = [bench.host("box", model("a")), bench.host("other", model("a"))]
    client.submit(1, model="a")
    first = next(host for host in hosts if host.wishes[0])
    (second,) = [host for host in hosts if host is not first]
    first.report(model("a", "failed", note="no memory", retry_ms=1_000))
    assert client.ends == []
    assert second.wishes == (["a"], [])
    # When the first one could try again before the second one has failed, the request does not go back and forth
    second.report(model("a", "loading"))
    bench.pass_time(2_000)
    second.report(model("a", "failed", note="corrupt", retry_ms=1_000))
    assert client.ends[-1].error is not None
    assert "on box: no memory; on other: corrupt" in client.ends[-1].error.text


def test_a_load_that_its_host_tries_again_at_once_has_not_failed() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a")), bench.client()
    client.submit(1, model="a")
    host.report(model("a", "failed", note="out of memory", retry_ms=1))
    bench.pass_time(200)
    assert client.ends == []
    assert host.wishes == (["a"], [])


def test_a_model_that_can_never_be_loaded() -> None:
    bench = Bench(**NEVER_LOST)
    bench.host("box", model("a", size=2**40), model("b", "failed", note="it cannot rerank"))
    client = bench.client()
    for number, name in enumerate(("a", "b")):
        client.submit(number, model=name)
        bench.pass_time(20)
    texts = [end.error.text for end in client.ends if end.error is not None]
    assert texts == [
        "'a' could not be loaded on box: it needs 1048576 MiB of ram, and the budget is 0 MiB",
        "'b' could not be loaded on box: it cannot rerank",
    ]


def test_a_host_that_is_lost_takes_its_wishes_with_it() -> None:
    bench = Bench(**NEVER_LOST, hold_ms=3_000)
    host, client = bench.host("box", model("a")), bench.client()
    client.submit(1, model="a")
    host.send(m.Goodbye())
    assert notes(bench, client) == {}
    bench.pass_time(2_000)
    assert client.ends == []
    bench.pass_time(2_000)
    assert client.ends[-1].error is not None
    assert client.ends[-1].error.code is Code.NO_WORKER
    client.submit(2, model="a")
    assert client.problems[-1].error.code is Code.NO_WORKER


def test_a_loading_host_that_is_lost_is_replaced_by_another() -> None:
    bench = Bench(lease_ms=1_000, client_lease_ms=10**7)
    client = bench.client()
    host = bench.host("box", model("a"))
    client.submit(1, model="a")
    host.report(model("a", "loading"))
    other = bench.host("other", model("a"))
    assert other.wishes == ([], [])
    for _ in range(12):
        other.beat()
        bench.pass_time(100)
    assert other.wishes == (["a"], [])


# --- sessions and access -------------------------------------------------------------------------------


def test_a_host_needs_a_key_of_a_worker_and_a_name_that_fits() -> None:
    bench = Bench()
    bench.keys(Identity("gpu", "worker"), Identity("me", "client"))
    assert bench.host("gpu-box", user="gpu").received(m.Welcome)
    refused = [bench.host(name, user=user).received(m.Problem) for name, user in (("x", "gpu"), ("y", "me"), ("z", ""))]
    assert [each.error.code for (each,) in refused] == [Code.FORBIDDEN, Code.UNAUTHORIZED, Code.UNAUTHORIZED]
    taken = bench.host("gpu-box", user="gpu", incarnation=b"other").received(m.Problem)
    assert taken[0].error.code is Code.NAME_TAKEN
    bench.keys(Identity("me", "client"))
    assert not bench.state.hosts.sessions


def test_a_session_of_a_host_is_for_hosts() -> None:
    bench = Bench(**NEVER_LOST)
    host = bench.host("box", model("a"))
    host.send(m.WorkerHeartbeat(beat=1))
    assert host.received_last(m.Problem)[-1].error.code is Code.UNKNOWN_SESSION
    worker = bench.worker()
    worker.send(m.HostHeartbeat())
    assert worker.received_last(m.Problem)[-1].error.code is Code.UNKNOWN_SESSION


def test_the_report_is_echoed_and_the_host_that_does_not_read_gets_no_wishes() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a"), model("b")), bench.client()
    bench.state.hosts.by_name["box"].backlog.limit = 2_000
    bench.pass_time(3_000)
    assert host.received(m.BrokerHeartbeat)[-1].echo == 1
    client.submit(1, model="a")
    bench.pass_time(500)
    assert host.received(m.PlaceModels) == []
    host.beat()
    assert host.wishes == (["a"], [])


def test_a_worker_of_another_key_is_not_that_of_a_host() -> None:
    bench = Bench(**NEVER_LOST)
    bench.keys(Identity("box", "worker"), Identity("box-a", "worker"), Identity("me", "client"))
    bench.host("box", model("a", "ready"), model("b"), user="box")
    bench.worker("box-a", model="a", user="box-a")
    client = bench.client(user="me")
    client.submit(1, model="b")
    bench.pass_time(500)
    assert "in use or held" in notes(bench, client)[request_id(1)]


def test_a_limited_key_neither_loads_nor_evicts_what_it_may_not_use() -> None:
    bench = Bench(**NEVER_LOST)
    bench.keys(Identity("box", "worker"), Identity("small", "client", models=("b",)), Identity("all", "client"))
    host = bench.host("box", model("a", "ready"), model("b"), user="box")
    bench.worker("box-a", model="a", user="box")
    small, anyone = bench.client(user="small"), bench.client(b"d", user="all")
    small.submit(1, model="a")
    assert small.problems[-1].error.code is Code.FORBIDDEN
    small.send(m.HoldModel(3, "a"))
    assert (small.problems[-1].error.code, small.problems[-1].query) == (Code.FORBIDDEN, 3)
    small.submit(2, model="b")
    bench.pass_time(200)
    assert host.wishes == ([], [])
    assert [each["model"] for each in asking(small, "models")] == ["b"]
    anyone.submit(3, model="b")
    bench.pass_time(200)
    assert host.wishes == (["b"], ["a"])


# --- holding -------------------------------------------------------------------------------------------


def test_a_held_model_is_loaded_and_reported() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a")), bench.client()
    reply = held(client, "a", holder="editor", ttl_ms=60_000)
    assert (reply.host, reply.state, reply.holder, reply.ttl_ms) == ("box", "stored", "editor", 60_000)
    assert reply.note == "box is about to load a"
    (order,) = host.received(m.Hold)
    assert (order.model, order.holder, order.ttl_ms, order.undo) == ("a", "editor", 60_000, False)
    host.beat()  # it has read it, and does not report it
    assert len(host.received(m.Hold)) == 2
    host.report(model("a", "ready", holders=["editor"]))
    host.beat()
    assert len(host.received(m.Hold)) == 2
    assert row(client, "a").hosts[0].holders == ["editor"]
    # Renewed, and given back
    held(client, "a", holder="editor", ttl_ms=60_000)
    assert len(host.received(m.Hold)) == 3
    host.beat()
    held(client, "a", holder="editor", undo=True)
    assert host.received(m.Hold)[-1].undo
    host.beat()
    assert len(host.received(m.Hold)) == 5
    host.report(model("a", "ready"))
    assert not bench.state.hosts.holds


def test_a_model_is_held_where_it_is_loaded_or_on_the_host_that_is_named() -> None:
    bench = Bench(**NEVER_LOST)
    bench.host("box", model("a"))
    other, client = bench.host("other", model("a", "ready")), bench.client()
    assert held(client, "a").host == "other"
    assert other.received(m.Hold)[0].holder == "anyone"
    assert held(client, "a", host="box", holder="x").host == "box"
    for order, code in (
        (m.HoldModel(5, "a", "nowhere"), Code.UNKNOWN_WORKER),
        (m.HoldModel(6, "z"), Code.UNKNOWN_MODEL),
    ):
        client.send(order)
        assert client.problems[-1].error.code is code


def test_what_is_held_is_not_evicted_but_may_evict() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a", "ready"), model("b")), bench.client()
    served(bench, "a")
    held(client, "b", holder="x")
    bench.pass_time(100)
    assert host.wishes == (["b"], ["a"])
    host.report(model("a"), model("b", "ready", holders=["x"]))
    client.submit(1, model="a")
    bench.pass_time(500)
    assert host.wishes == ([], [])


def test_a_held_model_that_is_not_loaded_is_still_wanted() -> None:
    bench = Bench(**NEVER_LOST)
    host = bench.host("box", model("a", "ready"), model("b", holders=["x"]))
    served(bench, "a")
    bench.pass_time(100)
    assert host.wishes == (["b"], ["a"])


def test_an_admin_unloads_a_model() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a", "ready", holders=["x", "y"], pinned=True)), bench.client()
    held(client, "a", undo=True)
    order = host.received(m.Hold)[-1]
    assert (order.holder, order.undo) == ("", True)
    host.report(model("a", "ready"))
    host.beat()
    assert len(host.received(m.Hold)) >= 2
    host.report(model("a", "unloading"))
    host.beat()
    assert not bench.state.hosts.holds


def test_a_model_that_is_held_again_is_not_unloaded_by_the_order_before() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a")), bench.client()
    held(client, "a", undo=True)
    assert [hold.undo for hold in bench.state.hosts.holds] == [True]
    held(client, "a", holder="x")
    assert [hold.undo for hold in bench.state.hosts.holds] == [False]
    host.report(model("a", "ready", holders=["x"]))
    host.beat()
    assert not bench.state.hosts.holds
    assert not host.received(m.Hold)[-1].undo


def test_a_holder_belongs_to_its_key() -> None:
    bench = Bench(**NEVER_LOST)
    bench.keys(
        Identity("box", "worker"), *(Identity(name, "client") for name in ("ann", "bob")), Identity("op", "admin")
    )
    host = bench.host("box", model("a"), user="box")
    ann, bob, op = (bench.client(name.encode(), user=name) for name in ("ann", "bob", "op"))
    assert held(ann, "a", holder="x", ttl_ms=0).ttl_ms == 3_600_000
    host.report(model("a", "ready", holders=["ann/x"]))
    orders = len(host.received(m.Hold))
    assert held(bob, "a", holder="x", undo=True).holder == "bob/x"
    assert held(bob, "a", holder="", undo=True).holder == "bob"
    assert held(bob, "a", holder="ann/x", undo=True).holder == "bob/ann/x"
    assert len(host.received(m.Hold)) == orders
    assert row(bob, "a").hosts[0].holders == []
    assert row(bob, "a").hosts[0].held == 1
    assert row(op, "a").hosts[0].holders == ["ann/x"]
    bob.send(m.HoldModel(7, "a", pin=True))
    assert bob.problems[-1].error.code is Code.FORBIDDEN
    assert held(op, "a", holder="ann/x", undo=True).holder == "ann/x"
    assert host.received(m.Hold)[-1].holder == "ann/x"
    # Its own may be named in full, as in a reply
    assert held(ann, "a", holder="ann/x", undo=True).holder == "ann/x"


def test_a_model_that_workers_without_a_host_serve_needs_no_holder() -> None:
    bench = Bench(**NEVER_LOST)
    bench.worker(model="a")
    reply = held(bench.client(), "a")
    assert (reply.state, reply.host) == ("ready", "")
    assert "always loaded" in reply.note


def test_more_holders_than_a_host_takes_are_refused() -> None:
    bench = Bench(**NEVER_LOST)
    holders = [f"h{number}" for number in range(limits.HOLDERS_PER_MODEL)]
    host, client = bench.host("box", model("a", "ready", holders=holders)), bench.client()
    client.send(m.HoldModel(7, "a", holder="x"))
    assert (client.problems[-1].error.code, client.problems[-1].query) == (Code.BUSY, 7)
    assert "64 holders" in client.problems[-1].error.text
    assert held(client, "a", holder="h3").state == "ready", "who holds it already may renew it"
    assert [hold.holder for hold in host.received(m.Hold)] == ["h3"]
    # Another broker was faster: the host refuses it, and is not asked again
    held(client, "a", holder="h3", undo=True)
    host.report(model("a", "ready", holders=holders[1:]))
    held(client, "a", holder="y")
    host.report(model("a", "ready", holders=holders))
    assert [hold.holder for hold in bench.state.hosts.holds if not hold.undo] == []


def test_one_key_leaves_holders_and_orders_to_others() -> None:
    bench = Bench(**NEVER_LOST)
    bench.keys(Identity("box", "worker"), Identity("ann", "client"), Identity("bob", "client"), Identity("op", "admin"))
    mine = [f"ann/{number}" for number in range(limits.HOLDERS_PER_MODEL // 2)]
    host = bench.host("box", model("a", "ready", holders=mine), *map(model, "bcde"), user="box")
    ann, bob, op = (bench.client(name.encode(), user=name) for name in ("ann", "bob", "op"))
    # A key has at most half of the holders of a model at a host
    ann.send(m.HoldModel(7, "a", holder="more"))
    assert ann.problems[-1].error.code is Code.BUSY
    for client in (bob, op):
        held(client, "a", holder="x")
    assert [hold.holder for hold in host.received(m.Hold)] == ["bob/x", "op/x"]
    # And a part of the orders that wait
    for name in "bcde":
        for number in range(40):
            ann.send(m.HoldModel(8, name, holder=f"n{number}"))
        assert sum(hold.model == name for hold in bench.state.hosts.holds) <= limits.HOLDERS_PER_MODEL // 2
    assert len(bench.state.hosts.holds) == 2 + 100 and ann.problems[-1].error.code is Code.BUSY
    bob.send(m.HoldModel(9, "b"))
    assert not bob.problems


def test_a_holder_whose_name_is_too_long_is_refused() -> None:
    bench = Bench(**NEVER_LOST)
    long = "n" * 100
    bench.keys(Identity("box", "worker"), Identity(long, "client"))
    host, client = bench.host("box", model("a"), user="box"), bench.client(user=long)
    client.send(m.HoldModel(7, "a", holder="x" * 48))
    assert client.problems[-1].error.code is Code.BAD_REQUEST
    held(client, "a", holder="x" * 20)
    assert [len(hold.holder) for hold in host.received(m.Hold)] == [121]


def test_a_hold_without_hope_is_refused_with_the_cause() -> None:
    bench = Bench(**NEVER_LOST)
    bench.host("box", model("a", "failed", note="corrupt file", retry_ms=60_000))
    reply = held(bench.client(), "a")
    assert reply.state == "failed"
    assert "corrupt file" in reply.note
    assert not bench.state.hosts.holds
    # The answer says so: it would fill the log of a broker to write it there as well, each time that one asks
    assert not [entry for entry in bench.state.journal.entries if entry.kind == "model not held"]


# --- reports -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "kind"), [("hosts", list[reports.HostRow]), ("models", list[reports.ModelRow])])
def test_rows_have_every_field_that_the_broker_sends(what: str, kind: Any) -> None:
    bench = Bench(**NEVER_LOST)
    bench.host("box", model("a", "ready", kind="embed", holders=["x"]), model("b"), node_class="gpu")
    client = bench.client()
    client.submit(1, model="b")
    data = asking(client, what)
    assert msgspec.to_builtins(msgspec.convert(data, kind)) == data


def test_the_memory_of_a_host() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a", "ready"), model("b")), bench.client()
    served(bench, "a")
    client.submit(1, model="b")
    bench.pass_time(100)
    (found,) = msgspec.convert(asking(client, "hosts"), list[reports.HostRow])
    assert (found.memory["ram"].budget, found.memory["ram"].used) == (100, 60)
    assert (found.models, found.loaded, found.load, found.evict) == (2, ["a"], ["b"], ["a"])
    assert (found.host, found.machine) == (host.name, "machine")
    assert row(client, "a").kind == "generate"
    assert row(client, "a").hosts[0].bytes == 60


# --- adapters ---


def test_a_request_for_an_adapter_loads_the_model_at_a_host_that_has_it() -> None:
    bench = Bench(**NEVER_LOST)
    plain, client = bench.host("other", model("a")), bench.client()
    host = bench.host("box", model("a", adapters=["pirate"]), model("b"))
    names = [each.model for each in msgspec.convert(asking(client, "models"), list[reports.ModelRow])]
    assert names == ["a", "a+pirate", "b"]
    client.submit(1, model="a+pirate")
    assert (host.wishes, plain.wishes) == ((["a"], []), ([], []))
    # Both names are served by one load
    client.submit(2, model="a")
    assert host.wishes == (["a"], [])
    host.report(model("a", "ready", adapters=["pirate"]), model("b"))
    worker = bench.worker("box-a", slots=2, model="a", fingerprint="f", adapters={"pirate": "1" * 64})
    assert sorted(given.model for given in worker.dispatches) == ["a", "a+pirate"]
    # A hold by that name is one of the model
    held(client, "a+pirate", holder="x")
    assert host.received(m.Hold)[-1].model == "a"


def test_an_adapter_that_no_host_has_is_refused_and_one_that_appears_is_served() -> None:
    bench = Bench(**NEVER_LOST)
    host, client = bench.host("box", model("a", adapters=["pirate"]), node_class="tiny"), bench.client()
    client.submit(1, model="a+poet")
    assert client.problems[-1].error.code is Code.UNKNOWN_MODEL
    assert client.problems[-1].error.text.endswith("with adapters of a there is: a+pirate")
    host.report(model("a", adapters=["pirate", "poet"]))
    client.submit(2, model="a+poet@tiny")
    assert host.wishes == (["a"], [])
