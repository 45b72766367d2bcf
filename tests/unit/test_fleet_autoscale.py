"""The autoscaler: it grows, shrinks, and does not oscillate."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llambo.fleet.decide.autoscale_core import Autoscaler, ClassLoad, Decision, WindowExtreme, promised_models
from llambo.fleet.model import Fleet, NodeClass, Scaling

SECOND, MINUTE = 1_000, 60_000
STEADY = settings(derandomize=True, database=None, max_examples=60)


class Bench:
    """One class whose workers start at once, decided every second."""

    def __init__(self, workers: int = 1, *, least: int = 0, most: int = 1_000, slots: int = 4, **rules: Any) -> None:
        self.kept = NodeClass(name="tiny", slots=slots, min=least, max=most, scaling=Scaling(**rules))
        self.scaler = Autoscaler([self.kept])
        self.workers = workers
        self.room = most
        self.now_ms = 0
        self.decisions: list[Decision] = []

    def look(self, load: int, **seen: Any) -> None:
        """`load`: requests that there are. Those that have no slot wait."""
        self.now_ms += SECOND
        busy = min(load, self.workers * self.kept.slots)
        fields: dict[str, Any] = {"busy": busy, "waiting": load - busy, "room": self.room - self.workers} | seen
        found = self.scaler.handle([ClassLoad(node_class="tiny", workers=self.workers, **fields)], self.now_ms)
        self.decisions += found
        self.workers = self.scaler.counts["tiny"]

    def looks(self, load: int, seconds: int, **seen: Any) -> int:
        """How many workers there are after so long."""
        for _ in range(seconds):
            self.look(load, **seen)
        return self.workers


# --- more and fewer ------------------------------------------------------------------------------------


def test_a_hundred_at_thirty_percent_then_a_spike_then_a_lull() -> None:
    bench = Bench(100, most=600, shrink_by=200)
    assert bench.looks(120, 3600) == 100, "30 % is within bounds"
    assert bench.looks(2_000, 60) == 600, "a spike: 500 more"
    assert bench.looks(2_000, 3600) == 600
    assert bench.looks(400, 3600) == 400, "under 20 %: 200 fewer, and then it is within bounds"
    assert [decision.more for decision in bench.decisions] == [500, -200]
    assert bench.decisions[0].why == "500 % of 400 slots wanted, more than 80 %"
    assert bench.decisions[1].why == "at most 17 % of 2400 slots wanted in 300 s, less than 20 %"


@pytest.mark.parametrize(
    ("workers", "times", "usual", "exception"),
    [(10, 100, (8, 10), (39, 5)), (10, 10, (1, 280), (20, 1)), (1, 20, (0, 500), (1, 1))],
    ids=["a peak", "a dip", "the last worker has something to do from time to time"],
)
def test_what_is_shorter_than_the_proof_does_nothing(
    workers: int, times: int, usual: tuple[int, int], exception: tuple[int, int]
) -> None:
    bench = Bench(workers)
    for _ in range(times):
        bench.looks(*usual)
        bench.looks(*exception)
    assert not bench.decisions


def test_between_the_bounds_it_stays_as_it_is() -> None:
    bench = Bench(10, least=1)
    for load in (8, 32, 9, 31, 20):
        assert bench.looks(load, 900) == 10


def test_a_request_that_has_waited_is_proof_enough() -> None:
    early, late = Bench(1, slots=1), Bench(1, slots=1)
    early.looks(2, 4)
    assert not early.decisions
    late.looks(2, 4, waited_ms=2_001)
    assert late.decisions[0].wanted == 3
    assert late.decisions[0].why == "200 % of 1 slots wanted, more than 80 %; a request has waited 2.0 s"


def test_one_that_waits_while_slots_are_free_makes_nothing_grow() -> None:
    """It waits for something else, such as a limit of its identity; more workers would not help."""
    assert Bench(10).looks(10, 600, waiting=2, waited_ms=60_000) == 10


def test_steps_have_a_limit_and_a_pause() -> None:
    bench = Bench(10, grow_by=3, shrink_by=4, grow_pause_ms=20_000, shrink_pause_ms=30_000, shrink_after_ms=10_000)
    bench.looks(400, 66)
    bench.looks(1, 120)
    at = [(decision.wanted, decision.more) for decision in bench.decisions]
    assert at == [(13, 3), (16, 3), (19, 3), (22, 3), (18, -4), (14, -4), (10, -4), (6, -4)]


def test_without_a_limit_half_of_them_go_at_a_time() -> None:
    bench = Bench(100, shrink_after_ms=10_000)
    bench.looks(0, 1_000, waiting=0)
    assert [decision.wanted for decision in bench.decisions][:4] == [50, 25, 12, 6]


def test_bounds_hold_and_are_reported() -> None:
    bench = Bench(3, least=2, most=5, shrink_by=9)
    assert bench.looks(100, 60) == 5
    assert bench.decisions[-1].why == "833 % of 12 slots wanted, more than 80 %; the most is 5"
    assert bench.scaler.limited == {"tiny": "the most is 5"}
    assert bench.looks(0, 3600) == 2
    assert bench.decisions[-1].why.endswith("; the least is 2") and not bench.scaler.limited


def test_never_more_than_the_hosts_have_room_for() -> None:
    bench = Bench(3)
    bench.room = 7
    assert bench.looks(100, 600) == 7
    assert bench.decisions[-1].why.endswith("; the hosts have room for 4 more")
    assert bench.scaler.limited == {"tiny": "the hosts have room for 0 more"}


def test_the_file_may_move_the_bounds() -> None:
    bench = Bench(3)
    bench.look(2)
    bench.scaler.set_classes([NodeClass(name="tiny", slots=4, min=5, max=6)])
    assert bench.looks(2, 1) == 5
    bench.scaler.set_classes([NodeClass(name="tiny", slots=4, min=1, max=2)])
    assert bench.looks(2, 1) == 2
    assert [decision.why for decision in bench.decisions] == ["the least is 5", "the most is 2"]
    bench.scaler.set_classes([NodeClass(name="other")])
    assert bench.scaler.counts == {}


def test_a_manual_count_holds_until_the_load_requires_another() -> None:
    bench = Bench(3)
    bench.look(6)
    bench.scaler.operator_wants("tiny", 20, bench.now_ms)
    assert bench.looks(6, 299) == 20
    assert bench.looks(6, 60) == 10, "7 % of 80 slots, half of them at a time"


# --- zero ----------------------------------------------------------------------------------------------


def test_from_zero_a_waiting_request_suffices_and_to_zero_it_takes_a_while() -> None:
    bench = Bench(0)
    assert bench.looks(0, 600) == 0
    assert bench.looks(1, 1) == 1
    assert bench.decisions[-1].why == "1 request waits for the first worker"
    assert bench.looks(1, 900) == 1
    assert bench.looks(0, 600) == 1
    assert bench.looks(0, 1) == 0
    assert bench.decisions[-1].why == "nothing to do for 600 s"
    assert bench.looks(9, 1) == 3, "nine requests have room on three workers"


def test_the_last_worker_stays_if_one_is_the_least() -> None:
    assert Bench(1, least=1).looks(0, 7_200) == 1


# --- what piles up ---------------------------------------------------------------------------------------


def test_short_requests_that_pile_up_need_no_slot_each() -> None:
    """100 ms each, 60 come in a second, 40 are served, by 4 slots: 6 are needed for good, and some to catch up."""
    bench = Bench(1, grow_pause_ms=10_000)
    done, waiting = 0, 0
    for _ in range(30):
        done, waiting = done + 40, waiting + 20
        bench.look(4, busy=4, waiting=waiting, done=done, waited_ms=3_000)
        if bench.decisions:
            break
    assert 2 <= bench.decisions[0].wanted <= 5
    blind = Bench(1)
    blind.looks(4, 30, busy=4, waiting=600, waited_ms=3_000)
    assert blind.decisions[0].wanted == 152, "if nothing is known of them each wants a slot"


def test_workers_that_start_are_counted_so_that_a_lack_is_not_made_good_twice() -> None:
    bench = Bench(2)
    for _ in range(120):
        bench.now_ms += SECOND
        # However many are wanted, only two are ready, and the rest waits.
        seen = ClassLoad(
            node_class="tiny", workers=bench.workers, busy=8, waiting=8, waited_ms=bench.now_ms, room=1_000
        )
        bench.decisions += bench.scaler.handle([seen], bench.now_ms)
        bench.workers = bench.scaler.counts["tiny"]
    assert [decision.wanted for decision in bench.decisions] == [6]


# --- it does not oscillate -----------------------------------------------------------------------------------

LOADS = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 400)), min_size=2, max_size=12)
RULES = st.fixed_dictionaries(
    {
        "low_percent": st.integers(5, 35), "aim_percent": st.integers(40, 60), "high_percent": st.integers(65, 95),
        "grow_after_ms": st.integers(0, 20).map(lambda s: s * SECOND),
        "shrink_after_ms": st.integers(0, 120).map(lambda s: s * SECOND),
        "grow_by": st.sampled_from([0, 0, 1, 7]), "shrink_by": st.sampled_from([0, 0, 1, 7]),
        "grow_pause_ms": st.integers(0, 30).map(lambda s: s * SECOND),
        "shrink_pause_ms": st.integers(0, 60).map(lambda s: s * SECOND),
    }
)  # fmt: skip


def turned(decisions: Iterable[Decision]) -> int:
    ways = [decision.more > 0 for decision in decisions]
    return sum(one != other for one, other in pairwise(ways))


@STEADY
@given(LOADS, RULES, st.integers(1, 4), st.integers(0, 60))
def test_it_turns_at_most_once_for_each_turn_of_the_load(
    loads: list[tuple[int, int]], rules: dict[str, int], slots: int, workers: int
) -> None:
    bench = Bench(workers, slots=slots, **rules)
    for load, seconds in loads:
        bench.looks(load, seconds)
    levels = [load for load, _ in loads]
    ways = [after > before for before, after in pairwise(levels) if after != before]
    # And one more, since the first value was not the right one.
    turns = 1 + sum(one != other for one, other in pairwise(ways))
    assert turned(bench.decisions) <= turns + (bool(ways)), "\n".join(map(str, bench.decisions))


@STEADY
@given(st.integers(0, 500), RULES, st.integers(1, 4), st.integers(0, 300))
def test_under_a_load_that_does_not_change_it_goes_one_way_and_comes_to_rest(
    load: int, rules: dict[str, int], slots: int, workers: int
) -> None:
    bench = Bench(workers, slots=slots, **rules)
    bench.looks(load, 900)
    assert turned(bench.decisions) == 0
    settled = len(bench.decisions)
    bench.looks(load, 900)
    if rules["grow_by"] != 1 and rules["shrink_by"] != 1:
        assert len(bench.decisions) == settled, bench.decisions[-1]
        assert bench.workers * slots * rules["high_percent"] >= 100 * load or bench.workers == 1_000


@STEADY
@given(st.lists(st.integers(0, 60), min_size=200, max_size=500), RULES)
def test_to_turn_round_the_load_must_really_have_changed(loads: list[int], rules: dict[str, int]) -> None:
    """With any noise: after a growth less than low/aim of what was wanted then must be left, all the while;
    after a shrinking more than high/aim of it must be wanted."""
    bench = Bench(5, slots=1, **rules)
    low, aim, high = rules["low_percent"], rules["aim_percent"], rules["high_percent"]
    long, short = rules["shrink_after_ms"] // SECOND, rules["grow_after_ms"] // SECOND
    before: Decision | None = None
    was = 0
    for number, load in enumerate(loads):
        count = len(bench.decisions)
        bench.look(load)
        if len(bench.decisions) == count:
            continue
        now = bench.decisions[-1]
        most = max(loads[max(0, number - long) : number + 1])
        least = min(loads[max(0, number - short) : number + 1])
        if before is not None and before.more > 0 > now.more and now.wanted:
            assert aim * most < low * was + low * aim / 100 + 1e-6, f"{before} {now}: {most} of {was}"
        if before is not None and before.more < 0 < now.more and before.wanted:
            assert aim * least > high * was - 1e-6 or was == 0, f"{before} {now}: {least} of {was}"
        before, was = now, least if now.more > 0 else most


@STEADY
@given(st.lists(st.tuples(st.integers(1, 15_000), st.integers(0, 50)), min_size=1, max_size=60), st.integers(0, 20_000))
def test_extremes_are_those_of_the_span(looks: list[tuple[int, int]], span_ms: int) -> None:
    most, least = (WindowExtreme(span_ms, 10_000, largest=largest) for largest in (True, False))
    now_ms, seen = 0, list[tuple[int, int]]()
    for pause_ms, value in looks:
        now_ms += pause_ms
        seen = [*(seen if pause_ms <= 10_000 else []), (now_ms, value)]
        most.add(value, now_ms)
        least.add(value, now_ms)
        within = [one for at, one in seen if at >= now_ms - span_ms]
        covered = now_ms - seen[0][0] >= span_ms
        assert most.value() == (max(within) if covered else None)
        assert least.value() == (min(within) if covered else None)


def test_after_a_gap_what_was_before_proves_nothing() -> None:
    bench = Bench(10)
    bench.looks(1, 290)
    bench.now_ms += 15_000
    assert bench.looks(1, 290) == 10
    assert bench.looks(1, 20) == 5


# --- models on demand ----------------------------------------------------------------------------------


def test_a_class_without_workers_promises_its_model_with_each_adapter() -> None:
    settings_of = {"worker": {"model": "/m/s.gguf", "lora": "pirate=/m/p.gguf, poet=q.gguf"}}
    spec = NodeClass(name="tiny", min=0, max=1, settings=settings_of)
    fleet = Fleet(name="home", hosts={}, classes={"tiny": spec})
    names = {"s", "s+pirate", "s+poet"}
    assert promised_models(fleet) == {*names, *(f"{name}@tiny" for name in names)}
