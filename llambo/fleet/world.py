"""What there is: which nodes run where, and what hosts have. Facts, put together from providers and from the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from llambo.fleet.model import Fleet, Host


class NodeState(StrEnum):
    STARTING = "starting"  # it was begun, and does not work yet
    READY = "ready"
    DRAINING = "draining"  # it finishes what it runs, or has; it can be taken back
    FAILED = "failed"  # it ended again and again, or never became ready


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A worker (or the broker) that a provider keeps. What it takes of its host is what it was begun with."""

    name: str
    node_class: str
    host: str
    fingerprint: str
    state: NodeState = NodeState.READY
    busy: int = 0
    slots: int = 1
    memory_bytes: int = 0
    cores: float = 0.0
    #: Of two, the later one was begun later.
    begun_ms: int = 0
    #: Of one that failed: its last words.
    note: str = ""

    @property
    def counts(self) -> bool:
        """Whether it does the work of its class, or soon will."""
        return self.state in (NodeState.STARTING, NodeState.READY)


@dataclass(frozen=True, slots=True)
class HostFacts:
    memory_bytes: int
    cores: float
    #: Why nothing can be begun or ended there now; empty: it can.
    away: str = ""


@dataclass(frozen=True, slots=True)
class World:
    nodes: tuple[Node, ...] = ()
    hosts: Mapping[str, HostFacts] = field(default_factory=dict)

    def of(self, node_class: str) -> list[Node]:
        return [node for node in self.nodes if node.node_class == node_class]


def facts_of(host: Host, memory_bytes: int = 0, cores: float = 0.0, away: str = "") -> HostFacts:
    """What the file says of it, or else what the machine has."""
    return HostFacts(host.memory_bytes or memory_bytes, host.cores or cores, away)


def as_the_file_says(fleet: Fleet) -> dict[str, HostFacts]:
    return {name: facts_of(host) for name, host in fleet.hosts.items()}
