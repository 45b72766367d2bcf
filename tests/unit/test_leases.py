"""Leases, models that the holder of a lease has promised, and models of a class."""

from __future__ import annotations

from itertools import count
from typing import Any

import msgpack
import pytest

from llambo.mesh.wire import limits, naming
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code
from tests.unit.broker_bench import Bench, Client

ME, OTHER = b"the first", b"the other"
_numbers = count(1)


def asked(client: Client, holder: bytes, ms: int = 3_000, *, query: int = 0, **more: Any) -> dict[str, Any]:
    """What the broker answers."""
    client.send(m.Lease(query or next(_numbers), "fleet", holder, ms, **more))
    (result,) = client.received_last(m.Result)
    found: dict[str, Any] = msgpack.unpackb(result.data)
    return found


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.pass_time(limits.LEASE_MS)
    return bench


def reports(bench: Bench) -> list[str]:
    return [happening.text for happening in bench.state.journal.entries if happening.kind in ("lease", "fleet")]


def test_one_holds_it_and_the_other_after_it(bench: Bench) -> None:
    first, second = bench.client(b"a"), bench.client(b"b")
    assert asked(first, ME) == {"granted": True, "by": "somebody", "left_ms": 3_000}
    assert asked(second, OTHER)["granted"] is False
    bench.pass_time(2_000)
    assert asked(first, ME, renewal=True)["left_ms"] == 3_000
    bench.pass_time(2_999)
    assert asked(second, OTHER)["granted"] is False
    bench.pass_time(1)
    assert asked(second, OTHER)["granted"] is True
    assert asked(first, ME, renewal=True) == {"granted": False, "by": "somebody", "left_ms": 3_000}


def test_it_belongs_to_the_holder_and_not_to_a_session(bench: Bench) -> None:
    assert asked(bench.client(b"a"), ME)["granted"]
    assert asked(bench.client(b"b"), ME, renewal=True)["granted"]


def test_it_can_be_given_back(bench: Bench) -> None:
    first, second = bench.client(b"a"), bench.client(b"b")
    asked(first, ME)
    assert asked(second, OTHER, 0)["granted"] is False
    assert asked(second, OTHER)["granted"] is False
    assert asked(first, ME, 0) == {"granted": False, "by": "", "left_ms": 0}
    assert asked(second, OTHER)["granted"] is True


def test_a_broker_that_has_just_started_only_renews_it() -> None:
    bench = Bench()
    first, second = bench.client(b"a"), bench.client(b"b")
    assert asked(second, OTHER)["granted"] is False
    assert asked(first, ME, renewal=True)["granted"] is True
    bench.pass_time(limits.LEASE_MS)
    assert asked(second, OTHER)["granted"] is True  # the renewal was for 3 s and is over


def test_repeated_queries_report_an_event_once(bench: Bench) -> None:
    client = bench.client()
    for _ in range(3):  # asked again, because no answer came
        asked(client, ME, query=900, events=["spawned 2 tiny"])
    asked(client, ME, query=901, events=["spawned 2 tiny"])
    assert reports(bench) == ["spawned 2 tiny", "fleet: somebody has it", "spawned 2 tiny"]


def test_a_client_without_the_lease_reports_nothing(bench: Bench) -> None:
    asked(bench.client(b"a"), ME)
    asked(bench.client(b"b"), OTHER, events=["mine"], promised=["m"])
    assert "mine" not in reports(bench) and not bench.state.is_promised("m")


def test_there_are_not_any_number_of_them(bench: Bench) -> None:
    client = bench.client()
    for number in range(limits.LEASES + 1):
        client.send(m.Lease(next(_numbers), f"l{number}", ME, 3_000))
    (problem,) = client.problems
    assert problem.error.code is Code.BUSY


def test_a_request_for_a_promised_model_waits_until_its_worker_comes(bench: Bench) -> None:
    client = bench.client()
    client.submit(1, model="m")
    assert client.problems[-1].error.code is Code.NO_WORKER
    asked(client, ME, promised=["m"])
    client.submit(2, model="m")
    for _ in range(25):  # far longer than a model may be missing
        bench.pass_time(2_000)
        asked(client, ME, promised=["m"], renewal=True)
        client.send(m.ClientHeartbeat())
    assert not client.ends
    worker = bench.worker(model="m")
    assert [dispatch.id for dispatch in worker.dispatches] == [(2).to_bytes(16, "big")]


def test_when_a_promise_ends_what_waits_is_held_for_another_orchestrator(bench: Bench) -> None:
    client = bench.client()
    for _ in range(25):
        asked(client, ME, promised=["m"], renewal=True)
        bench.pass_time(2_000)
        client.send(m.ClientHeartbeat())
    client.submit(2, model="m")
    for _ in range(8):  # longer than the lease, and not as long as a model may be missing
        bench.pass_time(2_000)
        client.send(m.ClientHeartbeat())
    assert not bench.state.is_promised("m") and not client.ends
    worker = bench.worker(model="m")
    assert [dispatch.id for dispatch in worker.dispatches] == [(2).to_bytes(16, "big")]


def test_a_promise_ends_with_the_lease(bench: Bench) -> None:
    client = bench.client()
    asked(client, ME, promised=["m"])
    client.submit(2, model="m")
    for _ in range(17):
        bench.pass_time(2_000)
        client.send(m.ClientHeartbeat())
    end = client.ends[0]  # sent again until it is acknowledged
    assert end.error is not None and end.error.code is Code.NO_WORKER


# --- classes -----------------------------------------------------------------------------------------------------


def test_names_of_classes() -> None:
    name = naming.in_class("smollm2", "tiny")
    assert (name, naming.plain(name), naming.class_of(name)) == ("smollm2@tiny", "smollm2", "tiny")
    assert naming.in_class("smollm2", "") == naming.plain("smollm2") == "smollm2"
    assert naming.class_of("smollm2") == "" and naming.in_class("m" * 128, "tiny") == "m" * 128


def test_a_class_is_chosen_by_its_name(bench: Bench) -> None:
    tiny, medium = [
        bench.worker(name, model=name) for name in ("smollm2@tiny", "smollm2@medium")
    ]  # in real workers each has the plain name as well
    client = bench.client()
    client.submit(1, model="@medium")
    client.submit(2, model="smollm2@tiny")
    assert [len(worker.dispatches) for worker in (tiny, medium)] == [1, 1]
    client.submit(3, model="@large")
    assert client.problems[-1].error.text == "no worker is of class 'large'; there is: medium, tiny"


def test_names_of_classes_are_no_choice_for_who_names_no_model(bench: Bench) -> None:
    bench.worker("w", model="smollm2")
    worker = bench.worker("v", model="smollm2@tiny")
    client = bench.client()
    client.submit(1)
    assert not worker.dispatches and not client.problems
