"""What there is: which nodes run where, and what hosts have. Facts, put together from providers and from the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from llambo.fleet.model import Host


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a node was started with, as its provider stores it."""

    name: str
    node_class: str
    host: str
    fingerprint: str
    memory_bytes: int
    cores: float
    slots: int
    #: Wall clock.
    begun_ms: int
    #: It has been ready at least once.
    ready: bool = False
    #: Of a broker: where it listens.
    address: str = ""


class NodeFailed(Exception):
    """A node ended before it was ready, or was not ready in time, or could not be started or ended."""

    def __init__(self, name: str, how: str, log_tail: str) -> None:
        super().__init__(f"{name} {how}")
        self.name, self.how, self.log_tail = name, how, log_tail


class NodeState(StrEnum):
    STARTING = "starting"  # started, and not ready yet
    READY = "ready"
    DRAINING = "draining"  # it finishes its runs, or has finished them; it can be resumed
    FAILED = "failed"  # it ended again and again, or never became ready


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A worker (or the broker) that a provider runs. Memory and cores are those that it was started with."""

    name: str
    node_class: str
    host: str
    fingerprint: str
    state: NodeState = NodeState.READY
    busy: int = 0
    slots: int = 1
    memory_bytes: int = 0
    cores: float = 0.0
    begun_ms: int = 0
    #: Why it failed, or why its state is uncertain.
    note: str = ""

    @property
    def counts(self) -> bool:
        """True if it does the work of its class, or soon will."""
        return self.state in (NodeState.STARTING, NodeState.READY)


@dataclass(frozen=True, slots=True)
class HostFacts:
    memory_bytes: int
    cores: float
    #: Why nothing can be started or ended there now; empty: it can.
    away: str = ""


@dataclass(frozen=True, slots=True)
class World:
    nodes: tuple[Node, ...] = ()
    hosts: Mapping[str, HostFacts] = field(default_factory=dict)

    def of(self, node_class: str) -> list[Node]:
        return [node for node in self.nodes if node.node_class == node_class]


def facts_of(host: Host, memory_bytes: int = 0, cores: float = 0.0, away: str = "") -> HostFacts:
    """What the file says about the host; where it says nothing, what the machine has."""
    return HostFacts(host.memory_bytes or memory_bytes, host.cores or cores, away)
