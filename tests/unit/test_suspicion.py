"""Which requests kill engines: a death makes the engine's batch suspects, progress clears, a second death ends one."""

from __future__ import annotations

import msgpack

from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tokens
from llambo.mesh.wire.errors import Code
from tests.unit.broker_bench import Bench, Client, Worker, request_id, small_mesh


def die(worker: Worker, *numbers: int, made: int = 0, outside: bool = False, text: str = "SIGSEGV") -> None:
    """The engine of a worker dies while it runs the last dispatch of each of these requests."""
    keys = [key_of(worker, number) for number in numbers]
    worker.send(m.EngineLost(keys, text, [made] * len(keys), outside))


def key_of(worker: Worker, number: int) -> bytes:
    dispatch = [d for d in worker.dispatches if d.id == request_id(number)][-1]
    return dispatch.id + dispatch.dispatch


def publish(worker: Worker, number: int, first: int, *ids: int, flags: int = 0) -> None:
    worker.publish(tokens.encode_chunk(key_of(worker, number), first, list(ids), [b"x"] * len(ids), flags))


def back(worker: Worker) -> None:
    """Its engine works again, and it claims the runs it still has."""
    worker.beat(seq=10**6, claims={})


def runs(bench: Bench, worker: Worker) -> list[int]:
    entry = bench.state.registry.workers[worker.session]
    return sorted(int.from_bytes(key[:16], "big") for key in entry.claims)


def mesh(workers: int, requests: int, slots: int = 8) -> tuple[Bench, list[Worker], Client]:
    """All requests on the first worker, before the others come."""
    bench = Bench(lease_ms=10**6)
    first, client = bench.worker("w0", slots=slots), bench.client()
    for number in range(1, requests + 1):
        client.submit(number)
    return bench, [first, *(bench.worker(f"w{n}", slots=slots) for n in range(1, workers))], client


def test_poison_among_seven_harmless_requests_costs_two_engines() -> None:
    # Given eight requests on one engine, one of which kills it at its third token
    bench, (one, two), client = mesh(2, 8)
    for number in range(1, 9):
        publish(one, number, 0, 7, 7)
    die(one, *range(1, 9), made=2)
    # Then each goes on, but the one engine left tries only one of them
    assert len(runs(bench, two)) == 1
    assert bench.state.counters.faults.suspected == 8
    # When each makes its next token, then the next one is tried
    poison, deaths = 5, 1
    while (tried := [n for n in runs(bench, two) if n not in cleared(bench)]) and deaths < 2:
        if tried == [poison]:
            die(two, *runs(bench, two), made=2, text="SIGABRT")
            deaths += 1
        else:
            publish(two, tried[0], 2, 7)
    # Then that one is ended, with both deaths in its error
    (end,) = client.ends
    assert (end.id, end.reason, end.count) == (request_id(poison), "error", 2)
    assert end.error is not None
    assert end.error.code is Code.ENGINE_FAILED
    for word in ("w0 (SIGSEGV)", "w1 (SIGABRT)", "token 2"):
        assert word in end.error.text
    assert bench.state.counters.faults.killers == 1
    # ... and all others end as they should, one suspect after the other
    back(one)
    for _ in range(20):
        for worker in (one, two):
            for number in runs(bench, worker):
                publish(worker, number, bench.state.requests[request_id(number)].transcript.next_index, 7)
    assert not [n for n in range(1, 9) if n != poison and n not in cleared(bench)]


def cleared(bench: Bench) -> set[int]:
    return {int.from_bytes(id, "big") for id, request in bench.state.requests.items() if request.suspicion.token < 0}


def test_others_share_an_engine_with_a_suspect_and_become_suspects_with_it() -> None:
    bench, (one,), client = mesh(1, 2, slots=4)
    die(one, 1, 2)
    back(one)
    # Given one engine that runs a suspect, and another suspect that waits although slots are free
    assert len(runs(bench, one)) == 1
    (tried,) = runs(bench, one)
    # When a request that is no suspect comes, then it goes first
    client.submit(3)
    assert runs(bench, one) == [tried, 3]
    # When that engine dies as well, then the suspect is ended, and the request beside it becomes a suspect
    die(one, tried, 3)
    assert [end.id for end in client.ends] == [request_id(tried)]
    assert bench.state.requests[request_id(3)].suspicion.token == 0
    # ... and both go on, one after the other
    back(one)
    (first,) = runs(bench, one)
    publish(one, first, 0, 7)
    assert len(runs(bench, one)) == 2
    assert len(client.ends) == 1


def test_tokens_that_were_made_and_have_not_arrived_do_not_clear() -> None:
    # Given an engine that died at token 5, of which the broker has three
    bench, (one, two), client = mesh(2, 1)
    publish(one, 1, 0, 7, 7, 7)
    die(one, 1, made=5)
    # When the next one makes the two that were lost, and dies at the same token
    publish(two, 1, 3, 7, 7)
    assert bench.state.requests[request_id(1)].suspicion.token == 5
    die(two, 1, made=5)
    # Then that was the second death, and not the first of its kind
    assert [end.reason for end in client.ends] == ["error"]


def test_progress_past_the_death_clears() -> None:
    bench, (one, two), client = mesh(2, 1)
    die(one, 1, made=1)
    publish(two, 1, 0, 7, 7)
    assert "cleared" in [what for _, what, _ in bench.state.requests[request_id(1)].story]
    # When a second engine dies later, then it is suspected as if for the first time
    die(two, 1, made=2)
    assert client.ends == []
    assert bench.state.requests[request_id(1)].suspicion.token == 2


def test_a_gap_that_is_repaired_clears_as_well() -> None:
    bench, (one, two), _ = mesh(2, 1)
    die(one, 1, made=1)
    publish(two, 1, 1, 7)
    assert bench.state.requests[request_id(1)].suspicion.token == 1
    publish(two, 1, 0, 7)
    assert bench.state.requests[request_id(1)].suspicion.token == -1


def test_losing_agents_and_killing_engines_is_charged_to_no_request() -> None:
    bench, (one, two), client = mesh(2, 2)
    die(one, 1, 2, outside=True)
    assert len(runs(bench, two)) == 2
    two.send(m.Goodbye())
    back(one)
    die(one, 1, 2, outside=True)
    back(one)
    assert len(runs(bench, one)) == 2
    assert bench.state.counters.faults.suspected == 0
    assert client.ends == []


def test_a_suspect_whose_worker_is_lost_stays_a_suspect_and_is_not_ended() -> None:
    bench, (one, two), client = mesh(2, 1)
    die(one, 1)
    two.send(m.Goodbye())
    assert client.ends == []
    back(one)
    assert bench.state.requests[request_id(1)].suspicion.token == 0
    die(one, 1)
    assert [end.reason for end in client.ends] == ["error"]


def test_a_request_is_given_up_after_a_number_of_engine_deaths_from_outside() -> None:
    _, worker, client = small_mesh(lease_ms=10**6, engine_failures=3)
    client.submit(1)
    for _ in range(3):
        assert client.ends == []
        die(worker, 1, outside=True, text="SIGKILL")
        back(worker)
    (end,) = client.ends
    assert end.error is not None
    assert "3 engines died" in end.error.text
    assert "SIGKILL" in end.error.text


def test_a_cancelled_suspect_counts_until_its_slot_is_free() -> None:
    bench, (one, two), client = mesh(2, 2)
    die(one, 1, 2)
    (tried,) = runs(bench, two)
    client.send(m.Cancel(request_id(tried)))
    assert runs(bench, two) == [tried]
    key = key_of(two, tried)
    two.send(m.End(key[:16], 0, "cancelled", key[16:]))
    assert len(runs(bench, two)) == 1
    assert runs(bench, two) != [tried]


def test_a_result_clears_a_suspect_when_it_is_there() -> None:
    bench, worker, client = small_mesh(lease_ms=10**6)
    client.submit(1, task="model_info", prompt=b"", max_tokens=2)
    client.submit(2)
    die(worker, 1, 2, made=1)
    back(worker)
    assert bench.state.requests[request_id(1)].suspicion.token == 0
    publish(worker, 1, 0, 0, 0)
    assert bench.state.requests[request_id(1)].suspicion.token == -1
    assert runs(bench, worker) == [1, 2]


def test_suspects_of_a_model_with_a_fingerprint_wait_for_the_same_fingerprint() -> None:
    bench = Bench(hold_ms=3_000)
    one, client = bench.worker("a", fingerprint="x"), bench.client()
    client.submit(1)
    publish(one, 1, 0, 7)
    other = bench.worker("b", fingerprint="y")
    die(one, 1, made=1)
    assert runs(bench, other) == []
    same = bench.worker("c", fingerprint="x")
    assert runs(bench, same) == [1]
    # ... and are given up with the others when no such worker comes in time
    die(same, 1, made=1, outside=True)
    one.send(m.Goodbye())
    same.send(m.Goodbye())
    for _ in range(20):
        bench.pass_time(250)
        client.send(m.ClientHeartbeat())
        other.beat(seq=10**6)
    assert {end.error.code for end in client.ends if end.error} == {Code.NO_WORKER}


# --- several brokers, and one after the other ------------------------------------------------------------


def test_a_worker_that_tries_a_suspect_of_another_broker_is_given_none() -> None:
    bench, (one, two), client = mesh(2, 1)
    two.beat(wary=True)
    die(one, 1)
    # Then it waits, although there are slots; a request that is no suspect does not
    assert runs(bench, two) == []
    client.submit(2)
    assert runs(bench, two) == [2]
    # ... until that one is cleared or gone
    two.beat(seq=10**6, claims={key_of(two, 2): 0})
    assert runs(bench, two) == [1, 2]
    assert [dispatch.suspect for dispatch in two.dispatches] == [None, 0]


def test_a_suspect_that_outlives_its_broker_stays_one() -> None:
    # Given a run that was dispatched as a suspect, by a broker that is gone
    bench, worker, client = small_mesh(lease_ms=10**6)
    work = m.Dispatch(request_id(1), b"\0\0\0\2dead", 1, "m", 10, 1, prompt_bytes=5, suspect=2)
    worker.send(m.Orphan(work, True), blob=b"hello" + msgpack.packb([]))
    client.send(m.InferenceRequest(request_id(1), "m", 10, resume=True), blob=b"hello")
    assert runs(bench, worker) == [1]
    assert bench.state.requests[request_id(1)].suspicion.token == 2
    # When its engine dies as well, then it is the second one
    worker.send(m.EngineLost([request_id(1) + work.dispatch], "SIGSEGV", [2]))
    assert [end.reason for end in client.ends] == ["error"]


def test_a_suspect_that_is_adopted_does_not_hide_the_one_that_was_given() -> None:
    # Given a worker that was given one of two suspects, and runs a third one of a broker that is gone
    bench, (one, two), client = mesh(2, 2)
    die(one, 1, 2)
    (tried,) = runs(bench, two)
    work = m.Dispatch(request_id(9), b"\0\0\0\2dead", 1, "m", 10, 1, prompt_bytes=5, suspect=2)
    two.send(m.Orphan(work, True), blob=b"hello" + msgpack.packb([]))
    client.send(m.InferenceRequest(request_id(9), "m", 10, resume=True), blob=b"hello")
    assert runs(bench, two) == [tried, 9]
    # When the adopted one is cleared, then the other one is still there, and the second is not given to it
    two.publish(tokens.encode_chunk(request_id(9) + work.dispatch, 0, [7] * 3, [b"x"] * 3))
    assert bench.state.requests[request_id(9)].suspicion.token == -1
    assert runs(bench, two) == [tried, 9]
