"""A rolling update: nodes are replaced a few at a time, and the first bad one stops it.

         drain             ended              ready              stable             passed
    old ------> leaving ---------> starting ---------> settling ---------> testing ---------> proved
                                      |                   |                   |                  |
                                      +-------------------+-------------------+------------------+--> bad

A node is bad if it ends, is not ready in time, or fails its test.

Classes are updated one after the other, in the given order. A node that leaves, starts or is being tested counts as
unavailable, and so does one that was not working before; there are never more than `max_unavailable` of them. After a
bad node no other one is started; those under way are finished. Going back is another update, to the settings before.

Events come in by `handle`, actions go out. The caller calls again at `next_wakeup_ms` at the latest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import assert_never

#: A node has to be ready for so long without interruption before its test, and before the next node is replaced.
SETTLE_MS = 3_000
#: A node that is not ready after so long, with its model loaded, or whose test has no result after so long, is bad.
START_MS = 300_000
TEST_MS = 60_000
#: A drain ends by itself (`drain_ms`); this is for one that does not.
LEAVE_MS = 600_000


class Phase(StrEnum):
    OLD = "old"
    LEAVING = "leaving"
    STARTING = "starting"
    SETTLING = "settling"
    TESTING = "testing"
    PROVED = "proved"
    BAD = "bad"


#: Neither with the old settings nor proved with the new ones.
UNDER_WAY = (Phase.LEAVING, Phase.STARTING, Phase.SETTLING, Phase.TESTING)


@dataclass(slots=True)
class Replacement:
    name: str
    node_class: str
    #: Fingerprints of what it runs, and of what it shall run.
    before: str
    after: str
    phase: Phase = Phase.OLD
    since_ms: int = 0
    why: str = ""


# --- events --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeStopped:
    """It has drained and ended."""

    name: str


@dataclass(frozen=True, slots=True)
class NodeReady:
    name: str


@dataclass(frozen=True, slots=True)
class NodeTested:
    """`problem`: why it failed its test; empty: it passed."""

    name: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class NodeDied:
    name: str
    how: str


@dataclass(frozen=True, slots=True)
class OthersCounted:
    """How many nodes of a class, besides those under way, do not work now."""

    node_class: str
    unavailable: int


@dataclass(frozen=True, slots=True)
class TimePassed:
    pass


Event = NodeStopped | NodeReady | NodeTested | NodeDied | OthersCounted | TimePassed


# --- actions -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StopNode:
    """Drain it, so that its runs move to other workers, then end it."""

    name: str


@dataclass(frozen=True, slots=True)
class StartNode:
    """With these settings."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class ProveNode:
    name: str


@dataclass(frozen=True, slots=True)
class ReportProgress:
    text: str


Action = StopNode | StartNode | ProveNode | ReportProgress


@dataclass(slots=True)
class RollingUpdate:
    """`nodes`: in the order in which they are replaced, classes one after the other."""

    nodes: list[Replacement]
    max_unavailable: int = 1
    settle_ms: int = SETTLE_MS
    start_ms: int = START_MS
    #: Why no further node is replaced; empty: the update goes on.
    stopped: str = ""
    _unavailable: dict[str, int] = field(default_factory=dict)
    _out: list[Action] = field(default_factory=list)

    def handle(self, event: Event, now_ms: int) -> list[Action]:
        match event:
            case NodeStopped(name):
                self._start(self._one(name, Phase.LEAVING), now_ms)
            case NodeReady(name):
                self._to(self._one(name, Phase.STARTING), Phase.SETTLING, now_ms)
            case NodeTested(name, problem):
                self._tested(self._one(name, Phase.TESTING), problem, now_ms)
            case NodeDied(name, how):
                self._died(name, how, now_ms)
            case OthersCounted(node_class, unavailable):
                self._unavailable[node_class] = unavailable
            case TimePassed():
                pass
            case _:
                assert_never(event)
        self._check_times(now_ms)
        self._replace_next(now_ms)
        out, self._out = self._out, []
        return out

    @property
    def over(self) -> bool:
        if any(node.phase in UNDER_WAY for node in self.nodes):
            return False
        return bool(self.stopped) or all(node.phase is not Phase.OLD for node in self.nodes)

    def next_wakeup_ms(self) -> int | None:
        return min((self._due_ms(node) for node in self.nodes if node.phase in UNDER_WAY), default=None)

    def stop(self, why: str) -> None:
        """Replace no further node. Those under way are finished."""
        self.stopped = self.stopped or why

    def summary(self) -> str:
        done = sum(node.phase is Phase.PROVED for node in self.nodes)
        left = sum(node.phase is Phase.OLD for node in self.nodes)
        text = f"{done} of {len(self.nodes)} replaced"
        return f"{text}, {left} left as they were: {self.stopped}" if self.stopped else text

    # --- inside ----------------------------------------------------------------------------------------

    def _one(self, name: str, phase: Phase) -> Replacement | None:
        """None: it is in another phase, so the event is late."""
        return next((node for node in self.nodes if node.name == name and node.phase is phase), None)

    def _to(self, node: Replacement | None, phase: Phase, now_ms: int) -> None:
        if node is not None:
            node.phase, node.since_ms = phase, now_ms

    def _start(self, node: Replacement | None, now_ms: int) -> None:
        if node is not None:
            self._to(node, Phase.STARTING, now_ms)
            self._out.append(StartNode(node.name, node.after))

    def _tested(self, node: Replacement | None, problem: str, now_ms: int) -> None:
        if node is not None and problem:
            self._bad(node, f"its test failed: {problem}", now_ms)
        elif node is not None:
            self._to(node, Phase.PROVED, now_ms)
            done = sum(one.phase is Phase.PROVED for one in self.nodes)
            self._out.append(ReportProgress(f"{node.name} is replaced, {done} of {len(self.nodes)}"))

    def _died(self, name: str, how: str, now_ms: int) -> None:
        node = next((node for node in self.nodes if node.name == name), None)
        if node is None or node.phase in (Phase.OLD, Phase.BAD):
            return  # not part of the update, or not because of it
        if node.phase is Phase.LEAVING:
            # It was about to end anyway.
            self._start(node, now_ms)
        else:
            self._bad(node, how, now_ms)

    def _bad(self, node: Replacement, why: str, now_ms: int) -> None:
        self._to(node, Phase.BAD, now_ms)
        node.why = why
        self.stop(f"{node.name}: {why}")
        self._out.append(ReportProgress(f"{node.name} is bad: {why}; no further worker is replaced"))

    def _due_ms(self, node: Replacement) -> int:
        limits = {
            Phase.LEAVING: LEAVE_MS,
            Phase.STARTING: self.start_ms,
            Phase.SETTLING: self.settle_ms,
            Phase.TESTING: TEST_MS,
        }
        return node.since_ms + limits[node.phase]

    def _check_times(self, now_ms: int) -> None:
        for node in self.nodes:
            if node.phase not in UNDER_WAY or now_ms < self._due_ms(node):
                continue
            if node.phase is Phase.SETTLING:
                self._to(node, Phase.TESTING, now_ms)
                self._out.append(ProveNode(node.name))
            else:
                waited = f"{(now_ms - node.since_ms) / 1000:g} s"
                late = {
                    Phase.LEAVING: f"it has not ended within {waited}",
                    Phase.STARTING: f"it was not ready within {waited}",
                    Phase.TESTING: f"its test had no result within {waited}",
                }
                self._bad(node, late[node.phase], now_ms)

    def _replace_next(self, now_ms: int) -> None:
        if self.stopped:
            return
        waiting = [node for node in self.nodes if node.phase is Phase.OLD]
        if not waiting:
            return
        node_class = waiting[0].node_class
        under_way = [node for node in self.nodes if node.phase in UNDER_WAY]
        if any(node.node_class != node_class for node in under_way):
            return  # the class before this one is not finished yet
        unavailable = len(under_way) + self._unavailable.get(node_class, 0)
        for node in waiting:
            if node.node_class != node_class or unavailable >= max(1, self.max_unavailable):
                return
            unavailable += 1
            self._to(node, Phase.LEAVING, now_ms)
            self._out.append(StopNode(node.name))


def update_of(
    steps: Iterable[tuple[str, str, str]], fingerprints: dict[str, str], max_unavailable: int = 1
) -> RollingUpdate:
    """`steps`: name, class and new fingerprint of each node of a plan; `fingerprints`: what each runs now."""
    nodes = [Replacement(name, node_class, fingerprints[name], after) for name, node_class, after in steps]
    return RollingUpdate(nodes, max_unavailable)
