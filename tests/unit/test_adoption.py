"""A broker that has just started: requests come back from their clients, and from the workers that run them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llambo.broker.report import queries
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tokens, transfer
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.identity import ANYONE
from tests.unit.broker_bench import Bench, Client, Worker, request_id, small_mesh

ADOPT_MS = 1_000


def dispatch_id(attempt: int) -> bytes:
    return attempt.to_bytes(4, "big") + b"old!"


def key_of(number: int, attempt: int = 1) -> bytes:
    return request_id(number) + dispatch_id(attempt)


def chunk(number: int, ids: list[int], first: int = 0, attempt: int = 1, flags: int = 0) -> bytes:
    return tokens.encode_chunk(key_of(number, attempt), first, ids, [b"x"] * len(ids), flags)


def announce(
    worker: Worker, number: int, ids: list[int], attempt: int = 1, *, home: bool = True, **fields: Any
) -> None:
    blob, prompt_bytes = transfer.pack(b"hello", [chunk(number, ids, attempt=attempt)] if ids else [])
    work = m.Dispatch(request_id(number), dispatch_id(attempt), 5, "m", 10, 7, prompt_bytes=prompt_bytes, **fields)
    worker.send(m.Orphan(work, home), blob=blob)


def resume(client: Client, number: int, ids: list[int], flags: int = 0, **fields: Any) -> None:
    blob, prompt_bytes = transfer.pack(b"hello", [chunk(number, ids, flags=flags)] if ids else [])
    asked = m.InferenceRequest(
        request_id(number), "m", 10, have=len(ids), resume=True, prompt_bytes=prompt_bytes, **fields
    )
    client.send(asked, blob=blob)


def adopted(worker: Worker) -> list[bytes]:
    return [adopt.id + adopt.dispatch for adopt in worker.received(m.Adopt)]


@pytest.mark.parametrize("worker_first", [True, False])
def test_a_run_goes_on_whether_client_or_worker_comes_first(worker_first: bool) -> None:
    bench, worker, client = small_mesh()
    if worker_first:
        announce(worker, 1, [1, 2, 3])
        resume(client, 1, [1, 2])
    else:
        resume(client, 1, [1, 2])
        announce(worker, 1, [1, 2, 3])
    assert adopted(worker) == [key_of(1)] and worker.dispatches == []
    assert bench.state.counters.requests.adopted == 1 and bench.state.counters.requests.moved == 0
    # The client gets the tokens it does not have, and the new ones
    worker.publish(chunk(1, [4], 3))
    assert client.streamed()[-2:] == [3, 4]
    worker.beat(seq=worker.received(m.Adopt)[-1].seq, claims={key_of(1): 4})
    worker.send(m.End(request_id(1), 4, "stop", dispatch_id(1)))
    assert [(end.count, end.reason) for end in client.ends] == [(4, "stop")]


def test_without_its_worker_it_goes_on_elsewhere_after_a_moment() -> None:
    bench, worker, client = small_mesh()
    resume(client, 1, [1, 2])
    bench.pass_time(ADOPT_MS - 50)
    assert worker.dispatches == []
    worker.beat()
    bench.pass_time(60)
    (dispatched,) = worker.dispatches
    assert dispatched.prefix == [1, 2]
    # It has moved: another worker made those tokens
    assert queries.requests(bench.state, "", bench.now_ms, ANYONE)[0].moves == bench.state.counters.requests.moved == 1
    # A worker that comes later is ordered to stop.
    late = bench.worker("late")
    announce(late, 1, [1, 2, 3])
    assert [cancel.dispatch for cancel in late.received(m.Cancel)] == [dispatch_id(1)]


def test_a_run_that_says_other_tokens_than_the_client_holds_is_stopped() -> None:
    _, worker, client = small_mesh()
    announce(worker, 1, [1, 9, 9])
    resume(client, 1, [1, 2])
    assert adopted(worker) == []
    assert [cancel.id for cancel in worker.received(m.Cancel)] == [request_id(1)]


def test_a_run_that_has_less_than_the_client_is_stopped() -> None:
    bench, worker, client = small_mesh()
    announce(worker, 1, [1])
    resume(client, 1, [1, 2])
    assert adopted(worker) == []
    # Unless it has grown since, and its worker reports that in time.
    bench.pass_time(ADOPT_MS + 1)
    assert adopted(worker) == [] and worker.received(m.Cancel)


def test_of_several_runs_the_latest_that_fits_is_adopted() -> None:
    bench = Bench()
    client = bench.client()
    zombie, right, wrong = bench.worker("zombie"), bench.worker("right"), bench.worker("wrong")
    announce(zombie, 1, [1, 2, 3, 4], attempt=1)
    announce(wrong, 1, [1, 9], attempt=3)
    announce(right, 1, [1, 2, 5], attempt=2)
    resume(client, 1, [1, 2])
    assert adopted(right) == [key_of(1, 2)] and adopted(zombie) == adopted(wrong) == []
    assert zombie.received(m.Cancel) and wrong.received(m.Cancel)


def test_another_model_of_that_name_is_not_adopted() -> None:
    bench = Bench()
    client, worker = bench.client(), bench.worker(fingerprint="f2")
    announce(worker, 1, [1, 2])
    resume(client, 1, [1], fingerprint="f1")
    assert adopted(worker) == []


def test_a_client_with_the_last_token_needs_no_worker() -> None:
    bench = Bench()
    client = bench.client()
    resume(client, 1, [1, 2], flags=tokens.FINAL | tokens.STOPPED)
    assert [(end.count, end.reason) for end in client.ends] == [(2, "stop")]
    resume(client, 2, list(range(10)))
    assert [(end.count, end.reason) for end in client.ends[1:]] == [(10, "length")]


def test_a_detached_request_is_taken_in_without_its_client() -> None:
    bench = Bench()
    worker = bench.worker()
    announce(worker, 1, [1, 2], detached=True)
    assert adopted(worker) == [key_of(1)]
    worker.send(m.End(request_id(1), 2, "stop", dispatch_id(1)))
    # and its client finds it later
    client = bench.client()
    client.send(m.Attach(request_id(1)))
    assert [end.count for end in client.ends] == [2]
    assert tokens.ids_of(client.received(m.Page)[-1].chunks) == [1, 2]


def test_the_detached_run_of_another_broker_is_its_own() -> None:
    bench = Bench()
    worker = bench.worker()
    announce(worker, 1, [1, 2], home=False, detached=True)
    assert adopted(worker) == [] and len(bench.state.recovery.orphans) == 1


def test_an_adopted_run_that_dies_moves_with_its_prompt() -> None:
    bench = Bench()
    client, worker, other = bench.client(), bench.worker("w"), bench.worker("o")
    announce(worker, 1, [1, 2, 3])
    resume(client, 1, [1])
    worker.send(m.Goodbye("stopped"))
    (moved,) = other.dispatches
    assert moved.prefix == [1, 2, 3]
    sends = [a for a in bench.actions if getattr(a, "message", None) is moved]
    assert transfer.unpack(sends[0].blob, moved.prompt_bytes)[0] == b"hello"
    assert int.from_bytes(moved.dispatch[:4], "big") == 2  # an attempt later than the one that was lost
    assert client.streamed() == [2, 3] or client.received(m.Page)


def test_an_adopt_that_was_lost_is_noticed() -> None:
    _, worker, client = small_mesh()
    announce(worker, 1, [1, 2])
    resume(client, 1, [1])
    seq = worker.received(m.Adopt)[-1].seq
    worker.beat(seq=seq - 1)
    assert worker.dispatches == []
    worker.beat(seq=seq)
    assert worker.dispatches[-1].prefix == [1, 2]


def test_orphans_are_forgotten_with_their_worker_and_in_time() -> None:
    bench = Bench(orphan_ms=1_500)
    worker, other = bench.worker("w"), bench.worker("o")
    announce(worker, 1, [1])
    announce(other, 2, [1])
    worker.send(m.Goodbye("stopped"))
    assert [orphan.work.id for orphan in bench.state.recovery.orphans] == [request_id(2)]
    for _ in range(30):
        bench.pass_time(100)
        other.beat()
    assert len(bench.state.recovery.orphans) == 0 and bench.state.recovery.orphans.bytes == 0


@pytest.mark.parametrize(
    "blob", [b"hello\x91\xc4\x01T", b"hello\xc1", b"hello" + msgspec.msgpack.encode([chunk(1, [5], first=3)])]
)
def test_an_orphan_that_is_malformed_is_stopped(blob: bytes) -> None:
    bench = Bench()
    worker = bench.worker()
    worker.send(m.Orphan(m.Dispatch(request_id(1), dispatch_id(1), 5, "m", 10, 7, prompt_bytes=5)), blob=blob)
    assert worker.received(m.Cancel) and len(bench.state.recovery.orphans) == 0


def test_a_resume_that_is_malformed_is_refused() -> None:
    _, _, client = small_mesh()
    client.send(m.InferenceRequest(request_id(1), "m", have=2, resume=True, prompt_bytes=5), blob=b"hello\xc1")
    assert client.problems[-1].error.code is Code.BAD_REQUEST


def test_tokens_that_are_claimed_but_not_shown_cannot_be_continued() -> None:
    _, _, client = small_mesh()
    client.send(m.InferenceRequest(request_id(1), "m", have=2, resume=True), blob=b"hello")
    assert client.problems[-1].error.code is Code.UNKNOWN_REQUEST


# --- two clients --------------------------------------------------------------------------------------


def attach(client: Client, number: int, ids: list[int]) -> None:
    client.send(m.Attach(request_id(number), len(ids), [chunk(number, ids)]))


def test_a_client_that_holds_more_is_admitted_while_the_request_waits() -> None:
    bench = Bench()
    worker, owner, other = bench.worker(), bench.client(b"a"), bench.client(b"b")
    resume(owner, 1, [1])
    attach(other, 1, [1, 2, 3])
    bench.pass_time(ADOPT_MS)
    worker.beat()
    assert worker.dispatches[-1].prefix == [1, 2, 3]


def test_no_client_gets_a_continuation_of_another_answer() -> None:
    bench = Bench()
    bench.worker()
    owner, other = bench.client(b"a"), bench.client(b"b")
    resume(owner, 1, [1, 2])
    attach(other, 1, [1, 9])
    assert other.problems[-1].error.code is Code.EXPIRED
    assert bench.state.requests[request_id(1)].followers.keys() == {owner.session}


# --- a broker that has just begun -----------------------------------------------------------------------


def test_after_a_restart_the_broker_waits_for_workers() -> None:
    bench = Bench(startup_grace_ms=5_000)
    client = bench.client()
    client.submit(1)
    assert client.problems == [] and client.received(m.Accepted) == []
    client.submit(1)  # as clients do that receive nothing
    worker = bench.worker()
    assert len(client.received(m.Accepted)) == 1 and len(worker.dispatches) == 1


def test_a_request_that_waits_for_workers_is_forgotten_when_its_client_cancels_it() -> None:
    for leave in (m.Cancel, m.Detach):
        bench = Bench(startup_grace_ms=5_000)
        client = bench.client()
        id = client.submit(1)
        client.send(leave(id))
        assert [p.error.code for p in client.problems] == [Code.UNKNOWN_REQUEST] * (leave is m.Cancel)
        worker = bench.worker()
        assert worker.dispatches == [] and client.received(m.Accepted) == []


def test_the_grace_time_after_a_restart_ends() -> None:
    bench = Bench(startup_grace_ms=3_000)
    client = bench.client()
    client.submit(1)
    client.send(m.Attach(request_id(2)))
    bench.pass_time(4_100)
    assert [p.error.code for p in client.problems] == [Code.NO_WORKER, Code.UNKNOWN_REQUEST]
    assert not bench.state.recovery.deferred


def test_an_attach_to_what_is_not_yet_back_waits_for_it() -> None:
    bench = Bench(startup_grace_ms=5_000)
    worker, owner, other = bench.worker(), bench.client(b"a"), bench.client(b"b")
    attach(other, 1, [1, 2])
    resume(owner, 1, [1])
    announce(worker, 1, [1, 2, 3])
    assert adopted(worker) == [key_of(1)]
    assert len(other.received(m.Accepted)) == 1


def test_a_resumed_request_waits_for_its_model() -> None:
    bench = Bench()
    client = bench.client()
    resume(client, 1, [1])
    bench.pass_time(ADOPT_MS + 100)
    assert client.problems == []
    assert bench.worker().dispatches[-1].prefix == [1]
