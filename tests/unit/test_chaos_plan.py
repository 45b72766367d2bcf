"""The schedule of faults: the same for the same seed, and fair to its victims."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from tests.chaos.plan import PRESETS, RATES, RECOVERY_MS, TARGETS, Plan, parse_faults, schedule

EVERYTHING = Plan(seed=3, minutes=10.0, faults=dict(RATES))


def test_one_seed_one_schedule() -> None:
    assert schedule(EVERYTHING) == schedule(EVERYTHING)
    assert schedule(EVERYTHING) != schedule(replace(EVERYTHING, seed=4))


def test_faults_come_in_order_and_within_the_time() -> None:
    faults = schedule(EVERYTHING)
    assert [fault.number for fault in faults] == list(range(len(faults)))
    assert all(before.at_ms <= after.at_ms for before, after in pairwise(faults))
    assert faults[-1].at_ms < 600_000


def test_every_kind_comes_about_as_often_as_it_should() -> None:
    faults = schedule(replace(EVERYTHING, workers=8))
    for kind, rate in RATES.items():
        count = sum(fault.kind == kind for fault in faults)
        assert 0.5 * rate * 10 <= count <= rate * 10, kind


def test_no_victim_is_hit_before_it_has_recovered_and_one_worker_is_never_hit() -> None:
    spans = []
    for fault in schedule(EVERYTHING):
        group = TARGETS[fault.kind].split()[-1]
        end = fault.at_ms + fault.length_ms + RECOVERY_MS[group]
        spans.append((fault.at_ms, end, group, fault.victim))
    for number, (begin, _, group, victim) in enumerate(spans):
        others = [span for span in spans[:number] if span[1] > begin]
        assert (group, victim) not in [(span[2], span[3]) for span in others]
        assert sum(span[2] == "worker" for span in others) < EVERYTHING.workers


def test_a_fault_finds_only_whom_it_can_reach() -> None:
    for fault in schedule(EVERYTHING):
        match TARGETS[fault.kind]:
            case "far worker":
                assert EVERYTHING.place(fault.victim) == "far"
            case "near worker":
                assert EVERYTHING.place(fault.victim) == "near"


def test_a_frozen_agent_outlives_its_lease() -> None:
    plan = Plan(minutes=5.0, faults={"stop": 10.0}, lease_ms=700)
    assert all(fault.length_ms > 700 for fault in schedule(plan))


def test_the_spared_broker_is_spared() -> None:
    plan = Plan(minutes=5.0, faults={"broker": 5.0}, brokers=2, spared_broker=0)
    assert {fault.victim for fault in schedule(plan)} == {1}


#: The faults that each preset must contain, so that their effect can be counted.
OWED = {"kills": ("kill", 1_000), "broker": ("broker", 100), "two-brokers": ("broker", 50), "freeze": ("stop", 100),
        "hang": ("hang", 50), "links": ("link", 100), "rolling": ("rolling", 25), "move": ("move", 25)}  # fmt: skip


@pytest.mark.parametrize("name", OWED)
def test_a_preset_comes_to_its_count(name: str) -> None:
    kind, count = OWED[name]
    assert len([fault for fault in schedule(Plan(**PRESETS[name])) if fault.kind == kind]) >= count


def test_faults_are_read_from_text() -> None:
    assert parse_faults("kill=30,stop") == {"kill": 30.0, "stop": RATES["stop"]}
    with pytest.raises(ValueError, match="no fault 'fire'"):
        parse_faults("fire")
