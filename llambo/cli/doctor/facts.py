"""What `llambo doctor` can know about a machine: what was seen, without an opinion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llambo.mesh.wire.reports import ModelVariant

if TYPE_CHECKING:
    from llambo.worker.llama.binding import LibraryReport
    from llambo.worker.models.gpus import Gpu


@dataclass(frozen=True, slots=True)
class Unknown:
    """A probe brought no facts: it did not end in time, or it failed."""

    reason: str


@dataclass(frozen=True, slots=True)
class SettingsFacts:
    #: The file that was read; empty: none.
    file: str = ""
    #: How many settings are not at their default.
    changed: int = 0
    #: Settings that come from the environment.
    variables: frozenset[str] = frozenset()
    #: Variables that are no settings.
    warnings: tuple[str, ...] = ()
    #: `worker.engine` and `worker.gpu_layers`.
    engine: str = "auto"
    gpu_layers: str | int = "auto"
    #: Why they cannot be read, and what has to be corrected.
    error: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True)
class CpuFacts:
    machine: str
    cores: int
    threads: int
    #: As /proc/cpuinfo has them.
    flags: frozenset[str] = frozenset()
    #: How the process ended that tried AMX; empty if it ended well; None without AMX.
    amx: str | None = None


@dataclass(frozen=True, slots=True)
class ModelFile:
    model: str
    size_bytes: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    #: Why the model of the setting `worker.model` was not found.
    missing: str = ""
    #: What brings it here, if that is known.
    remedy: str = ""
    files: tuple[ModelFile, ...] = ()


@dataclass(frozen=True, slots=True)
class PortFacts:
    #: broker, gateway, bridge, metrics
    role: str
    host: str
    port: int
    #: Why it cannot be bound; empty if it can.
    problem: str = ""
    in_use: bool = False
    #: The host is not an address of this machine.
    elsewhere: bool = False
    #: Who listens there, as far as this user can see; empty if none does.
    owner: str = ""
    #: The process is visible to this user, and is one of llambo's.
    owner_seen: bool = False
    ours: bool = False
    #: What avoids this port.
    command: str = ""


@dataclass(frozen=True, slots=True)
class KeyFile:
    path: str
    #: What is in it, for people.
    what: str
    mode: int = 0o600
    #: Why it cannot be read or is not valid.
    error: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True)
class ClockFacts:
    year: int
    #: Whether the kernel says that it is synchronised; None: it does not say.
    synchronised: bool | None = None
    error_ms: float = 0.0
    #: What lets the system synchronise it, if it can.
    command: str = ""


@dataclass(frozen=True, slots=True)
class LimitFacts:
    files: int
    memory_bytes: int
    free_bytes: int
    #: Of the machine, which a control group may not give to us.
    machine_bytes: int
    #: Cores that a control group allows; 0: no limit.
    cpu_quota: float = 0.0
    cores: int = 1
    #: The address space that a process may have; 0: no limit.
    address_bytes: int = 0


@dataclass(frozen=True, slots=True)
class BrokerFacts:
    address: str
    #: A setting or a key names it.
    configured: bool
    on_this_host: bool
    #: Something accepts connections there.
    listens: bool = True
    #: With the error code and its text if it does not answer as it should.
    code: str = ""
    error: str = ""
    command: str = ""
    #: The name of the key that was used.
    key: str = ""
    #: Its ports that do not accept a connection, beside the one that was asked.
    closed: tuple[int, ...] = ()
    #: Its status was asked for: it is known what follows.
    asked: bool = False
    workers: int = 0
    ready: int = 0
    models: tuple[str, ...] = ()
    #: By model, workers that cannot continue each other's answers.
    variants: dict[str, list[ModelVariant]] = field(default_factory=dict)
    #: Models all of whose workers are drained, and one of these.
    drained: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Extra:
    name: str
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """Of one service manager."""

    what: str
    command: str
    checked: int = 0
    #: This user may not read their settings.
    unreadable: bool = False
    bad: tuple[str, ...] = ()
    #: Units that have failed.
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DiskFacts:
    path: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What commands look like here."""

    #: How packages are installed into the environment that llambo runs in.
    pip: str = "pip install"
    #: The words for pip that install an extra of llambo; `{}` stands for the extra.
    package: str = "'CLONE[{}]'"
    #: The family of the distribution: debian, fedora, suse or arch; empty for others.
    family: str = ""
    root: bool = False

    def install_extra(self, extra: str) -> str:
        return f"{self.pip} {self.package.replace('{}', extra)}"


@dataclass(frozen=True, slots=True)
class Facts:
    """None: that was not looked at."""

    settings: SettingsFacts | Unknown | None = None
    library: LibraryReport | Unknown | None = None
    gpus: tuple[Gpu, ...] | Unknown | None = None
    cpu: CpuFacts | Unknown | None = None
    models: ModelFacts | Unknown | None = None
    ports: tuple[PortFacts, ...] | Unknown | None = None
    keys: tuple[KeyFile, ...] | Unknown | None = None
    clock: ClockFacts | Unknown | None = None
    limits: LimitFacts | Unknown | None = None
    brokers: tuple[BrokerFacts, ...] | Unknown | None = None
    extras: tuple[Extra, ...] | Unknown | None = None
    systemd: tuple[UnitFacts, ...] | Unknown | None = None
    disk: tuple[DiskFacts, ...] | Unknown | None = None
    host: HostFacts = HostFacts()
