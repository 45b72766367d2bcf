"""Orders of the worker core: what is to be done, in the imperative. Those for a link are in `mesh.link_core`."""

from __future__ import annotations

from dataclasses import dataclass

from llambo.mesh.link.link_core import LinkAction
from llambo.worker.engine.protocol import Start


@dataclass(frozen=True, slots=True)
class SpawnEngine:
    """Start an engine child. EngineReady or EngineDied will follow. `safe`: without what may not work here."""

    safe: bool = False


@dataclass(frozen=True, slots=True)
class KillEngine:
    """Kill the engine child. EngineDied will follow."""


@dataclass(frozen=True, slots=True)
class StartRun:
    """Give this sequence to the engine."""

    start: Start


@dataclass(frozen=True, slots=True)
class StopRun:
    """Take this sequence from the engine."""

    key: bytes


@dataclass(frozen=True, slots=True)
class NotifyReady:
    """Ordered once: a broker can dispatch to this worker from now on."""


@dataclass(frozen=True, slots=True)
class Log:
    """Tell the operator. `warning`: something is not as it should be. `request`: the one that it is about."""

    text: str
    warning: bool = False
    request: bytes = b""


@dataclass(frozen=True, slots=True)
class Exit:
    """End the process; everything else has been ordered before. A `status` other than 0: it could not do its work."""

    text: str
    status: int = 0


EngineOrder = SpawnEngine | KillEngine | StartRun | StopRun
Action = LinkAction | EngineOrder | NotifyReady | Log | Exit
