"""How fast workers are: weights, ejection, trial. And the budget of retries."""

from __future__ import annotations

import pytest

from llambo.broker.records.registry import WorkerEntry
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.worker.agent.delivery import TokenRate
from tests.unit.broker_bench import Bench, Client, Worker, request_id

LONG = 10**7


def entry(bench: Bench, worker: Worker) -> WorkerEntry:
    return bench.state.registry.workers[worker.session]


def claims(bench: Bench, worker: Worker) -> dict[bytes, int]:
    return dict.fromkeys(entry(bench, worker).claims, 0)


def run(bench: Bench, paces: dict[Worker, float], seconds: float = 2.0) -> None:
    """Time passes, and every worker reports its speed five times a second."""
    for _ in range(round(5 * seconds)):
        bench.pass_time(200)
        for worker, pace in paces.items():
            worker.beat(seq=10**6, claims=claims(bench, worker), pace=pace)


def mesh(*slots: int, **config: int) -> tuple[Bench, list[Worker], Client]:
    bench = Bench(lease_ms=LONG, client_lease_ms=LONG, **({"settle_ms": 0} | config))
    return bench, [bench.worker(f"w{number}", slots=n) for number, n in enumerate(slots)], bench.client()


def share(bench: Bench, workers: list[Worker]) -> list[int]:
    return [len(entry(bench, worker).claims) for worker in workers]


# --- weight --------------------------------------------------------------------------------------------


def test_a_fast_worker_is_filled_before_one_that_is_much_slower() -> None:
    bench, workers, client = mesh(4, 4)
    run(bench, {workers[0]: 100.0, workers[1]: 20.0})
    for number in range(6):
        client.submit(number)
    assert share(bench, workers) == [4, 2]
    assert entry(bench, workers[1]).speed.level == 1


def test_small_differences_do_not_count() -> None:
    bench, workers, client = mesh(4, 4)
    run(bench, {workers[0]: 100.0, workers[1]: 60.0})
    for number in range(4):
        client.submit(number)
    assert share(bench, workers) == [2, 2]


def test_a_weight_does_not_waver_at_its_border() -> None:
    bench, workers, _ = mesh(1, 1)
    levels = []
    for pace in (45.0, 39.0, 45.0, 55.0, 80.0):
        run(bench, {workers[0]: 100.0, workers[1]: pace}, 6)
        levels.append(entry(bench, workers[1]).speed.level)
    assert levels == [0, 1, 1, 1, 0]


def test_a_pace_is_forgotten_so_that_a_slow_worker_is_tried_again() -> None:
    bench, workers, _ = mesh(4, 4)
    run(bench, {workers[0]: 100.0, workers[1]: 20.0})
    run(bench, {workers[0]: 100.0, workers[1]: 0.0}, 32)
    assert entry(bench, workers[1]).speed.level == 0


def test_a_worker_that_has_shown_nothing_yet_is_as_good_as_any() -> None:
    bench, workers, client = mesh(4, 4)
    run(bench, {workers[0]: 100.0})
    for number in range(4):
        client.submit(number)
    assert share(bench, workers) == [2, 2]


# --- ejection ------------------------------------------------------------------------------------------


def test_a_very_slow_worker_is_ejected_tried_and_taken_back() -> None:
    bench, workers, client = mesh(2, 2, 2)
    one, two, slow = workers
    usual = {one: 100.0, two: 90.0}
    # Given one that is ten times slower than the others
    run(bench, {**usual, slow: 9.0}, 4)
    assert entry(bench, slow).speed.ejected
    kinds = [event.kind for event in bench.state.journal.entries]
    assert "worker slow" in kinds
    assert "9.0 tokens/s" in entry(bench, slow).speed.note
    # Then it gets nothing, although only it is free
    for number in range(5):
        client.submit(number)
    assert share(bench, workers) == [2, 2, 0]
    # ... for ten seconds; after that one request at a time
    run(bench, usual, 10)
    assert share(bench, workers) == [2, 2, 1]
    client.submit(5)
    assert share(bench, workers) == [2, 2, 1]
    # When it is still slow, then it is ejected for twice as long
    run(bench, {**usual, slow: 9.0}, 3)
    assert entry(bench, slow).speed.ejected
    run(bench, usual, 15)
    assert entry(bench, slow).speed.ejected
    run(bench, usual, 5)
    assert entry(bench, slow).speed.trial
    # When it is as fast as the others again, then it gets work as they do
    run(bench, {**usual, slow: 80.0}, 3)
    assert not entry(bench, slow).speed.trial
    assert share(bench, workers) == [2, 2, 2]
    assert "worker at pace" in [event.kind for event in bench.state.journal.entries]


def test_a_worker_that_has_just_started_is_not_called_slow() -> None:
    bench, (one, two), _ = mesh(2, 2, settle_ms=10_000)
    run(bench, {one: 100.0, two: 90.0}, 11)
    # Given one that is started again beside them, on a machine that is full
    again = bench.worker("w2", state="starting")
    again.beat(state="starting")
    run(bench, {one: 100.0, two: 90.0}, 5)
    again.beat(models=[m.ModelInfo("m", "f")], slots=2)
    run(bench, {one: 100.0, two: 90.0, again: 9.0}, 9)
    assert not entry(bench, again).speed.ejected
    # When it stays so slow
    run(bench, {one: 100.0, two: 90.0, again: 9.0}, 3)
    assert entry(bench, again).speed.ejected


def test_never_more_than_half_are_ejected() -> None:
    bench, workers, _ = mesh(1, 1, 1, 1)
    run(bench, dict(zip(workers, (100.0, 100.0, 5.0, 5.0), strict=True)), 5)
    assert [entry(bench, worker).speed.ejected for worker in workers] == [False, False, True, True]
    # Fewer remain now, and so one is needed again
    workers[0].send(m.Goodbye())
    run(bench, {workers[1]: 100.0}, 2)
    assert sum(entry(bench, worker).speed.ejected for worker in workers[1:]) == 1
    workers[1].send(m.Goodbye())
    run(bench, {}, 2)
    assert sum(entry(bench, worker).speed.ejected for worker in workers[2:]) == 1


@pytest.mark.parametrize("paces", [(100.0, 5.0, 5.0), (5.0, 5.0), (100.0, 20.0)])
def test_who_is_as_slow_as_most_or_not_so_slow_stays(paces: tuple[float, ...]) -> None:
    bench, workers, _ = mesh(*([1] * len(paces)))
    run(bench, dict(zip(workers, paces, strict=True)), 5)
    assert not any(entry(bench, worker).speed.ejected for worker in workers)


def test_other_classes_are_no_peers_and_zero_means_never() -> None:
    bench, workers, _ = mesh(1, 1)
    entry(bench, workers[0]).hello = m.WorkerHello("w0", b"i", [m.ModelInfo("m")], 1, node_class="gpu")
    run(bench, dict(zip(workers, (100.0, 5.0), strict=True)), 5)
    assert not entry(bench, workers[1]).speed.ejected
    assert entry(bench, workers[1]).speed.level == 3
    bench, workers, _ = mesh(1, 1, slow_factor=0)
    run(bench, dict(zip(workers, (100.0, 5.0), strict=True)), 5)
    assert not entry(bench, workers[1]).speed.ejected


def test_the_last_worker_on_trial_is_a_worker_like_any() -> None:
    bench, workers, client = mesh(2, 4)
    one, slow = workers
    run(bench, {one: 100.0, slow: 5.0}, 4)
    assert entry(bench, slow).speed.ejected
    one.send(m.Goodbye())
    client.submit(1)
    run(bench, {slow: 5.0}, 3)
    client.submit(2)
    assert len(entry(bench, slow).claims) == 2


# --- what a worker tells -------------------------------------------------------------------------------


def test_a_pace_is_of_each_stream_and_waiting_counts() -> None:
    rate = TokenRate()
    rate.sample(0)
    # Given four streams: half a second of nothing, then 25 tokens in half a second
    rate.on_time_passed(4, 500)
    rate.on_time_passed(4, 1_000)
    rate.count += 25
    assert rate.sample(1_000) == (25.0, 6.25)


def test_without_streams_there_is_no_pace() -> None:
    rate = TokenRate()
    rate.sample(0)
    rate.on_time_passed(0, 1_000)
    assert rate.sample(1_000) == (0.0, 0.0)
    rate.on_time_passed(1, 1_100)
    rate.count += 50
    assert rate.sample(1_100)[1] == 0.0


def test_another_engine_is_measured_anew() -> None:
    bench, workers, _ = mesh(1, 1)
    run(bench, {workers[0]: 100.0, workers[1]: 20.0})
    assert entry(bench, workers[1]).speed.level == 1
    workers[1].send(m.EngineLost([], "SIGSEGV"))
    run(bench, {workers[0]: 100.0}, 1)
    assert entry(bench, workers[1]).speed.level == 0
    rate = TokenRate()
    rate.sample(0)
    rate.on_time_passed(1, 2_000)
    rate.count += 2
    assert rate.sample(2_000) == (1.0, 1.0)
    rate.reset()
    assert rate.sample(2_200) == (0.0, 0.0)


# --- retries -------------------------------------------------------------------------------------------

FULL = ErrorInfo(Code.BUSY, "full")


def refuse(worker: Worker) -> None:
    key = worker.key()
    worker.send(m.Reject(key[:16], key[16:], FULL))
    worker.beat(seq=10**6, claims={})


def test_refusals_have_a_budget_and_then_the_client_gets_a_retry_time() -> None:
    bench, (worker,), client = mesh(1, retry_reserve=5)
    client.submit(1)
    for _ in range(5):
        refuse(worker)
    assert client.ends == []
    refuse(worker)
    (end,) = client.ends
    assert end.error is not None
    assert end.error.code is Code.BUSY
    assert end.error.retry_after_ms == 10_000
    assert "full" in end.error.text
    assert bench.state.counters.faults.retries_denied == 1
    # When some time has passed, then there is credit again
    bench.now_ms += 3_000
    worker.beat(seq=10**6)
    client.submit(2)
    for _ in range(3):
        refuse(worker)
    assert len({end.id for end in client.ends}) == 1


def test_what_ends_well_pays_back_its_own_refusals_and_a_share() -> None:
    bench, (worker,), client = mesh(1, retry_reserve=5)
    client.submit(1)
    for _ in range(3):
        refuse(worker)
    assert bench.state.models.retries.by_model["m"].credit == 2
    worker.publish(worker.chunk(0, *range(10)))
    worker.end(10)
    assert bench.state.models.retries.by_model == {}
    client.submit(2)
    refuse(worker)
    client.send(m.Cancel(request_id(2)))
    worker.send(m.End(request_id(2), 0, "cancelled", worker.key()[16:]))
    assert bench.state.models.retries.by_model["m"].credit == 4
    client.submit(3)
    worker.publish(worker.chunk(0, *range(10)))
    worker.end(10)
    assert bench.state.models.retries.by_model["m"].credit == pytest.approx(4.2)


def test_the_death_of_an_engine_costs_one_and_one_from_outside_nothing() -> None:
    bench, (worker,), client = mesh(4, retry_reserve=2)
    for number in range(1, 5):
        client.submit(number)
    for made, outside in enumerate((True, False, False, False)):
        assert client.ends == []
        keys = list(entry(bench, worker).claims)
        # None is ended as poison: each request has made more tokens than at the last death.
        worker.send(m.EngineLost(keys, "SIGSEGV", [made] * len(keys), outside))
        worker.beat(seq=10**6, claims={})
    assert bench.state.counters.faults.retries_denied == 1
    assert {end.error.code for end in client.ends if end.error} == {Code.BUSY}


def test_lost_workers_cost_nothing() -> None:
    bench, workers, client = mesh(1, 1, retry_reserve=0)
    client.submit(1)
    workers[0].send(m.Goodbye())
    assert len(workers[1].dispatches) == 1
    assert bench.state.models.retries.by_model == {}
    assert client.ends == []


def test_speed_is_of_no_interest_to_who_has_one_worker() -> None:
    bench, workers, _ = mesh(1)
    run(bench, {workers[0]: 0.001}, 5)
    assert not any(worker.speed.ejected for worker in bench.state.registry.workers.values())
