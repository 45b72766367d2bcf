"""How many workers of each class there should be: observations come in, decisions with reasons come out.

The load of a class is its busy slots and the slots that waiting requests want. Above `high` percent of its slots the
class grows, below `low` it shrinks, and both change it so that `aim` percent are used, which lies between the two. Only
a backlog, which goes away, gets no more slots than it fills. Three rules keep it from oscillating:

- It grows by the least load *throughout* `grow_after_ms`, and shrinks by the largest load *at any time* in
  `shrink_after_ms`. A shorter peak changes nothing, and neither does a shorter dip.
- To change direction, the load must really have changed. After a growth the class is used to `aim`, so less than
  `low / aim` of that load must be left, for the whole of `shrink_after_ms`; after a shrinking it takes more than
  `high / aim` of it to grow.
- Workers that are still starting count as if they were ready, so the same shortage is not filled twice.

Which workers end, and on which host new ones are started, is decided by the plan (`plan.py`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from llambo.fleet.decide.plan import Placement
from llambo.fleet.model import Fleet, HostedRow, NodeClass, Scaling, World
from llambo.mesh.wire.naming import class_of, in_class, with_adapter
from llambo.mesh.wire.reports import RequestRow, WorkerRow

# --- The largest (or smallest) value in a sliding window, at amortized constant cost for each value. ---


class WindowExtreme:
    """Of a window that ends now. Until values cover the whole window there is none."""

    def __init__(self, span_ms: int, gap_ms: int, *, largest: bool) -> None:
        """`gap_ms`: after a longer pause between two values, everything before it is dropped."""
        self._span_ms = span_ms
        self._gap_ms = gap_ms
        self._sign = 1 if largest else -1
        self._values: deque[tuple[int, float]] = deque()
        self._since_ms: int | None = None
        self._last_ms = 0

    def add(self, value: float, now_ms: int) -> None:
        if self._since_ms is None or now_ms - self._last_ms > self._gap_ms:
            self._values.clear()
            self._since_ms = now_ms
        self._last_ms = now_ms
        # A value that is older and no larger will never be the answer again.
        while self._values and self._sign * self._values[-1][1] <= self._sign * value:
            self._values.pop()
        self._values.append((now_ms, value))
        while self._values[0][0] < now_ms - self._span_ms:
            self._values.popleft()

    def value(self) -> float | None:
        if self._since_ms is None or self._last_ms - self._since_ms < self._span_ms:
            return None
        return self._values[0][1]


#: After a longer pause between two observations, those before it are dropped.
GAP_MS = 10_000
#: How far back the speed of a class is measured, and from how many requests at least.
SPEED_MS, SPEED_REQUESTS = 20_000, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassLoad:
    """One class, as it is now."""

    node_class: str
    #: Workers that are ready or starting. Not those that drain, and not those that keep failing.
    workers: int
    #: Busy slots, also of workers that drain.
    busy: int = 0
    #: Requests that wait for this class, and how long the first of them has waited.
    waiting: int = 0
    waited_ms: int = 0
    #: Requests that its workers have finished, ever; it never falls.
    done: int = 0
    #: How many more workers the hosts have room for.
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
        self.set_classes(classes)

    def set_classes(self, classes: Iterable[NodeClass]) -> None:
        """The file has changed. The history of classes that are still in it remains."""
        before, self._classes = self._classes, {}
        for spec in classes:
            known = before.get(spec.name)
            if known is None or known.spec.scaling != spec.scaling:
                known = _Class(spec, known.wanted if known else None)
            known.spec = spec
            self._classes[spec.name] = known

    def operator_wants(self, node_class: str, count: int, now_ms: int) -> None:
        """An operator has set the count. Afterwards the load decides again, after the usual pauses."""
        known = self._classes[node_class]
        known.wanted, known.grown_ms, known.changed_ms = count, now_ms, now_ms

    @property
    def counts(self) -> Mapping[str, int]:
        """How many are wanted now, of classes that have been observed."""
        return {name: known.wanted for name, known in self._classes.items() if known.wanted is not None}

    @property
    def limited(self) -> Mapping[str, str]:
        """Classes whose load needs more workers than they may have, and what limits them."""
        return {name: known.limit for name, known in self._classes.items() if known.limit}

    def handle(self, loads: Iterable[ClassLoad], now_ms: int) -> list[Decision]:
        found = [self._classes[one.node_class].handle(one, now_ms) for one in loads if one.node_class in self._classes]
        return [decision for decision in found if decision is not None]


@dataclass(slots=True)
class _Class:
    spec: NodeClass
    #: None: it has not been observed yet. It starts with the workers that there are then.
    wanted: int | None = None
    grown_ms: int | None = None
    changed_ms: int | None = None
    #: Why it has fewer workers than its load needs.
    limit: str = ""
    #: The least in a short time, and in a shorter one, which counts if a request has waited. The most in a long time,
    #: and in a longer one.
    steady: _Least = field(init=False)
    waited: _Least = field(init=False)
    most: WindowExtreme = field(init=False)
    idle: WindowExtreme = field(init=False)
    speed: _Speed = field(init=False)

    def __post_init__(self) -> None:
        rules = self.spec.scaling
        self.steady = _Least(rules.grow_after_ms)
        self.waited = _Least(min(rules.wait_ms, rules.grow_after_ms))
        self.most = WindowExtreme(rules.shrink_after_ms, GAP_MS, largest=True)
        self.idle = WindowExtreme(rules.idle_ms, GAP_MS, largest=True)
        self.speed = _Speed()

    def handle(self, seen: ClassLoad, now_ms: int) -> Decision | None:
        if self.wanted is None:
            self.wanted = seen.workers
        self.speed.add(seen, now_ms)
        more, backlog = self.speed.of_waiting(seen, self.spec.scaling)
        load = seen.busy + more + backlog
        for least in (self.steady, self.waited):
            least.add(load, 100 * (seen.busy + more) / self.spec.scaling.aim_percent + backlog, now_ms)
        for extreme in (self.most, self.idle):
            extreme.add(load, now_ms)
        wanted, why = self._bounded(*self._decide(seen, now_ms), seen)
        if wanted == self.wanted:
            return None
        decision = Decision(self.spec.name, self.wanted, wanted, why)
        self.wanted, self.changed_ms = wanted, now_ms
        if decision.more > 0:
            self.grown_ms = now_ms
        return decision

    def _decide(self, seen: ClassLoad, now_ms: int) -> tuple[int, str]:
        assert self.wanted is not None, "the first observation sets it"
        rules, slots = self.spec.scaling, self.wanted * self.spec.slots
        if not self.wanted:
            # Without workers nothing is busy. The waiting requests alone decide, and get a slot each.
            return self._grown(seen.waiting), f"{_requests(seen.waiting)} for the first worker" if seen.waiting else ""
        if _past(self.grown_ms, rules.grow_pause_ms, now_ms):
            late = seen.waited_ms > rules.wait_ms
            least = self.waited if late else self.steady
            load, needed = least.load.value(), least.needed.value()
            if load is not None and needed is not None and 100 * load > rules.high_percent * slots:
                why = f"{_percent(load, slots)} of {slots} slots wanted, more than {rules.high_percent} %"
                if late:
                    why += f"; a request has waited {seen.waited_ms / 1000:.1f} s"
                return self._grown(needed), why
        if _past(self.changed_ms, rules.shrink_pause_ms, now_ms):
            most, idle = self.most.value(), self.idle.value()
            if not self.spec.min and idle == 0:
                return 0, f"nothing to do for {rules.idle_ms / 1000:g} s"
            if most is not None and 100 * most < rules.low_percent * slots:
                why = f"at most {_percent(most, slots)} of {slots} slots wanted in {rules.shrink_after_ms / 1000:g} s"
                return self._shrunk(most), f"{why}, less than {rules.low_percent} %"
        return self.wanted, ""

    def _grown(self, slots: float) -> int:
        assert self.wanted is not None, "the first observation sets it"
        more = max(0, math.ceil(slots / self.spec.slots) - self.wanted)
        return self.wanted + min(more, self.spec.scaling.grow_by or more)

    def _shrunk(self, load: float) -> int:
        assert self.wanted is not None, "the first observation sets it"
        least = self.wanted - (self.spec.scaling.shrink_by or (self.wanted + 1) // 2)
        # The last worker ends only when it has been idle for `idle_ms`.
        needed = math.ceil(100 * load / (self.spec.scaling.aim_percent * self.spec.slots))
        return min(self.wanted, max(needed, least, 1))

    def _bounded(self, wanted: int, why: str, seen: ClassLoad) -> tuple[int, str]:
        assert self.wanted is not None, "the first observation sets it"
        spec, self.limit = self.spec, ""
        if wanted < spec.min:
            return spec.min, f"the least is {spec.min}" if self.wanted < spec.min else f"{why}; the least is {spec.min}"
        if wanted > spec.max:
            self.limit = f"the most is {spec.max}"
            return spec.max, self.limit if self.wanted > spec.max else f"{why}; {self.limit}"
        # What was wanted before may not be placed yet; only an increase has to fit.
        most = max(self.wanted, seen.workers + seen.room)
        if wanted > most:
            self.limit = f"the hosts have room for {max(0, most - seen.workers)} more"
            return most, f"{why}; {self.limit}"
        return wanted, why


class _Least:
    """The least load in a window, and the least number of slots that would serve it."""

    def __init__(self, span_ms: int) -> None:
        self.load = WindowExtreme(span_ms, GAP_MS, largest=False)
        self.needed = WindowExtreme(span_ms, GAP_MS, largest=False)

    def add(self, load: float, needed: float, now_ms: int) -> None:
        self.load.add(load, now_ms)
        self.needed.add(needed, now_ms)


class _Speed:
    """How long a request takes, and how many slots the waiting ones need."""

    def __init__(self) -> None:
        self._samples: list[tuple[int, int, int]] = []  # when, done, busy + waiting
        #: Slot-milliseconds used between each two of them.
        self._spent: list[float] = []

    def add(self, seen: ClassLoad, now_ms: int) -> None:
        if self._samples and not self._samples[-1][0] <= now_ms <= self._samples[-1][0] + GAP_MS:
            self._samples.clear()
            self._spent.clear()
        if self._samples:
            self._spent.append(seen.busy * (now_ms - self._samples[-1][0]))
        self._samples.append((now_ms, seen.done, seen.busy + seen.waiting))
        while len(self._samples) > 2 and self._samples[1][0] <= now_ms - SPEED_MS:
            del self._samples[0], self._spent[0]

    def of_waiting(self, seen: ClassLoad, rules: Scaling) -> tuple[float, float]:
        """Slots that waiting requests want: permanently, because more arrive than are served, and for the backlog.

        One slot for each, if their speed is not known. If they are short, one slot serves many in a row.
        """
        if not seen.waiting:
            return 0.0, 0.0
        (since, done, present), (until, done_now, present_now) = self._samples[0], self._samples[-1]
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


# --- Observations: from what the broker reports to the load of each class. ---
#
# The broker counts requests by model. If several classes serve one model, its waiting requests are divided among them
# by their slots; if none of them has any, they count for the first class.


@dataclass(slots=True)
class LoadObserver:
    #: By worker: what it had finished at the last observation; by class: all of them together.
    _of_worker: dict[str, int] = field(default_factory=dict)
    _of_class: dict[str, int] = field(default_factory=dict)

    def loads(
        self, fleet: Fleet, world: World, workers: Mapping[str, WorkerRow], requests: Iterable[RequestRow]
    ) -> list[ClassLoad]:
        """`workers`, `requests`: as the broker lists them."""
        waiting = [request for request in requests if request.state == "waiting"]
        room, found = Placement(world.hosts, world.nodes), []
        for spec in fleet.classes.values():
            nodes = world.of(spec.name)
            own = [workers[node.name] for node in nodes if node.name in workers]
            models = _models(spec, own)
            # Requests for this class by name are its own; others for its models are divided.
            own_requests = [request for request in waiting if class_of(request.model) == spec.name]
            share = _share(spec, fleet, world, workers, models)
            others = [one for one in waiting if one.model in models and not class_of(one.model)] if share else []
            found.append(
                ClassLoad(
                    node_class=spec.name,
                    workers=sum(node.counts for node in nodes),
                    busy=sum(_busy(spec, worker) for worker in own),
                    waiting=len(own_requests) + round(len(others) * share),
                    waited_ms=max((request.age_ms for request in (*own_requests, *others)), default=0),
                    done=self._done(spec.name, [row for worker in own for row in _workers_of(worker, workers)]),
                    room=room.fit(spec, spec.max),
                )
            )
        return found

    def _done(self, node_class: str, workers: list[WorkerRow]) -> int:
        """It never falls, although a worker that is restarted counts from zero."""
        total = self._of_class.get(node_class, 0)
        for row in workers:
            before = self._of_worker.get(row.worker, 0)
            total += row.done - before if row.done >= before else row.done
            self._of_worker[row.worker] = row.done
        self._of_class[node_class] = total
        return total


def _busy(spec: NodeClass, row: WorkerRow) -> int:
    """Of a host: as if it had the slots of one model, by the one that uses most of its own."""
    return math.ceil(row.busiest * spec.slots) if isinstance(row, HostedRow) else row.busy_slots


def _workers_of(row: WorkerRow, workers: Mapping[str, WorkerRow]) -> list[WorkerRow]:
    return [workers[name] for name in row.workers] if isinstance(row, HostedRow) else [row]


def promised_models(fleet: Fleet) -> set[str]:
    """Models of classes that may have no workers: one is started when a request asks for the model."""
    return {model for spec in fleet.classes.values() if spec.min == 0 and spec.max for model in _models(spec, [])}


def _models(spec: NodeClass, workers: list[WorkerRow]) -> set[str]:
    """What the workers report; without workers, what they will report."""
    reported = {model for worker in workers for model in worker.models}
    lora = str(spec.settings.get("worker", {}).get("lora", ""))
    adapters = ["", *(part.partition("=")[0].strip() for part in lora.split(",") if "=" in part)]
    names = [with_adapter(model, adapter) for model in spec.model_names if model for adapter in adapters]
    return reported or {each for name in names for each in (name, in_class(name, spec.name))}


def _share(spec: NodeClass, fleet: Fleet, world: World, workers: Mapping[str, WorkerRow], models: set[str]) -> float:
    slots: dict[str, int] = {}
    for one in fleet.classes.values():
        nodes = [node for node in world.of(one.name) if node.counts]
        if _models(one, [workers[node.name] for node in nodes if node.name in workers]) & models:
            slots[one.name] = len(nodes) * one.slots
    total = sum(slots.values())
    if not total:
        return float(next(iter(slots)) == spec.name)
    return slots[spec.name] / total
