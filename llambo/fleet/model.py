"""What an operator wants: classes of nodes, hosts, and how many of which where. Values, as in fleet.toml."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

#: The broker is started like a worker. This is the name of its class, and no other class may have it.
BROKER = "broker"
PROVIDERS = ("process", "systemd")


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

    def fingerprint(self, *more: str) -> str:
        """Workers with the same one are interchangeable. `more`: what is not in the file, as the release that runs, or
        the version of the model's file."""
        parts = [self.name, self.settings, self.memory_bytes, self.cores, self.cpu_weight, *more]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


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
