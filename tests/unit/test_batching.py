"""The batching core, driven by an engine that only counts."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from llambo.worker.llama.batching import (
    BURST_MS,
    FIRST_SHARE,
    MIN_COPY,
    MIN_SHARE,
    STRETCH,
    Batcher,
    Placed,
    Plan,
    common_prefix,
)

A, B, C = b"a", b"b", b"c"


def tokens(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def step(batcher: Batcher, took_ms: float | Callable[[Plan], float] = 10.0) -> Plan:
    """Decode, and give every output row a next token."""
    plan = batcher.plan()
    assert plan is not None
    batcher.done(plan, took_ms(plan) if callable(took_ms) else took_ms)
    for _, key in plan.outputs:
        batcher.push(key, 1_000)
    return plan


def finish_after_prefill(batcher: Batcher, key: bytes, prompt: list[int]) -> None:
    assert batcher.place(key, prompt) is not None
    while not any(key == done for _, done in step(batcher).outputs):
        pass
    batcher.finish(key)


def test_a_prompt_is_decoded_once_and_gives_one_output() -> None:
    batcher = Batcher(slots=2, context=100, batch=64)
    assert batcher.place(A, tokens(10)) == Placed(0, 0)
    plan = step(batcher)
    assert (plan.tokens, plan.positions, plan.slots) == (tokens(10), tokens(10), [0] * 10)
    assert plan.outputs == [(9, A)]
    again = step(batcher)
    assert (again.tokens, again.positions, again.outputs) == ([1_000], [10], [(0, A)])


def test_nothing_to_do_is_no_step() -> None:
    assert Batcher(1, 100, 64).plan() is None


def test_running_streams_share_the_step_with_a_prompt() -> None:
    batcher = Batcher(slots=3, context=2_000, batch=512)
    for key in (A, B):
        batcher.place(key, tokens(4, start=ord(key) * 100))
    step(batcher)
    batcher.place(C, tokens(1_000))
    plan = step(batcher)
    assert plan.slots[:2] == [0, 1]
    assert {key for _, key in plan.outputs} == {A, B}
    assert 0 < plan.prefill < 1_000


def test_a_long_prompt_stretches_the_steps_of_others_only_so_far() -> None:
    # Given a model that needs 10 ms for a step of streams, and 0.5 ms for each prompt token
    batcher = Batcher(slots=2, context=20_000, batch=2_048)
    batcher.place(A, tokens(4))
    step(batcher, 2.0)
    for _ in range(20):
        step(batcher, 10.0)
    batcher.place(B, tokens(10_000, start=50_000))
    worst, steps = 0.0, 0
    while True:
        plan = step(batcher, lambda plan: 10.0 + 0.5 * plan.prefill)
        # When the first steps have been measured
        worst, steps = max(worst, 10.0 + 0.5 * plan.prefill if steps else 0.0), steps + 1
        if any(key == B for _, key in plan.outputs):
            break
    # Then none is much longer than allowed, and the prompt makes progress
    assert worst <= 10.0 * STRETCH * 1.05
    assert steps < 10_000 / MIN_SHARE


def test_a_prompt_alone_is_cut_so_that_a_cancel_takes_effect() -> None:
    batcher = Batcher(slots=1, context=20_000, batch=4_096)
    batcher.place(A, tokens(10_000))
    step(batcher, 320.0)  # 10 ms a token: a large model
    plan = step(batcher, 300.0)
    assert plan.prefill == 30


def measured(batcher: Batcher, decode_ms: float, prefill_ms: float) -> None:
    """A stream A runs, and the batcher has measured a step and a prompt token."""
    batcher.place(A, tokens(100))
    while not any(key == A for _, key in step(batcher, prefill_ms * FIRST_SHARE).outputs):
        pass
    for _ in range(200):
        step(batcher, decode_ms)


def test_short_prompts_that_come_together_go_in_together() -> None:
    batcher = Batcher(slots=8, context=1_000, batch=512)
    measured(batcher, decode_ms=10.0, prefill_ms=1.0)
    newcomers = [bytes([n]) for n in range(7)]
    for n, key in enumerate(newcomers):
        batcher.place(key, tokens(40, start=1_000 * n))
    plan = step(batcher, 290.0)
    assert {key for _, key in plan.outputs} == {A, *newcomers}


def test_prompts_keep_their_pace_when_more_streams_run_than_ever_before() -> None:
    """Only one stream was measured. With many a step takes longer, and prompts are not slowed down for it."""
    batcher = Batcher(slots=16, context=4_000, batch=512)
    measured(batcher, decode_ms=9.0, prefill_ms=1.0)
    waiting = {n.to_bytes(1, "big") for n in range(15)}
    for n, key in enumerate(waiting):
        batcher.place(key, tokens(300, start=1_000 * n))
    steps = 0
    while waiting:
        plan = step(batcher, lambda plan: 6.0 + 3.2 * (len(plan.tokens) - plan.prefill) + 1.0 * plan.prefill)
        waiting -= {key for _, key in plan.outputs}
        steps += 1
    # 4,500 tokens: at 1.5 times what a step of so many streams takes, some 15 to 80 of them in a step
    assert steps < 150


def test_a_short_prompt_goes_past_a_long_one() -> None:
    batcher = Batcher(slots=3, context=20_000, batch=512)
    measured(batcher, decode_ms=10.0, prefill_ms=1.0)
    batcher.place(B, tokens(10_000, start=50_000))
    batcher.place(C, tokens(30, start=70_000))
    plan = step(batcher, 55.0)
    assert {key for _, key in plan.outputs} == {A, C}
    assert plan.prefill <= 30 + 20 * (STRETCH - 1)


def test_bursts_are_saved_up_for() -> None:
    """An endless series of short prompts takes no more time than is saved, plus the allowed stretch of a step."""
    batcher = Batcher(slots=2, context=20_000, batch=512)
    measured(batcher, decode_ms=10.0, prefill_ms=1.0)
    total_ms = stretched_ms = 0.0
    for n in range(300):
        key = n.to_bytes(2, "big")
        batcher.place(key, tokens(50, start=100 * n + 1_000))
        done = False
        while not done:
            plan = step(batcher, lambda plan: 10.0 + plan.prefill)
            total_ms += 10.0 + plan.prefill
            stretched_ms += max(0.0, 10.0 + plan.prefill - 10.0 * STRETCH)
            done = any(output == key for _, output in plan.outputs)
        batcher.finish(key)
    assert stretched_ms <= BURST_MS + 0.1 * total_ms


def test_a_request_goes_beside_those_that_run() -> None:
    """In any order of arrival and end, a new sequence adds no more runs of adjacent slots than necessary."""
    chance = random.Random(7)
    batcher = Batcher(slots=16, context=100, batch=64)
    running: list[bytes] = []
    for turn in range(1_000):
        if running and chance.random() < 0.5:
            batcher.finish(running.pop(chance.randrange(len(running))))
            continue
        before = runs(batcher)
        if batcher.place(turn.to_bytes(2, "big"), tokens(8, start=20 * turn)) is not None:
            running.append(turn.to_bytes(2, "big"))
            assert runs(batcher) <= max(1, before)


def runs(batcher: Batcher) -> int:
    busy = [slot.key is not None for slot in batcher.slots]
    return sum(here and not before for before, here in zip([False, *busy], busy, strict=False))


def test_prompts_are_served_in_the_order_they_came() -> None:
    batcher = Batcher(slots=2, context=1_000, batch=64)
    batcher.place(A, tokens(40))
    batcher.place(B, tokens(40, start=100))
    first = step(batcher, 3.2)
    assert set(first.slots) == {0}
    second = step(batcher, 3.2)
    assert second.outputs[0][1] == A
    assert 1 in second.slots


def test_when_all_slots_are_taken_there_is_no_place() -> None:
    batcher = Batcher(slots=1, context=100, batch=64)
    batcher.place(A, tokens(4))
    assert batcher.place(B, tokens(4)) is None
    batcher.finish(A)
    assert batcher.place(B, tokens(4)) is not None


def test_the_second_turn_of_a_chat_computes_only_what_is_new() -> None:
    batcher = Batcher(slots=2, context=4_000, batch=512)
    finish_after_prefill(batcher, A, tokens(500))
    assert batcher.place(B, tokens(520)) == Placed(0, 500)
    assert step(batcher).positions[0] == 500


def test_the_same_prompt_again_still_decodes_its_last_token() -> None:
    batcher = Batcher(slots=1, context=100, batch=64)
    finish_after_prefill(batcher, A, tokens(20))
    assert batcher.place(B, tokens(20)) == Placed(0, 19)
    assert step(batcher).outputs == [(0, B)]


def test_a_prefix_of_a_running_stream_is_copied() -> None:
    batcher = Batcher(slots=2, context=4_000, batch=512)
    batcher.place(A, tokens(200))
    while not step(batcher).outputs:
        pass
    assert batcher.place(B, [*tokens(150), 7, 7, 7]) == Placed(1, 150, copy_from=0)
    assert step(batcher).positions[:2] == [200, 150]


def test_a_short_common_prefix_is_not_worth_a_copy() -> None:
    batcher = Batcher(slots=2, context=4_000, batch=512)
    batcher.place(A, tokens(MIN_COPY + 100))
    while not step(batcher).outputs:
        pass
    assert batcher.place(B, [*tokens(MIN_COPY - 1), 7]) == Placed(1, 0)


def test_a_long_cached_prefix_is_not_spoiled_for_a_short_match() -> None:
    batcher = Batcher(slots=2, context=4_000, batch=512)
    finish_after_prefill(batcher, A, tokens(1_000))
    assert batcher.place(B, [*tokens(100), 7, 7]) == Placed(1, 100, copy_from=0)


def test_the_slot_used_longest_ago_is_given_up_first() -> None:
    batcher = Batcher(slots=2, context=4_000, batch=512)
    finish_after_prefill(batcher, A, tokens(100))
    finish_after_prefill(batcher, B, tokens(100, start=1_000))
    placed = batcher.place(C, tokens(100, start=2_000))
    assert placed == Placed(0, 0)


def test_a_cancel_in_the_middle_of_a_prompt_keeps_what_is_computed() -> None:
    batcher = Batcher(slots=1, context=4_000, batch=64)
    batcher.place(A, tokens(1_000))
    computed = step(batcher).prefill
    batcher.finish(A)
    assert (batcher.running, batcher.cells, sum(slot.cells for slot in batcher.slots)) == (0, 0, computed)
    assert batcher.place(B, tokens(1_000)) == Placed(0, computed)


def test_a_model_that_cannot_cut_its_cache_computes_everything() -> None:
    batcher = Batcher(slots=1, context=100, batch=64)
    finish_after_prefill(batcher, A, tokens(20))
    batcher.place(B, tokens(30))
    batcher.restart(B)
    assert step(batcher).positions == tokens(30)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_the_cells_are_accounted_for(seed: int) -> None:
    """A thousand random starts, steps, ends and cancels beside an account of our own."""
    chance = random.Random(seed)
    batcher = Batcher(slots=4, context=300, batch=48)
    cache: list[list[int]] = [[] for _ in range(4)]
    wanted: dict[bytes, list[int]] = {}
    for turn in range(1_000):
        kind = chance.random()
        if kind < 0.15:
            key, prompt = turn.to_bytes(4, "big"), tokens(chance.randrange(1, 200), chance.choice([0, 0, 500]))
            placed = batcher.place(key, prompt)
            if placed is None:
                assert len(wanted) == 4
                continue
            if placed.copy_from is not None:
                cache[placed.slot] = list(cache[placed.copy_from])
            del cache[placed.slot][placed.cached :]
            assert cache[placed.slot] == prompt[: placed.cached]
            wanted[key] = prompt
        elif kind < 0.2 and wanted:
            key = chance.choice(list(wanted))
            del wanted[key]
            batcher.finish(key)
        elif (plan := batcher.plan()) is not None:
            assert len(plan.tokens) <= 48
            for token, position, slot in zip(plan.tokens, plan.positions, plan.slots, strict=True):
                assert position == len(cache[slot])
                cache[slot].append(token)
            batcher.done(plan, chance.uniform(1, 50))
            for _, key in plan.outputs:
                assert cache[next(slot.number for slot in batcher.slots if slot.key == key)] == wanted[key]
                if len(wanted[key]) == 300:
                    del wanted[key]
                    batcher.finish(key)
                    continue
                token = chance.randrange(600)
                wanted[key].append(token)
                batcher.push(key, token)
        else:
            assert not wanted
        assert batcher.running == len(wanted)
        assert [slot.tokens[: slot.cells] for slot in batcher.slots] == cache
    for key in wanted:
        batcher.finish(key)
    assert batcher.cells == 0


@pytest.mark.parametrize("length", [0, 1, 2, 3, 50, 99, 100])
def test_the_common_prefix_is_found_by_halves(length: int) -> None:
    one = tokens(100)
    other = [*one[:length], *([-1] * (100 - length))]
    assert common_prefix(one, other) == length
    assert common_prefix(one[:length], one) == length


# --- adapters ---


def test_a_prefix_is_reused_by_the_same_adapter_only() -> None:
    batcher, prompt = Batcher(slots=3, context=1_000, batch=512), tokens(200)
    for adapter in ("", "a", "b"):
        key = adapter.encode() or B
        placed = batcher.place(key, prompt, adapter)
        assert placed is not None and placed.cached == 0
        while not step(batcher).outputs:
            pass
        batcher.finish(key)
    for adapter in ("b", "", "a"):
        placed = batcher.place(C, prompt, adapter)
        assert placed is not None
        assert (placed.cached, batcher.slots[placed.slot].adapter) == (199, adapter)
        batcher.finish(C)
    # An adapter that is new here gets nothing, neither in place nor as a copy
    placed = batcher.place(C, prompt, "c")
    assert placed is not None and (placed.cached, placed.copy_from) == (0, None)


def test_every_step_decodes_the_streams_and_prompts_of_every_adapter() -> None:
    batcher = Batcher(slots=7, context=1_000, batch=512)
    adapters = ["", "a", "b", "a", ""]
    for number, adapter in enumerate(adapters):
        batcher.place(bytes([number]), tokens(4, start=100 * number), adapter)
    step(batcher)
    batcher.place(C, tokens(900), "a")
    steps = 0
    while len(outputs := step(batcher).outputs) < 6:
        # While a prompt is decoded, every stream has its token in every step, whatever its adapter
        assert len(outputs) == 5
        steps += 1
    assert steps
    assert batcher.place(A, tokens(8, start=5_000), "b") is not None
    plan = batcher.plan()
    assert plan is not None
    groups = batcher.groups(plan, first="a")
    assert [adapter for adapter, _ in groups] == ["a", "", "b", "b"]
    assert sorted(row for _, rows in groups for row in rows) == list(range(len(plan.tokens)))
    for adapter, rows in groups:
        assert {batcher.slots[plan.slots[row]].adapter for row in rows} == {adapter}
        assert len({row >= len(plan.tokens) - plan.prefill for row in rows}) == 1
    assert batcher.groups(plan, first="b")[0][0] == "b"
