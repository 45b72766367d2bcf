"""On which host the next node is placed, or why it fits nowhere, with numbers.

The host that will be least full takes it, so that classes spread over hosts and the loss of a host costs few nodes of
each. A host is as full as the larger of its used shares of memory and of cores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from llambo.fleet.model import NodeClass
from llambo.fleet.world import HostFacts, Node

#: Cores are decimal fractions; their sums are compared with this tolerance.
_SLACK = 1e-6


@dataclass(slots=True)
class Room:
    """What is used of one host."""

    facts: HostFacts
    memory_bytes: int = 0
    cores: float = 0.0
    of_class: Counter[str] = field(default_factory=Counter)

    def fits(self, wanted: NodeClass) -> bool:
        return not self.facts.away and not self._short(wanted)

    def take(self, node_class: str, memory_bytes: int, cores: float, sign: int = 1) -> None:
        self.memory_bytes += sign * memory_bytes
        self.cores += sign * cores
        self.of_class[node_class] += sign

    def full_with(self, wanted: NodeClass) -> tuple[float, int]:
        memory = (self.memory_bytes + wanted.memory_bytes) / max(self.facts.memory_bytes, 1)
        cores = (self.cores + wanted.cores) / max(self.facts.cores, _SLACK)
        return max(memory, cores), self.of_class[wanted.name]

    def refusal(self, wanted: NodeClass, host: str) -> str:
        return f"{host} is away: {self.facts.away}" if self.facts.away else self._short(wanted).format(host=host)

    def _short(self, wanted: NodeClass) -> str:
        left = self.facts.memory_bytes - self.memory_bytes
        if wanted.memory_bytes > left:
            return f"{{host}} has {size(max(left, 0))} left of {size(self.facts.memory_bytes)}"
        cores = self.facts.cores - self.cores
        if wanted.cores and wanted.cores > cores + _SLACK:
            return f"{{host}} has {max(cores, 0.0):.3g} cores left of {self.facts.cores:g}"
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
        return f"{wanted.name} needs {needs(wanted)}; {shown}"


def needs(wanted: NodeClass) -> str:
    cores = f" and {wanted.cores:g} core{'s' if wanted.cores != 1 else ''}" if wanted.cores else ""
    return f"{size(wanted.memory_bytes)}{cores}"


def size(count: int) -> str:
    for unit, one in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= one:
            return f"{count / one:.1f}".removesuffix(".0") + f" {unit}"
    return f"{count >> 10} KiB"
