"""Which texts share a step, and which rows they get: without a model."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llambo.worker.llama.llama_tasks import EmbedPlan, EmbedQueue, Job, Rows, normalized

SIZE = 3


def rows_of(plan: EmbedPlan) -> Rows:
    """A row that depends on the token alone."""
    return np.array([[token, token * token % 7, 1.0] for token in plan.tokens], np.float32).reshape(-1, SIZE)


def job(number: int, *texts: list[int], pooling: str = "mean") -> Job:
    return Job(bytes([number]), list(texts), pooling, 2**62)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_every_text_gets_its_vector_however_it_is_cut(pooling: str) -> None:
    for seed in range(60):
        chance = random.Random(seed)
        queue = EmbedQueue(cells=40, sequences=3)
        texts = [[chance.choices(range(100), k=chance.randint(1, 40)) for _ in range(1 + n)] for n in range(5)]
        jobs = [job(n, *own, pooling=pooling) for n, own in enumerate(texts)]
        held: dict[int, int] = {}
        done: list[Job] = []
        waiting = list(jobs)
        while waiting or queue.jobs:
            if waiting and chance.random() < 0.5:
                queue.add(waiting.pop(0))
            rows = chance.randint(1, 17)
            plan = queue.plan(rows)
            if plan is None:
                continue
            assert 0 < len(plan.tokens) <= rows
            for sequence, position in zip(plan.sequences, plan.positions, strict=True):
                assert position == held.get(sequence, 0), "a sequence goes on where it was"
                held[sequence] = position + 1
            assert sum(held.values()) <= queue.cells
            complete, freed = queue.done(plan, rows_of(plan))
            for sequence in freed:
                del held[sequence]
            done += complete
        assert not held
        assert {one.key for one in done} == {one.key for one in jobs}
        for one in jobs:
            for tokens, vector in zip(one.texts, one.vectors, strict=True):
                every = [np.array([token, token * token % 7, 1.0]) for token in tokens]
                wanted = np.mean(every, axis=0) if pooling == "mean" else every[-1]
                assert vector is not None and np.allclose(vector, wanted)


def sums_of(plan: EmbedPlan) -> Rows:
    """As llama.cpp pools: a row for each text in the step, here of its tokens in this step."""
    rows, at, found = rows_of(plan), 0, []
    for _, count in plan.shares:
        found.append(rows[at : at + count].sum(axis=0))
        at += count
    return np.array(found, np.float32)


def test_a_text_that_is_computed_whole_is_in_one_step_however_long_it_is() -> None:
    for seed in range(60):
        chance = random.Random(seed)
        queue = EmbedQueue(cells=40, sequences=3, whole=True, pooled=True)
        jobs = [
            job(n, *[chance.choices(range(100), k=chance.randint(1, 40)) for _ in range(1 + n)], pooling="cls")
            for n in range(5)
        ]
        done: list[Job] = []
        waiting = list(jobs)
        while waiting or queue.jobs:
            if waiting and chance.random() < 0.5:
                queue.add(waiting.pop(0))
            rows = chance.randint(1, 30)
            plan = queue.plan(rows)
            if plan is None:
                continue
            # As many as fit, or one that does not
            assert len(plan.tokens) <= max(rows, len(plan.shares[0][0].tokens))
            assert len(plan.shares) == 1 or len(plan.tokens) <= rows
            assert all(count == len(text.tokens) for text, count in plan.shares)
            complete, freed = queue.done(plan, sums_of(plan))
            assert sorted(freed) == sorted(text.sequence for text, _ in plan.shares)
            done += complete
        assert {one.key for one in done} == {one.key for one in jobs}
        for one in jobs:
            for tokens, vector in zip(one.texts, one.vectors, strict=True):
                wanted = np.sum([np.array([token, token * token % 7, 1.0]) for token in tokens], axis=0)
                assert vector is not None and np.allclose(vector, wanted)


def test_of_a_text_in_several_steps_the_last_one_has_its_vector() -> None:
    queue = EmbedQueue(cells=40, sequences=3, pooled=True)
    queue.add(job(1, [1] * 5, [2] * 5, pooling="last"))
    found = []
    while (plan := queue.plan(4)) is not None:
        complete, _ = queue.done(plan, sums_of(plan))
        found += [vector for one in complete for vector in one.vectors]
    # Steps: 4 of the first, 1 of the first and 3 of the second, 2 of the second
    assert [vector.tolist() for vector in found if vector is not None] == [[1, 1, 1], [4, 8, 2]]


def test_short_texts_share_a_step() -> None:
    queue = EmbedQueue(cells=100, sequences=4)
    queue.add(job(1, [1, 2], [3, 4], [5, 6]))
    queue.add(job(2, [7, 8]))
    plan = queue.plan(64)
    assert plan is not None
    # Each job in its turn
    assert plan.tokens == [1, 2, 7, 8, 3, 4, 5, 6]
    assert len(set(plan.sequences)) == 4


@pytest.mark.parametrize("whole", [False, True])
def test_a_small_job_does_not_wait_for_a_large_one(whole: bool) -> None:
    queue = EmbedQueue(cells=40, sequences=4, whole=whole)
    queue.add(job(1, *[[1] * 30] * 100))
    queue.add(job(2, [2] * 20, [3] * 20))
    done: list[bytes] = []
    for _ in range(12):
        plan = queue.plan(16)
        assert plan is not None
        done += [one.key for one in queue.done(plan, rows_of(plan))[0]]
    assert done == [bytes([2])]


def test_a_dropped_job_gives_back_its_sequences_and_leaves_the_others() -> None:
    queue = EmbedQueue(cells=10, sequences=2)
    queue.add(job(1, [1] * 6, [2] * 4))
    plan = queue.plan(7)
    assert plan is not None
    queue.done(plan, rows_of(plan))
    queue.add(job(2, [3] * 5))
    assert len(queue.drop(bytes([1]))) == 1, "the first text was whole, the second had begun"
    assert queue.drop(bytes([1])) == []
    plan = queue.plan(64)
    assert plan is not None and plan.tokens == [3] * 5
    assert [one.key for one in queue.done(plan, rows_of(plan))[0]] == [bytes([2])]
    assert queue.plan(64) is None


def test_a_vector_of_zeros_stays_one() -> None:
    assert normalized(np.zeros(3)).tolist() == [0, 0, 0]
    assert normalized(np.array([3.0, 4.0])).tolist() == [0.6, 0.8]
