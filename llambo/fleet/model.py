"""Fleets as values: what an operator wants, as in fleet.toml, and what there is, from providers and from the mesh."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePath

import msgspec

from llambo.mesh.wire.reports import WorkerRow

#: The broker is started like a worker. This is the name of its class, and no other class may have it.
BROKER = "broker"
PROVIDERS = ("process", "systemd")

# --- what is wanted ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scaling:
    """When a class grows and shrinks. Shares are of slots, in percent; waiting requests count as wanted slots."""

    #: Above `high` it grows, below `low` it shrinks; both change it so that `aim` is used.
    high_percent: int = 80
    low_percent: int = 20
    aim_percent: int = 50
    #: A request that has waited for so long makes it grow at once.
    wait_ms: int = 2_000
    #: How long it has to be above `high`, or below `low`, without interruption.
    grow_after_ms: int = 5_000
    shrink_after_ms: int = 300_000
    #: Cool-down: the least time from one growth to the next, and from any change to a shrinking.
    grow_pause_ms: int = 10_000
    shrink_pause_ms: int = 60_000
    #: With `min = 0` the last worker ends after it has been idle for so long.
    idle_ms: int = 600_000
    #: The most workers in one step; 0: as many as are needed, and at most half of them at a time when it shrinks.
    grow_by: int = 0
    shrink_by: int = 0
    #: In which time a backlog should be worked off.
    catch_up_ms: int = 30_000


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeClass:
    """One kind of worker (or the broker): what one of them needs, and its settings."""

    name: str
    #: Settings as in llambo.toml: by section and key.
    settings: Mapping[str, Mapping[str, str | int | float | bool]] = field(default_factory=dict)
    slots: int = 1
    memory_bytes: int = 0
    cores: float = 1.0
    #: Its share of a busy processor; 100 is the default of every process.
    cpu_weight: int = 100
    #: A host must have all of these.
    labels: frozenset[str] = frozenset()
    #: Names of hosts, in the order of the file.
    hosts: tuple[str, ...] = ()
    min: int = 0
    max: int = 1
    scaling: Scaling = field(default_factory=Scaling)
    #: Its line in the file.
    line: int = 0

    @property
    def is_broker(self) -> bool:
        return self.name == BROKER

    @property
    def is_host(self) -> bool:
        """Its nodes run several models, each of which is loaded on demand."""
        return bool(self._worker("models"))

    @property
    def model_names(self) -> set[str]:
        """What its models are called in the mesh. An empty one: a folder, or a reference; what that is called is known
        only where it is."""
        fake = self._worker("engine") == "fake"
        if self.is_host:
            return {_mesh_name(each.strip(), fake=fake) for each in self._worker("models").split(",")}
        return {PurePath(self._worker("model")).name.removesuffix(".gguf") or ("fake" if fake else "smollm2")}

    def _worker(self, setting: str) -> str:
        return str(self.settings.get("worker", {}).get(setting, ""))

    def fingerprint(self, *more: str) -> str:
        """Workers with the same one are interchangeable. `more`: what is not in the file, as the release that runs, or
        the version of the model's file."""
        parts = [self.name, self.settings, self.memory_bytes, self.cores, self.cpu_weight, *more]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _mesh_name(model: str, *, fake: bool) -> str:
    if fake:
        return model.partition(":")[0]
    if model.endswith(".gguf"):
        return PurePath(model).name.removesuffix(".gguf")
    return "" if "/" in model or ":" in model or model.startswith(("~", ".")) else model


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    name: str
    provider: str = "process"
    #: For ssh, as `user@box`; empty: this machine.
    address: str = ""
    #: The user's own service manager, instead of the machine's.
    user: bool = False
    #: 0: all that the machine has.
    memory_bytes: int = 0
    cores: float = 0.0
    labels: frozenset[str] = frozenset()
    line: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    name: str = "fleet"
    #: Where the workers find the broker; empty: as in the settings.
    broker_address: str = ""
    #: The folder in which their keys are made; empty: a mesh without keys.
    keys: str = ""
    #: Of an update: how many of a class are replaced at a time, and how long a new one has to work before the next.
    max_unavailable: int = 1
    settle_ms: int = 3_000
    hosts: Mapping[str, Host] = field(default_factory=dict)
    #: Without the broker, in the order of the file, which is the order in which they get resources.
    classes: Mapping[str, NodeClass] = field(default_factory=dict)
    #: None: the broker is not part of the fleet.
    broker: NodeClass | None = None

    def all_classes(self) -> list[NodeClass]:
        """With the broker, in the order in which their nodes are started."""
        return [*([self.broker] if self.broker else []), *self.classes.values()]

    def named(self, name: str) -> NodeClass | None:
        return self.broker if name == BROKER else self.classes.get(name)


# --- what there is ---------------------------------------------------------------------------------------


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


class HostedRow(WorkerRow, frozen=True, kw_only=True):
    """A node with several models, like a worker: `hosted.py`."""

    #: The names of its workers.
    workers: list[str] = []
    #: The largest share of slots in use of one of its models. If that is full, another node helps.
    busiest: float = 0.0


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
    #: Why it failed, why its state is uncertain, or what a host has loaded.
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
