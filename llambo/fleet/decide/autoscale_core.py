"""How many workers of each class there should be: what is seen of them comes in, decisions with reasons come out.

A class is wanted as far as its slots are busy or waited for. Above `high` it grows, below `low` it shrinks, and either
way to where it is used to `aim`, which lies between; only what has piled up, and goes away, is given no more slots than
it fills. That it does not swing follows from three rules:

- It grows by what was wanted *all through* `grow_after_ms`, and shrinks by the most that was wanted *at any time* in
  `shrink_after_ms`. A peak that is shorter does nothing, and neither does a dip.
- To turn round, the load must really have changed. After a growth the class is used to `aim`, so less than
  `low / aim` of that load must be left, for the whole of `shrink_after_ms`; after a shrinking it takes more than
  `high / aim` of it to grow.
- Workers that are still starting count as if they were there, so the same lack is not made good twice.

Which workers go, and on which host new ones are begun, is the plan's to decide (`plan.py`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from llambo.fleet.model import NodeClass, Scaling

# --- The largest (or smallest) of what was seen in the last while, at the cost of one step for each look. ---


class Extreme:
    """Of a span that ends now. Until looks cover the whole span there is none: what was not seen is not known."""

    def __init__(self, span_ms: int, gap_ms: int, *, largest: bool) -> None:
        """`gap_ms`: after a pause between two looks that is longer, everything before it counts for nothing."""
        self._span_ms = span_ms
        self._gap_ms = gap_ms
        self._sign = 1 if largest else -1
        self._seen: deque[tuple[int, float]] = deque()
        self._since_ms: int | None = None
        self._last_ms = 0

    def look(self, value: float, now_ms: int) -> None:
        if self._since_ms is None or now_ms - self._last_ms > self._gap_ms:
            self._seen.clear()
            self._since_ms = now_ms
        self._last_ms = now_ms
        # What is older and no larger will never be the answer again.
        while self._seen and self._sign * self._seen[-1][1] <= self._sign * value:
            self._seen.pop()
        self._seen.append((now_ms, value))
        while self._seen[0][0] < now_ms - self._span_ms:
            self._seen.popleft()

    def value(self) -> float | None:
        if self._since_ms is None or self._last_ms - self._since_ms < self._span_ms:
            return None
        return self._seen[0][1]


#: A longer pause between two looks: what was before it proves nothing any more.
GAP_MS = 10_000
#: How far back the speed of a class is measured, and from how many requests at least.
SPEED_MS, SPEED_REQUESTS = 20_000, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One class, as it is now."""

    node_class: str
    #: Workers that work, or are on the way to it. Not those that drain, and not those that keep failing.
    workers: int
    #: Slots that work on something, also of workers that drain.
    busy: int = 0
    #: Requests that wait for one of them, and how long the first of them has waited.
    waiting: int = 0
    waited_ms: int = 0
    #: Requests that they have finished, ever; it never falls.
    done: int = 0
    #: How many more the hosts have room for.
    room: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    node_class: str
    was: int
    wanted: int
    why: str

    @property
    def more(self) -> int:
        return self.wanted - self.was


class Autoscaler:
    def __init__(self, classes: Iterable[NodeClass]) -> None:
        self._classes: dict[str, _Class] = {}
        self.told(classes)

    def told(self, classes: Iterable[NodeClass]) -> None:
        """The file is another one. What was seen of classes that are still there is kept."""
        before, self._classes = self._classes, {}
        for one in classes:
            known = before.get(one.name)
            if known is None or known.kept.scaling != one.scaling:
                known = _Class(one, known.wanted if known else None)
            known.kept = one
            self._classes[one.name] = known

    def operator_wants(self, node_class: str, count: int, now_ms: int) -> None:
        """Somebody has said how many. From here on it goes by the load again, after the usual pauses."""
        known = self._classes[node_class]
        known.wanted, known.grown_ms, known.changed_ms = count, now_ms, now_ms

    @property
    def counts(self) -> Mapping[str, int]:
        """What is wanted now, of classes that have been seen."""
        return {name: known.wanted for name, known in self._classes.items() if known.wanted is not None}

    @property
    def held(self) -> Mapping[str, str]:
        """Classes that should be larger by their load and cannot be, and what holds them."""
        return {name: known.held for name, known in self._classes.items() if known.held}

    def handle(self, seen: Iterable[Seen], now_ms: int) -> list[Decision]:
        found = [self._classes[one.node_class].look(one, now_ms) for one in seen if one.node_class in self._classes]
        return [decision for decision in found if decision is not None]


@dataclass(slots=True)
class _Class:
    kept: NodeClass
    #: None: it has not been seen yet, and goes on from what is there then.
    wanted: int | None = None
    grown_ms: int | None = None
    changed_ms: int | None = None
    #: What keeps it smaller than its load wants it.
    held: str = ""
    #: What is wanted in slots, and of how many slots that would be `aim`: the least in a short while, or in a shorter
    #: one for a request that has waited; and the most in a long while, and in a longer one.
    steady: _Least = field(init=False)
    waited: _Least = field(init=False)
    most: Extreme = field(init=False)
    idle: Extreme = field(init=False)
    speed: _Speed = field(init=False)

    def __post_init__(self) -> None:
        rules = self.kept.scaling
        self.steady = _Least(rules.grow_after_ms)
        self.waited = _Least(min(rules.wait_ms, rules.grow_after_ms))
        self.most = Extreme(rules.shrink_after_ms, GAP_MS, largest=True)
        self.idle = Extreme(rules.idle_ms, GAP_MS, largest=True)
        self.speed = _Speed()

    def look(self, seen: Seen, now_ms: int) -> Decision | None:
        if self.wanted is None:
            self.wanted = seen.workers
        self.speed.look(seen, now_ms)
        more, piled_up = self.speed.of_waiting(seen, self.kept.scaling)
        load = seen.busy + more + piled_up
        for least in (self.steady, self.waited):
            least.look(load, 100 * (seen.busy + more) / self.kept.scaling.aim_percent + piled_up, now_ms)
        for extreme in (self.most, self.idle):
            extreme.look(load, now_ms)
        wanted, why = self._bounded(*self._decide(seen, now_ms), seen)
        if wanted == self.wanted:
            return None
        decision = Decision(self.kept.name, self.wanted, wanted, why)
        self.wanted, self.changed_ms = wanted, now_ms
        if decision.more > 0:
            self.grown_ms = now_ms
        return decision

    def _decide(self, seen: Seen, now_ms: int) -> tuple[int, str]:
        assert self.wanted is not None, "it has been looked at"
        rules, slots = self.kept.scaling, self.wanted * self.kept.slots
        if not self.wanted:
            # Nothing is busy where nothing is. Whoever waits is proof enough for as many as would take them all.
            return self._grown(seen.waiting), f"{_requests(seen.waiting)} for the first worker" if seen.waiting else ""
        if _past(self.grown_ms, rules.grow_pause_ms, now_ms):
            late = seen.waited_ms > rules.wait_ms
            least = self.waited if late else self.steady
            load, needed = least.load.value(), least.needed.value()
            if load is not None and needed is not None and 100 * load > rules.high_percent * slots:
                told = f"{_percent(load, slots)} of {slots} slots wanted, more than {rules.high_percent} %"
                if late:
                    told += f"; a request has waited {seen.waited_ms / 1000:.1f} s"
                return self._grown(needed), told
        if _past(self.changed_ms, rules.shrink_pause_ms, now_ms):
            most, idle = self.most.value(), self.idle.value()
            if not self.kept.min and idle == 0:
                return 0, f"nothing to do for {rules.idle_ms / 1000:g} s"
            if most is not None and 100 * most < rules.low_percent * slots:
                told = f"at most {_percent(most, slots)} of {slots} slots wanted in {rules.shrink_after_ms / 1000:g} s"
                return self._shrunk(most), f"{told}, less than {rules.low_percent} %"
        return self.wanted, ""

    def _grown(self, slots: float) -> int:
        assert self.wanted is not None, "it has been looked at"
        more = max(0, math.ceil(slots / self.kept.slots) - self.wanted)
        return self.wanted + min(more, self.kept.scaling.grow_by or more)

    def _shrunk(self, load: float) -> int:
        assert self.wanted is not None, "it has been looked at"
        least = self.wanted - (self.kept.scaling.shrink_by or (self.wanted + 1) // 2)
        # The last one is not for the load to take, but for having nothing to do.
        needed = math.ceil(100 * load / (self.kept.scaling.aim_percent * self.kept.slots))
        return min(self.wanted, max(needed, least, 1))

    def _bounded(self, wanted: int, why: str, seen: Seen) -> tuple[int, str]:
        assert self.wanted is not None, "it has been looked at"
        kept, self.held = self.kept, ""
        if wanted < kept.min:
            return kept.min, f"the least is {kept.min}" if self.wanted < kept.min else f"{why}; the least is {kept.min}"
        if wanted > kept.max:
            self.held = f"the most is {kept.max}"
            return kept.max, self.held if self.wanted > kept.max else f"{why}; {self.held}"
        # What was wanted before may still be about to be placed; only what is new has to fit.
        most = max(self.wanted, seen.workers + seen.room)
        if wanted > most:
            self.held = f"the hosts have room for {max(0, most - seen.workers)} more"
            return most, f"{why}; {self.held}"
        return wanted, why


class _Least:
    def __init__(self, span_ms: int) -> None:
        self.load = Extreme(span_ms, GAP_MS, largest=False)
        self.needed = Extreme(span_ms, GAP_MS, largest=False)

    def look(self, load: float, needed: float, now_ms: int) -> None:
        self.load.look(load, now_ms)
        self.needed.look(needed, now_ms)


class _Speed:
    """How long a request takes, and how many slots it takes to serve those that wait, too."""

    def __init__(self) -> None:
        self._looks: list[tuple[int, int, int]] = []  # when, done, busy + waiting
        #: Between each two of them: milliseconds of busy slots.
        self._spent: list[float] = []

    def look(self, seen: Seen, now_ms: int) -> None:
        if self._looks and not self._looks[-1][0] <= now_ms <= self._looks[-1][0] + GAP_MS:
            self._looks.clear()
            self._spent.clear()
        if self._looks:
            self._spent.append(seen.busy * (now_ms - self._looks[-1][0]))
        self._looks.append((now_ms, seen.done, seen.busy + seen.waiting))
        while len(self._looks) > 2 and self._looks[1][0] <= now_ms - SPEED_MS:
            del self._looks[0], self._spent[0]

    def of_waiting(self, seen: Seen, rules: Scaling) -> tuple[float, float]:
        """Slots that those want who wait: for good, because more come than are served, and to catch up with the rest.

        One for each, if nothing is known of them. If they are short, one slot serves many in a row.
        """
        if not seen.waiting:
            return 0.0, 0.0
        (since, done, present), (until, done_now, present_now) = self._looks[0], self._looks[-1]
        finished = done_now - done
        if finished < SPEED_REQUESTS or until == since:
            return 0.0, float(seen.waiting)
        each_ms = sum(self._spent) / finished
        arriving = max(0, finished + present_now - present) * each_ms / (until - since)
        more = min(float(seen.waiting), max(0.0, arriving - seen.busy))
        return more, min(seen.waiting - more, seen.waiting * min(1.0, each_ms / rules.catch_up_ms))


def _past(since_ms: int | None, pause_ms: int, now_ms: int) -> bool:
    return since_ms is None or now_ms - since_ms >= pause_ms


def _percent(load: float, slots: int) -> str:
    return f"{100 * load / slots:.0f} %"


def _requests(count: int) -> str:
    return f"{count} request{'s wait' if count != 1 else ' waits'}"
