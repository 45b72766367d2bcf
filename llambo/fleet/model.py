"""What an operator wants: classes of nodes, hosts, and how many of which where. Values, as fleet.toml says them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

#: The broker is kept like a worker; its class goes by this name, which no other may have.
BROKER = "broker"
PROVIDERS = ("process", "systemd")


@dataclass(frozen=True, slots=True)
class Scaling:
    """When a class grows and shrinks. Shares are of slots, in percent; requests that wait want slots, too."""

    #: Above `high` it grows, below `low` it shrinks, and either brings it to `aim`.
    high_percent: int = 80
    low_percent: int = 20
    aim_percent: int = 50
    #: A request that has waited so long makes it grow without further proof.
    wait_ms: int = 2_000
    #: It has to be above `high` for so long, or below `low`, at every look.
    grow_after_ms: int = 5_000
    shrink_after_ms: int = 300_000
    #: Cool-down: the least time from one growth to the next, and from any change to a shrinking.
    grow_pause_ms: int = 10_000
    shrink_pause_ms: int = 60_000
    #: With `min = 0` the last worker goes after so long without anything to do.
    idle_ms: int = 600_000
    #: The most workers in one step; 0: as many as are needed, and no more than half of them at a time on the way down.
    grow_by: int = 0
    shrink_by: int = 0
    #: What has piled up should be worked off in so long.
    catch_up_ms: int = 30_000


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeClass:
    """One kind of worker (or the broker). What one of them needs, and what it is told."""

    name: str
    #: Settings as in llambo.toml: by section and key.
    settings: Mapping[str, Mapping[str, str | int | float | bool]] = field(default_factory=dict)
    slots: int = 1
    memory_bytes: int = 0
    cores: float = 1.0
    #: Its share of the processor when that is short; 100 is what everybody has.
    cpu_weight: int = 100
    #: A host must have all of these.
    labels: frozenset[str] = frozenset()
    #: Names of hosts, in the order of the file.
    hosts: tuple[str, ...] = ()
    min: int = 0
    max: int = 1
    scaling: Scaling = field(default_factory=Scaling)
    #: Where the file says it.
    line: int = 0

    @property
    def is_broker(self) -> bool:
        return self.name == BROKER

    def fingerprint(self, *more: str) -> str:
        """Two workers with the same one need not be told apart. `more`: what is not in the file, as the release that
        runs, or which bytes the model's file has."""
        told = [self.name, self.settings, self.memory_bytes, self.cores, self.cpu_weight, *more]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    name: str
    provider: str = "process"
    #: For ssh, as `user@box`; empty: this machine.
    address: str = ""
    #: Its own service manager or that of the user.
    user: bool = False
    #: 0: what the machine has.
    memory_bytes: int = 0
    cores: float = 0.0
    labels: frozenset[str] = frozenset()
    line: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    name: str = "fleet"
    #: Where the workers find the broker; empty: where the settings say.
    broker_address: str = ""
    #: The folder of keys that theirs are made in; empty: the mesh has none.
    keys: str = ""
    #: Of an update: so many of a class at a time, and a new one is to work for so long before the next one goes.
    max_unavailable: int = 1
    settle_ms: int = 3_000
    hosts: Mapping[str, Host] = field(default_factory=dict)
    #: Without the broker, in the order of the file, which is their order of precedence.
    classes: Mapping[str, NodeClass] = field(default_factory=dict)
    #: None: somebody else keeps it.
    broker: NodeClass | None = None

    def kept(self) -> list[NodeClass]:
        """Everything that is kept, in the order in which it is begun."""
        return [*([self.broker] if self.broker else []), *self.classes.values()]

    def named(self, name: str) -> NodeClass | None:
        return self.broker if name == BROKER else self.classes.get(name)
