"""A rolling update: nodes are replaced a few at a time, and the first bad one ends it.

                 drain           empty          begin           ready, well for a while, and its test passed
    old  ------> leaving ------> ended -------> begun --------> proved (the next one may go)
                                                  |
                                                  +-----------> bad: it ended, was not ready in time, or failed its test

One class after the other, in the order they are given. What leaves, starts or is being proved counts as unavailable,
and so does a node that was away before; there are never more than `max_unavailable` of them. After a bad one no other
is begun; those on the way are seen through. To go back is another update, to what was before.

Facts come in by `handle`, orders go out. Whoever has this asks again at `next_wakeup_ms`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import assert_never

#: A node has to be ready for so long, and to be so still, before the next one goes.
SETTLE_MS = 3_000
#: After so long without being ready, or without a word from its test, it is bad. It loads its model meanwhile.
START_MS = 300_000
TEST_MS = 60_000
#: A drain has an end of its own (`drain_ms`); this is for one that never comes.
LEAVE_MS = 600_000


class Step(StrEnum):
    OLD = "old"
    LEAVING = "leaving"
    BEGUN = "begun"
    SETTLING = "settling"
    TESTED = "tested"  # its test runs
    PROVED = "proved"
    BAD = "bad"


#: On the way: neither as it was nor as it shall be.
UNDER_WAY = (Step.LEAVING, Step.BEGUN, Step.SETTLING, Step.TESTED)


@dataclass(slots=True)
class Replaced:
    name: str
    node_class: str
    #: Fingerprints of what it runs, and of what it shall run.
    before: str
    after: str
    step: Step = Step.OLD
    since_ms: int = 0
    why: str = ""


# --- facts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Left:
    """It has drained and ended."""

    name: str


@dataclass(frozen=True, slots=True)
class Ready:
    name: str


@dataclass(frozen=True, slots=True)
class Tried:
    """`wrong`: what; empty: it has answered as it should."""

    name: str
    wrong: str = ""


@dataclass(frozen=True, slots=True)
class Died:
    name: str
    how: str


@dataclass(frozen=True, slots=True)
class Away:
    """Nodes of a class, other than those on the way, that do not work now."""

    node_class: str
    count: int


@dataclass(frozen=True, slots=True)
class TimePassed:
    pass


Fact = Left | Ready | Tried | Died | Away | TimePassed


# --- orders --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Leave:
    """Drain it, what it runs goes elsewhere; then end it."""

    name: str


@dataclass(frozen=True, slots=True)
class Begin:
    """With these settings."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Try:
    name: str


@dataclass(frozen=True, slots=True)
class Tell:
    text: str


Order = Leave | Begin | Try | Tell


@dataclass(slots=True)
class Rolling:
    """`nodes`: in the order in which they are replaced, classes one after the other."""

    nodes: list[Replaced]
    max_unavailable: int = 1
    settle_ms: int = SETTLE_MS
    start_ms: int = START_MS
    #: Why nothing more is begun; empty: all is well.
    stopped: str = ""
    _away: dict[str, int] = field(default_factory=dict)
    _out: list[Order] = field(default_factory=list)

    def handle(self, fact: Fact, now_ms: int) -> list[Order]:
        match fact:
            case Left(name):
                self._left(self._one(name, Step.LEAVING), now_ms)
            case Ready(name):
                self._to(self._one(name, Step.BEGUN), Step.SETTLING, now_ms)
            case Tried(name, wrong):
                self._tested(self._one(name, Step.TESTED), wrong, now_ms)
            case Died(name, how):
                self._died(name, how, now_ms)
            case Away(node_class, count):
                self._away[node_class] = count
            case TimePassed():
                pass
            case _:
                assert_never(fact)
        self._in_time(now_ms)
        self._next(now_ms)
        out, self._out = self._out, []
        return out

    @property
    def over(self) -> bool:
        if any(node.step in UNDER_WAY for node in self.nodes):
            return False
        return bool(self.stopped) or all(node.step is not Step.OLD for node in self.nodes)

    def next_wakeup_ms(self) -> int | None:
        return min((self._due_ms(node) for node in self.nodes if node.step in UNDER_WAY), default=None)

    def stop(self, why: str) -> None:
        """By an operator: those on the way are seen through."""
        self.stopped = self.stopped or why

    def summary(self) -> str:
        done = sum(node.step is Step.PROVED for node in self.nodes)
        left = sum(node.step is Step.OLD for node in self.nodes)
        told = f"{done} of {len(self.nodes)} replaced"
        return f"{told}, {left} left as they were: {self.stopped}" if self.stopped else told

    # --- inside ----------------------------------------------------------------------------------------

    def _one(self, name: str, step: Step) -> Replaced | None:
        return next((node for node in self.nodes if node.name == name and node.step is step), None)

    def _to(self, node: Replaced | None, step: Step, now_ms: int) -> None:
        if node is not None:
            node.step, node.since_ms = step, now_ms

    def _left(self, node: Replaced | None, now_ms: int) -> None:
        if node is not None:
            self._to(node, Step.BEGUN, now_ms)
            self._out.append(Begin(node.name, node.after))

    def _tested(self, node: Replaced | None, wrong: str, now_ms: int) -> None:
        if node is not None and wrong:
            self._bad(node, f"its test failed: {wrong}", now_ms)
        elif node is not None:
            self._to(node, Step.PROVED, now_ms)
            done = sum(one.step is Step.PROVED for one in self.nodes)
            self._out.append(Tell(f"{node.name} is replaced, {done} of {len(self.nodes)}"))

    def _died(self, name: str, how: str, now_ms: int) -> None:
        node = next((node for node in self.nodes if node.name == name), None)
        if node is None or node.step in (Step.OLD, Step.BAD):
            return  # it is none of ours, or has nothing to do with the update
        if node.step is Step.LEAVING:
            # It was to end anyway.
            self._left(node, now_ms)
        else:
            self._bad(node, how, now_ms)

    def _bad(self, node: Replaced, why: str, now_ms: int) -> None:
        self._to(node, Step.BAD, now_ms)
        node.why = why
        self.stop(f"{node.name}: {why}")
        self._out.append(Tell(f"{node.name} is bad: {why}; nothing more is replaced"))

    def _due_ms(self, node: Replaced) -> int:
        waits = {Step.LEAVING: LEAVE_MS, Step.BEGUN: self.start_ms, Step.SETTLING: self.settle_ms, Step.TESTED: TEST_MS}
        return node.since_ms + waits[node.step]

    def _in_time(self, now_ms: int) -> None:
        for node in self.nodes:
            if node.step not in UNDER_WAY or now_ms < self._due_ms(node):
                continue
            if node.step is Step.SETTLING:
                self._to(node, Step.TESTED, now_ms)
                self._out.append(Try(node.name))
            else:
                waited = f"{(now_ms - node.since_ms) / 1000:g} s"
                late = {
                    Step.LEAVING: f"it has not ended within {waited}",
                    Step.BEGUN: f"it was not ready within {waited}",
                    Step.TESTED: f"its test has said nothing for {waited}",
                }
                self._bad(node, late[node.step], now_ms)

    def _next(self, now_ms: int) -> None:
        if self.stopped:
            return
        waiting = [node for node in self.nodes if node.step is Step.OLD]
        if not waiting:
            return
        node_class = waiting[0].node_class
        under_way = [node for node in self.nodes if node.step in UNDER_WAY]
        if any(node.node_class != node_class for node in under_way):
            return  # the class before this one is not through yet
        missing = len(under_way) + self._away.get(node_class, 0)
        for node in waiting:
            if node.node_class != node_class or missing >= max(1, self.max_unavailable):
                return
            missing += 1
            self._to(node, Step.LEAVING, now_ms)
            self._out.append(Leave(node.name))


def of_plan(steps: Iterable[tuple[str, str, str]], marks: dict[str, str], max_unavailable: int = 1) -> Rolling:
    """`steps`: name, class and new fingerprint of each, as a plan has them; `marks`: what each runs now."""
    nodes = [Replaced(name, node_class, marks[name], after) for name, node_class, after in steps]
    return Rolling(nodes, max_unavailable)
