"""The difference between what is wanted and what there is, as steps with reasons. Pure, and safe to repeat.

    spawn     begin a node on a host that has room for it
    resume    take back one that drains, because it is wanted again
    retire    drain one (what it runs goes elsewhere), wait until it is empty, then end it
    replace   the same, and begin it again under its name, with other settings

Steps are in the order in which they are done: first what gives more, then replacements, then what takes away, and last
what has room only after that. So a class that moves to other hosts is never without workers if it can be helped.
Whoever applies a plan may die in the middle: the next plan, made from what there is then, is the rest of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from llambo.fleet.decide.placement import Placement
from llambo.fleet.model import Fleet, NodeClass
from llambo.fleet.world import Node, NodeState, World


class Do(StrEnum):
    SPAWN = "spawn"
    RESUME = "resume"
    RETIRE = "retire"
    REPLACE = "replace"


@dataclass(frozen=True, slots=True)
class Step:
    do: Do
    name: str
    node_class: str
    host: str
    why: str
    #: What it is begun with: of a spawn or a replacement.
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """So many of a class are wanted and cannot be, for now."""

    node_class: str
    count: int
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    steps: tuple[Step, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How many of each class, and with what."""

    #: By class. One that is not named keeps what it has, within its bounds.
    counts: Mapping[str, int] = field(default_factory=dict)
    #: By class; as `NodeClass.fingerprint` says, if it is not named.
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    #: By class and host: where none may be begun now, and where only one at a time, and why.
    barred: Mapping[tuple[str, str], str] = field(default_factory=dict)
    probed: Mapping[tuple[str, str], str] = field(default_factory=dict)


def make(fleet: Fleet, world: World, wanted: Wanted | None = None) -> Plan:
    return _Planner(fleet, world, wanted or Wanted()).plan()


class _Planner:
    def __init__(self, fleet: Fleet, world: World, wanted: Wanted) -> None:
        self._fleet = fleet
        self._wanted = wanted
        self._hosts = world.hosts
        self._room = Placement(world.hosts, world.nodes)
        self._names = {node.name for node in world.nodes}
        self._numbers: dict[str, int] = {}
        self._of: dict[str, list[Node]] = {}
        for node in world.nodes:
            self._of.setdefault(node.node_class, []).append(node)
        self._steps: list[Step] = []
        self._fewer: list[Step] = []
        self._leaving: list[Node] = []
        self._old: list[tuple[Node, NodeClass]] = []
        self._refused: list[Refusal] = []
        #: Classes and hosts that have had the one that they may have now.
        self._tried: set[tuple[str, str]] = set()

    def plan(self) -> Plan:
        for name, nodes in self._of.items():
            if self._fleet.named(name) is None:
                for node in nodes:
                    self._retire(node, f"there is no class {name} in the file any more")
        kept = self._fleet.kept()
        there = {one.name: self._existing(one) for one in kept}
        missing = {one.name: max(0, self._count(one) - there[one.name]) for one in kept}
        self._spawn(kept, there, missing)
        self._replace_all()
        self._steps += self._fewer
        for node in self._leaving:
            self._room.remove(node)
        # A replacement may make the room for another one.
        while self._replace_all():
            pass
        self._spawn(kept, there, missing)
        return Plan(tuple(self._steps), (*self._refused, *self._left_undone(kept, missing)))

    # --- what is there -----------------------------------------------------------------------------------

    def _existing(self, kept: NodeClass) -> int:
        """What is done with those that are there. How many of them will stay."""
        nodes, mark, count = self._of.get(kept.name, []), self._mark(kept), self._count(kept)
        staying: list[Node] = []
        for node in sorted(nodes, key=lambda node: (not node.counts, -node.busy, node.name)):
            if node.state is NodeState.FAILED:
                self._retire(node, f"it keeps failing{f': {node.note}' if node.note else ''}", at_once=True)
            elif node.host not in kept.hosts:
                self._retire(node, f"{kept.name} is not for {node.host} any more")
            elif node.counts:
                staying.append(node)
            elif len(staying) < count and node.fingerprint == mark:
                self._steps.append(Step(Do.RESUME, node.name, kept.name, node.host, "it is wanted again"))
                staying.append(node)
            else:
                self._retire(node, "it was on its way out")
        staying.sort(key=lambda node: _price(node, mark))
        spare, staying = staying[: max(0, len(staying) - count)], staying[max(0, len(staying) - count) :]
        for node in spare:
            self._retire(node, f"{len(spare) + len(staying)} {kept.name}, {count} wanted; {_idle(node)}")
        old = [node for node in staying if node.fingerprint != mark]
        self._old += [(node, kept) for node in sorted(old, key=lambda node: node.name)]
        return len(staying)

    def _count(self, kept: NodeClass) -> int:
        # Who should not be where he is, and cannot be ended there, would be replaced again each time.
        there = sum(
            node.counts and (node.host in kept.hosts or not self._away(node.host))
            for node in self._of.get(kept.name, ())
        )
        return self._wanted.counts.get(kept.name, max(kept.min, min(there, kept.max)))

    def _retire(self, node: Node, why: str, *, at_once: bool = False) -> None:
        if away := self._away(node.host):
            self._refused.append(Refusal(node.node_class, 1, f"{node.name} cannot be ended, {away}; {why}"))
            return
        step = Step(Do.RETIRE, node.name, node.node_class, node.host, why)
        if at_once:
            self._room.remove(node)
            self._steps.append(step)
        else:
            self._leaving.append(node)
            self._fewer.append(step)

    # --- what is to come -----------------------------------------------------------------------------------

    def _spawn(self, kept: list[NodeClass], there: dict[str, int], missing: dict[str, int]) -> None:
        """First every class gets the least it must have, then they grow, in the order of the file."""
        for one in kept:
            self._place(one, min(missing[one.name], max(0, one.min - there[one.name])), there, missing)
        for one in kept:
            self._place(one, missing[one.name], there, missing)

    def _place(self, kept: NodeClass, count: int, there: dict[str, int], missing: dict[str, int]) -> None:
        for host in self._room.place(kept, count, *self._limits(kept)) if count else ():
            self._tried.add((kept.name, host))
            there[kept.name] += 1
            missing[kept.name] -= 1
            why = "the mesh needs one" if kept.is_broker else f"number {there[kept.name]} of {self._count(kept)}"
            self._steps.append(Step(Do.SPAWN, self._new_name(kept), kept.name, host, why, self._mark(kept)))

    def _replace_all(self) -> bool:
        """Whether anything has come of it."""
        waiting, self._old = self._old, []
        for node, kept in waiting:
            self._room.remove(node)
            if self._room.fits(kept, node.host):
                self._room.add(node.host, kept.name, kept.memory_bytes, kept.cores)
                why = "its settings are others now"
                self._steps.append(Step(Do.REPLACE, node.name, kept.name, node.host, why, self._mark(kept)))
            else:
                self._room.add(node.host, node.node_class, node.memory_bytes, node.cores)
                self._old.append((node, kept))
        return len(self._old) < len(waiting)

    def _left_undone(self, kept: list[NodeClass], missing: dict[str, int]) -> Iterable[Refusal]:
        for one in kept:
            if missing[one.name]:
                yield Refusal(one.name, missing[one.name], self._room.why_not(one, *self._limits(one)))
        for node, one in self._old:
            why = self._room.why_not(replace(one, hosts=(node.host,)), {}, {})
            yield Refusal(one.name, 1, f"{node.name} keeps its old settings: {why}")

    def _new_name(self, kept: NodeClass) -> str:
        name = kept.name if kept.is_broker else ""
        while not name or name in self._names:
            self._numbers[kept.name] = number = self._numbers.get(kept.name, 0) + 1
            name = f"{kept.name}-{number:04}"
        self._names.add(name)
        return name

    def _mark(self, kept: NodeClass) -> str:
        return self._wanted.fingerprints.get(kept.name) or kept.fingerprint()

    def _away(self, host: str) -> str:
        facts = self._hosts.get(host)
        return f"{host} is away: {facts.away}" if facts and facts.away else "" if facts else f"{host} is unknown"

    def _limits(self, kept: NodeClass) -> tuple[dict[str, str], dict[str, str]]:
        barred, probed = (
            {host: why for (name, host), why in limits.items() if name == kept.name}
            for limits in (self._wanted.barred, self._wanted.probed)
        )
        for node in self._of.get(kept.name, ()):
            if node.host in probed and node.state is NodeState.STARTING:
                barred[node.host] = f"{node.name} is tried first: {probed[node.host]}"
        barred |= {
            host: f"one is tried first: {why}" for host, why in probed.items() if (kept.name, host) in self._tried
        }
        return barred, probed


def _price(node: Node, mark: str) -> tuple[object, ...]:
    """Who is missed least comes first: one with old settings, one that is not ready, the idlest, the youngest."""
    return node.fingerprint == mark, node.state is NodeState.READY, node.busy, -node.begun_ms, node.name


def _idle(node: Node) -> str:
    if node.state is not NodeState.READY:
        return "it is not ready yet"
    return f"it is the idlest, {node.busy} of {node.slots} slots busy" if node.busy else "it is idle"


def imagine(world: World, steps: Iterable[Step], fleet: Fleet) -> World:
    """The world after these steps, if everything goes well."""
    nodes = {node.name: node for node in world.nodes}
    for step in steps:
        if step.do is Do.RETIRE:
            del nodes[step.name]
        elif step.do is Do.RESUME:
            nodes[step.name] = replace(nodes[step.name], state=NodeState.READY)
        else:
            kept = fleet.named(step.node_class)
            assert kept is not None, f"{step.name} is of a class that there is"
            nodes[step.name] = Node(
                name=step.name, node_class=step.node_class, host=step.host, fingerprint=step.fingerprint,
                slots=max(kept.slots, 1), memory_bytes=kept.memory_bytes, cores=kept.cores,
            )  # fmt: skip
    return World(tuple(nodes.values()), world.hosts)
