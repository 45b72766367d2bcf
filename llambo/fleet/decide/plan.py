"""The difference between what is wanted and what there is, as steps with reasons. Pure, and safe to repeat.

    spawn     start a node on a host that has room for it
    resume    let a draining node work again, because it is wanted
    retire    drain a node (its runs move to other workers), wait until it is empty, then end it
    replace   the same, and start it again under its name, with the new settings

Steps are in the order in which they are carried out: first those that add nodes, then replacements, then those that
remove nodes, and last what fits only after that. So a class that moves to other hosts keeps workers where possible. The
process that carries out a plan may die at any point: the next plan, made from what there is then, is the rest of it.

The host that will be least full takes the next node, so that classes spread over hosts and the loss of a host costs few
nodes of each (`Placement`). A host is as full as the larger of its used shares of memory and of cores. A node that fits
nowhere is refused with numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from heapq import heapify, heappop, heappush

from llambo.fleet.model import Fleet, HostFacts, Node, NodeClass, NodeState, World


class StepKind(StrEnum):
    SPAWN = "spawn"
    RESUME = "resume"
    RETIRE = "retire"
    REPLACE = "replace"


@dataclass(frozen=True, slots=True)
class PlanStep:
    kind: StepKind
    name: str
    node_class: str
    host: str
    why: str
    #: What a spawn or a replacement starts.
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """So many of a class are wanted and impossible for now."""

    node_class: str
    count: int
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    steps: tuple[PlanStep, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How many of each class, and with what."""

    #: By class. A class that is missing keeps its present count, within its bounds.
    counts: Mapping[str, int] = field(default_factory=dict)
    #: By class; by default `NodeClass.fingerprint()`.
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    #: By class and host: where no node may be started now, and where only one at a time, and why.
    blocked: Mapping[tuple[str, str], str] = field(default_factory=dict)
    probing: Mapping[tuple[str, str], str] = field(default_factory=dict)


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
        self._steps: list[PlanStep] = []
        self._fewer: list[PlanStep] = []
        self._leaving: list[Node] = []
        self._old: list[tuple[Node, NodeClass]] = []
        self._refused: list[Refusal] = []
        #: Classes and hosts that have got the one node that they may have now.
        self._probed: set[tuple[str, str]] = set()

    def plan(self) -> Plan:
        for name, nodes in self._of.items():
            if self._fleet.named(name) is None:
                for node in nodes:
                    self._retire(node, f"there is no class {name} in the file any more")
        specs = self._fleet.all_classes()
        there = {one.name: self._existing(one) for one in specs}
        missing = {one.name: max(0, self._count(one) - there[one.name]) for one in specs}
        self._spawn(specs, there, missing)
        self._replace_all()
        self._steps += self._fewer
        for node in self._leaving:
            self._room.remove(node)
        # A replacement may make the room for another one.
        while self._replace_all():
            pass
        self._spawn(specs, there, missing)
        return Plan(tuple(self._steps), (*self._refused, *self._left_undone(specs, missing)))

    # --- what is there -----------------------------------------------------------------------------------

    def _existing(self, spec: NodeClass) -> int:
        """Plans the steps for the nodes of a class. Returns how many of them stay."""
        nodes, fingerprint, count = self._of.get(spec.name, []), self._fingerprint(spec), self._count(spec)
        staying: list[Node] = []
        for node in sorted(nodes, key=lambda node: (not node.counts, -node.busy, node.name)):
            if node.state is NodeState.FAILED:
                self._retire(node, f"it keeps failing{f': {node.note}' if node.note else ''}", at_once=True)
            elif node.host not in spec.hosts:
                self._retire(node, f"{spec.name} is not for {node.host} any more")
            elif node.counts:
                staying.append(node)
            elif len(staying) < count and node.fingerprint == fingerprint:
                self._steps.append(PlanStep(StepKind.RESUME, node.name, spec.name, node.host, "it is wanted again"))
                staying.append(node)
            else:
                self._retire(node, "it was being retired")
        staying.sort(key=lambda node: _price(node, fingerprint))
        spare, staying = staying[: max(0, len(staying) - count)], staying[max(0, len(staying) - count) :]
        for node in spare:
            self._retire(node, f"{len(spare) + len(staying)} {spec.name}, {count} wanted; {_idle(node)}")
        old = [node for node in staying if node.fingerprint != fingerprint]
        self._old += [(node, spec) for node in sorted(old, key=lambda node: node.name)]
        return len(staying)

    def _count(self, spec: NodeClass) -> int:
        # A node that should not be on its host, which is away, cannot be ended. If it counted, its replacement would be
        # started again at each look.
        there = sum(
            node.counts and (node.host in spec.hosts or not self._away(node.host))
            for node in self._of.get(spec.name, ())
        )
        return self._wanted.counts.get(spec.name, max(spec.min, min(there, spec.max)))

    def _retire(self, node: Node, why: str, *, at_once: bool = False) -> None:
        if away := self._away(node.host):
            self._refused.append(Refusal(node.node_class, 1, f"{node.name} cannot be ended, {away}; {why}"))
            return
        step = PlanStep(StepKind.RETIRE, node.name, node.node_class, node.host, why)
        if at_once:
            self._room.remove(node)
            self._steps.append(step)
        else:
            self._leaving.append(node)
            self._fewer.append(step)

    # --- what is to come -----------------------------------------------------------------------------------

    def _spawn(self, specs: list[NodeClass], there: dict[str, int], missing: dict[str, int]) -> None:
        """First every class gets its minimum, then they grow, in the order of the file."""
        for one in specs:
            self._place(one, min(missing[one.name], max(0, one.min - there[one.name])), there, missing)
        for one in specs:
            self._place(one, missing[one.name], there, missing)

    def _place(self, spec: NodeClass, count: int, there: dict[str, int], missing: dict[str, int]) -> None:
        for host in self._room.place(spec, count, *self._limits(spec)) if count else ():
            self._probed.add((spec.name, host))
            there[spec.name] += 1
            missing[spec.name] -= 1
            why = "the mesh needs one" if spec.is_broker else f"number {there[spec.name]} of {self._count(spec)}"
            self._steps.append(
                PlanStep(StepKind.SPAWN, self._new_name(spec), spec.name, host, why, self._fingerprint(spec))
            )

    def _replace_all(self) -> bool:
        """True if at least one more could be replaced."""
        waiting, self._old = self._old, []
        for node, spec in waiting:
            self._room.remove(node)
            if self._room.fits(spec, node.host):
                self._room.add(node.host, spec.name, spec.memory_bytes, spec.cores)
                why = "a restart was asked for, or its settings, model or release have changed"
                self._steps.append(
                    PlanStep(StepKind.REPLACE, node.name, spec.name, node.host, why, self._fingerprint(spec))
                )
            else:
                self._room.add(node.host, node.node_class, node.memory_bytes, node.cores)
                self._old.append((node, spec))
        return len(self._old) < len(waiting)

    def _left_undone(self, specs: list[NodeClass], missing: dict[str, int]) -> Iterable[Refusal]:
        for one in specs:
            if missing[one.name]:
                yield Refusal(one.name, missing[one.name], self._room.why_not(one, *self._limits(one)))
        for node, one in self._old:
            why = self._room.why_not(replace(one, hosts=(node.host,)), {}, {})
            yield Refusal(one.name, 1, f"{node.name} keeps its old settings: {why}")

    def _new_name(self, spec: NodeClass) -> str:
        name = spec.name if spec.is_broker else ""
        while not name or name in self._names:
            self._numbers[spec.name] = number = self._numbers.get(spec.name, 0) + 1
            name = f"{spec.name}-{number:04}"
        self._names.add(name)
        return name

    def _fingerprint(self, spec: NodeClass) -> str:
        return self._wanted.fingerprints.get(spec.name) or spec.fingerprint()

    def _away(self, host: str) -> str:
        facts = self._hosts.get(host)
        return f"{host} is away: {facts.away}" if facts and facts.away else "" if facts else f"{host} is unknown"

    def _limits(self, spec: NodeClass) -> tuple[dict[str, str], dict[str, str]]:
        blocked, probing = (
            {host: why for (name, host), why in limits.items() if name == spec.name}
            for limits in (self._wanted.blocked, self._wanted.probing)
        )
        for node in self._of.get(spec.name, ()):
            if node.host in probing and node.state is NodeState.STARTING:
                blocked[node.host] = f"{node.name} is tried first: {probing[node.host]}"
        blocked |= {
            host: f"one is tried first: {why}" for host, why in probing.items() if (spec.name, host) in self._probed
        }
        return blocked, probing


def _price(node: Node, fingerprint: str) -> tuple[object, ...]:
    """The cheapest to lose sorts first: with old settings, not ready, the idlest, the youngest."""
    return node.fingerprint == fingerprint, node.state is NodeState.READY, node.busy, -node.begun_ms, node.name


def _idle(node: Node) -> str:
    if node.state is not NodeState.READY:
        return "it is not ready yet"
    return f"it is the idlest, {node.busy} of {node.slots} slots busy" if node.busy else "it is idle"


def imagine(world: World, steps: Iterable[PlanStep], fleet: Fleet) -> World:
    """The world after these steps, if everything goes well."""
    nodes = {node.name: node for node in world.nodes}
    for step in steps:
        if step.kind is StepKind.RETIRE:
            del nodes[step.name]
        elif step.kind is StepKind.RESUME:
            nodes[step.name] = replace(nodes[step.name], state=NodeState.READY)
        else:
            spec = fleet.named(step.node_class)
            assert spec is not None, f"{step.name} is of a class that there is"
            nodes[step.name] = Node(
                name=step.name, node_class=step.node_class, host=step.host, fingerprint=step.fingerprint,
                slots=max(spec.slots, 1), memory_bytes=spec.memory_bytes, cores=spec.cores,
            )  # fmt: skip
    return World(tuple(nodes.values()), world.hosts)


# --- Placement: on which host the next node is placed, or why it fits nowhere. ---

#: Cores are decimal fractions; their sums are compared with this tolerance.
_SLACK = 1e-6
#: What a message proposes where workers may share cores.
HALF_A_CORE = 0.5


@dataclass(slots=True)
class Room:
    """What is used of one host."""

    facts: HostFacts
    memory_bytes: int = 0
    cores: float = 0.0
    of_class: Counter[str] = field(default_factory=Counter)

    def fits(self, wanted: NodeClass) -> bool:
        return not self.facts.away and not self._short(wanted, "")

    def take(self, node_class: str, memory_bytes: int, cores: float, sign: int = 1) -> None:
        self.memory_bytes += sign * memory_bytes
        self.cores += sign * cores
        self.of_class[node_class] += sign

    def full_with(self, wanted: NodeClass) -> tuple[float, int]:
        memory = (self.memory_bytes + wanted.memory_bytes) / max(self.facts.memory_bytes, 1)
        cores = (self.cores + wanted.cores) / max(self.facts.cores, _SLACK)
        return max(memory, cores), self.of_class[wanted.name]

    def refusal(self, wanted: NodeClass, host: str) -> str:
        return f"{host} is away: {self.facts.away}" if self.facts.away else self._short(wanted, host)

    def lacks_cores(self, wanted: NodeClass) -> bool:
        """It has memory, and too few cores."""
        memory = self.facts.memory_bytes - self.memory_bytes
        return not self.facts.away and memory >= wanted.memory_bytes and bool(self._short(wanted, ""))

    def _short(self, wanted: NodeClass, host: str) -> str:
        """What it has too little of; empty: it has room."""
        left = self.facts.memory_bytes - self.memory_bytes
        if wanted.memory_bytes > left:
            return f"{host} has {size(max(left, 0))} left of {size(self.facts.memory_bytes)}"
        cores = self.facts.cores - self.cores
        if wanted.cores and wanted.cores > cores + _SLACK:
            return f"{host} has {max(cores, 0.0):.3g} cores left of {self.facts.cores:g}"
        return ""


class Placement:
    def __init__(self, hosts: Mapping[str, HostFacts], nodes: Iterable[Node] = ()) -> None:
        self._rooms = {name: Room(facts) for name, facts in hosts.items()}
        for node in nodes:
            self.add(node.host, node.node_class, node.memory_bytes, node.cores)

    def add(self, host: str, node_class: str, memory_bytes: int, cores: float) -> None:
        if host in self._rooms:
            self._rooms[host].take(node_class, memory_bytes, cores)

    def remove(self, node: Node) -> None:
        if node.host in self._rooms:
            self._rooms[node.host].take(node.node_class, node.memory_bytes, node.cores, -1)

    def fits(self, wanted: NodeClass, host: str) -> bool:
        return host in self._rooms and self._rooms[host].fits(wanted)

    def place(self, wanted: NodeClass, count: int, blocked: Mapping[str, str], probing: Mapping[str, str]) -> list[str]:
        """Choose hosts for up to `count` nodes, and reserve their room.

        `blocked`: hosts that take none now, and why; `probing`: hosts that take only one, and why.
        """
        heap = [
            (*self._rooms[host].full_with(wanted), order, host)
            for order, host in enumerate(wanted.hosts)
            if host in self._rooms and host not in blocked
        ]
        heapify(heap)
        placed: list[str] = []
        while heap and len(placed) < count:
            *_, order, host = heappop(heap)
            room = self._rooms[host]
            if not room.fits(wanted):
                continue
            room.take(wanted.name, wanted.memory_bytes, wanted.cores)
            placed.append(host)
            if host not in probing:
                heappush(heap, (*room.full_with(wanted), order, host))
        return placed

    def fit(self, wanted: NodeClass, at_most: int) -> int:
        """How many more fit."""
        found = 0
        for host in wanted.hosts:
            room = self._rooms.get(host)
            if room is None or room.facts.away:
                continue
            by_memory = (room.facts.memory_bytes - room.memory_bytes) // max(wanted.memory_bytes, 1)
            by_cores = int((room.facts.cores - room.cores + _SLACK) / wanted.cores) if wanted.cores else at_most
            found += max(0, min(by_memory, by_cores))
        return min(found, at_most)

    def why_not(self, wanted: NodeClass, blocked: Mapping[str, str], probing: Mapping[str, str]) -> str:
        """For people: what it needs, and for each possible host why it does not fit."""
        parts = []
        for host in wanted.hosts:
            if host in blocked:
                parts.append(f"{host}: {blocked[host]}")
            elif host in self._rooms:
                parts.append(self._rooms[host].refusal(wanted, host) or f"{host}: {probing.get(host, 'one at a time')}")
            else:
                parts.append(f"nothing is known about {host}")
        shown = "; ".join(parts[:4]) + (f"; and {len(parts) - 4} more" if len(parts) > 4 else "")
        share = ""
        if HALF_A_CORE < wanted.cores <= 1 and any(
            host in self._rooms and self._rooms[host].lacks_cores(wanted) for host in wanted.hosts
        ):
            share = f"; if workers may share cores, set cores = {HALF_A_CORE} in [classes.{wanted.name}]"
        return f"{wanted.name} needs {needs(wanted)}; {shown}{share}"


def needs(wanted: NodeClass) -> str:
    cores = f" and {wanted.cores:g} core{'s' if wanted.cores != 1 else ''}" if wanted.cores else ""
    return f"{size(wanted.memory_bytes)}{cores}"


def size(count: int) -> str:
    for unit, one in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= one:
            return f"{count / one:.1f}".removesuffix(".0") + f" {unit}"
    return f"{count >> 10} KiB"
