"""Rolling updates: a few at a time, never past a bad one, and back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llambo.fleet.decide.rolling_core import (
    LEAVE_MS,
    TEST_MS,
    Action,
    Event,
    NodeDied,
    NodeReady,
    NodeStopped,
    NodeTested,
    OthersCounted,
    Phase,
    ProveNode,
    Replacement,
    ReportProgress,
    RollingUpdate,
    StartNode,
    StopNode,
    TimePassed,
)


def rolling(count: int = 8, *, classes: tuple[str, ...] = ("tiny",), **more: Any) -> RollingUpdate:
    return RollingUpdate(
        [Replacement(f"{name}-{number:04}", name, "v1", "v2") for name in classes for number in range(1, count + 1)],
        **more,
    )


def back_of(work: RollingUpdate) -> RollingUpdate:
    """The way back, for nodes that were changed, the bad one first."""
    changed = sorted(
        (one for one in work.nodes if one.phase is not Phase.OLD), key=lambda one: one.phase is not Phase.BAD
    )
    return RollingUpdate(
        [Replacement(one.name, one.node_class, one.after, one.before) for one in changed], work.max_unavailable
    )


class Hosts:
    """Carries out the actions. `bad`: how a node fails with a version."""

    def __init__(self, work: RollingUpdate, bad: dict[tuple[str, str], str] | None = None) -> None:
        self.work, self.bad = work, bad or {}
        self.runs = {node.name: node.before for node in work.nodes}
        self.serving = set(self.runs)
        self.least = len(self.runs)
        self.progress: list[str] = []
        self.order: list[str] = []
        self.now_ms = 0

    def run(self) -> Hosts:
        waiting: list[Event] = [TimePassed()]
        for _ in range(10_000):
            while waiting:
                for order in self.work.handle(waiting.pop(0), self.now_ms):
                    waiting += self.carry_out(order)
                self.least = min(self.least, len(self.serving))
            if self.work.over:
                return self
            due = self.work.next_wakeup_ms()
            assert due is not None, f"it waits for nothing: {self.work}"
            self.now_ms = max(self.now_ms, due)
            waiting.append(TimePassed())
        raise AssertionError(f"it does not end: {self.work}")

    def carry_out(self, order: Action) -> list[Event]:
        match order:
            case StopNode(name):
                self.serving.discard(name)
                return [NodeStopped(name)]
            case StartNode(name, fingerprint):
                self.runs[name] = fingerprint
                self.order.append(name)
                match self.bad.get((name, fingerprint)):
                    case "dies":
                        return [NodeDied(name, "ended with status 1")]
                    case "hangs":
                        return []
                return [NodeReady(name)]
            case ProveNode(name):
                how = self.bad.get((name, self.runs[name]), "")
                if not how:
                    self.serving.add(name)
                return [] if how == "mute" else [NodeTested(name, "it says nonsense" if how == "wrong" else "")]
            case ReportProgress(text):
                self.progress.append(text)
                return []


def test_one_after_the_other_and_each_is_proved_first() -> None:
    hosts = Hosts(rolling()).run()
    assert set(hosts.runs.values()) == {"v2"} and len(hosts.serving) == 8
    assert hosts.least == 7 and hosts.order == sorted(hosts.order)
    assert hosts.work.summary() == "8 of 8 replaced" and not hosts.work.stopped
    assert hosts.now_ms == 8 * hosts.work.settle_ms, "each was watched for a while"


def test_at_most_so_many_at_a_time() -> None:
    assert Hosts(rolling(10, max_unavailable=3)).run().least == 7


def test_one_class_after_the_other() -> None:
    work = rolling(2, classes=("tiny", "medium"), max_unavailable=5)
    assert [order.name for order in work.handle(TimePassed(), 0) if isinstance(order, StopNode)] == [
        "tiny-0001",
        "tiny-0002",
    ]
    hosts = Hosts(rolling(2, classes=("tiny", "medium"), max_unavailable=5)).run()
    assert hosts.order == ["tiny-0001", "tiny-0002", "medium-0001", "medium-0002"]


def test_who_is_away_already_counts() -> None:
    work = rolling(4, max_unavailable=2)
    work.handle(OthersCounted("tiny", 2), 0)
    assert work.handle(TimePassed(), 0) == []
    assert work.handle(OthersCounted("tiny", 1), 1) == [StopNode("tiny-0001")]
    assert work.handle(OthersCounted("tiny", 0), 2) == [StopNode("tiny-0002")]


@pytest.mark.parametrize(
    ("how", "why", "after_ms"),
    [
        ("dies", "ended with status 1", 0),
        ("hangs", "it was not ready within 300 s", 300_000),
        ("wrong", "its test failed: it says nonsense", 3_000),
        ("mute", "its test had no result within 60 s", 3_000 + TEST_MS),
    ],
)
def test_the_first_bad_one_ends_it_and_it_rolls_back(how: str, why: str, after_ms: int) -> None:
    hosts = Hosts(rolling(), {("tiny-0004", "v2"): how}).run()
    assert list(hosts.runs.values()) == ["v2"] * 4 + ["v1"] * 4
    assert hosts.serving == set(hosts.runs) - {"tiny-0004"}, "seven serve"
    assert hosts.work.stopped == f"tiny-0004: {why}"
    assert hosts.progress[-1] == f"tiny-0004 is bad: {why}; no further worker is replaced"
    assert hosts.work.summary() == f"3 of 8 replaced, 4 left as they were: tiny-0004: {why}"
    assert hosts.now_ms == 3 * hosts.work.settle_ms + after_ms

    back = Hosts(back_of(hosts.work))
    back.serving -= {"tiny-0004"}
    back.run()
    assert back.order == ["tiny-0004", "tiny-0001", "tiny-0002", "tiny-0003"], "the bad one first"
    assert set(back.runs.values()) == {"v1"} and back.work.summary() == "4 of 4 replaced"


def test_one_that_dies_after_it_was_proved_ends_it_too() -> None:
    work = rolling(2)
    for fact in (TimePassed(), NodeStopped("tiny-0001"), NodeReady("tiny-0001")):
        work.handle(fact, 0)
    work.handle(TimePassed(), 3_000)
    assert work.handle(NodeTested("tiny-0001"), 3_100)[-1] == StopNode("tiny-0002")
    work.handle(NodeDied("tiny-0001", "was killed by SIGSEGV"), 3_200)
    assert work.stopped == "tiny-0001: was killed by SIGSEGV" and not work.over
    # The one in progress is finished.
    assert work.handle(NodeStopped("tiny-0002"), 3_300) == [StartNode("tiny-0002", "v2")]


def test_one_that_never_leaves_is_bad() -> None:
    work = rolling(2)
    work.handle(TimePassed(), 0)
    work.handle(TimePassed(), LEAVE_MS)
    assert work.stopped == "tiny-0001: it has not ended within 600 s" and work.over


def test_one_that_is_killed_while_it_leaves_has_left() -> None:
    work = rolling(2)
    work.handle(TimePassed(), 0)
    assert work.handle(NodeDied("tiny-0001", "was killed by SIGKILL"), 5) == [StartNode("tiny-0001", "v2")]
    assert not work.stopped


def test_facts_about_others_and_late_ones_change_nothing() -> None:
    work = rolling(2)
    work.handle(TimePassed(), 0)
    for fact in (
        NodeReady("tiny-0002"),
        NodeStopped("tiny-0002"),
        NodeDied("tiny-0002", "x"),
        NodeTested("tiny-0001"),
        NodeDied("big-1", "x"),
    ):
        assert work.handle(fact, 1) == []
    assert [node.phase for node in work.nodes] == [Phase.LEAVING, Phase.OLD]


def test_an_operator_may_stop_it() -> None:
    work = rolling(2)
    work.handle(TimePassed(), 0)
    work.stop("stopped by hand")
    hosts = Hosts(work)
    hosts.now_ms = 1
    work.handle(NodeStopped("tiny-0001"), 1)
    work.handle(NodeReady("tiny-0001"), 1)
    hosts.run()
    assert work.summary() == "1 of 2 replaced, 1 left as they were: stopped by hand"


HOWS = st.sampled_from(["dies", "hangs", "wrong", "mute"])


@settings(derandomize=True, database=None, max_examples=100)
@given(st.integers(1, 9), st.integers(1, 4), st.dictionaries(st.integers(1, 9), HOWS, max_size=3))
def test_whatever_is_bad_no_more_are_lost_than_may_be_away(count: int, at_once: int, bad: dict[int, str]) -> None:
    wrong = {(f"tiny-{number:04}", "v2"): how for number, how in bad.items() if number <= count}
    hosts = Hosts(rolling(count, max_unavailable=at_once), wrong).run()
    assert hosts.least >= count - at_once and len(hosts.serving) >= count - at_once
    assert bool(hosts.work.stopped) == bool(wrong)
    if not wrong:
        assert set(hosts.runs.values()) == {"v2"}
    back = Hosts(back_of(hosts.work))
    back.runs = dict(hosts.runs)
    back.run()
    assert set(back.runs.values()) == {"v1"}
