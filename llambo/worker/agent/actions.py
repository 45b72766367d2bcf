"""Actions of the worker core: what has to be done, in the imperative. Those of a link are in `mesh.link.link_core`."""

from __future__ import annotations

from dataclasses import dataclass

from llambo.mesh.link.link_core import LinkAction
from llambo.worker.engine.protocol import Start


@dataclass(frozen=True, slots=True)
class SpawnEngine:
    """Start an engine child. `Ready` or `EngineDied` will follow. `safe`: without what may not work on this machine."""

    safe: bool = False


@dataclass(frozen=True, slots=True)
class KillEngine:
    """Kill the engine child. `EngineDied` will follow."""


@dataclass(frozen=True, slots=True)
class StartRun:
    """Give this sequence to the engine."""

    start: Start


@dataclass(frozen=True, slots=True)
class StopRun:
    """Stop this sequence in the engine."""

    key: bytes


@dataclass(frozen=True, slots=True)
class NotifyReady:
    """Returned once: from now on a broker can dispatch to this worker."""


@dataclass(frozen=True, slots=True)
class Log:
    """Write a line to the log. `request`: the id of the request that it is about."""

    text: str
    warning: bool = False
    request: bytes = b""


@dataclass(frozen=True, slots=True)
class Exit:
    """End the process; no action follows. A `status` other than 0: the worker could not do its work."""

    text: str
    status: int = 0


EngineAction = SpawnEngine | KillEngine | StartRun | StopRun
Action = LinkAction | EngineAction | NotifyReady | Log | Exit
