"""Events of the worker core: what has happened, in the past tense. And its actions: what is to be done.

Messages of the engine child are events as they are: `Progress`, `Ready`, `Step` and `Refused` of `engine.protocol`.
The actions of a link are in `mesh.link.link_core`.
"""

from __future__ import annotations

import msgspec

from llambo.mesh.link.link_core import ConnectionChange, LinkAction
from llambo.mesh.wire import messages as m
from llambo.worker.engine.protocol import Progress, Ready, Refused, Start, Step


class Ticked(msgspec.Struct, frozen=True):
    """Time has passed."""


class ControlArrived(msgspec.Struct, frozen=True):
    """One bundle from a broker: each message with its extra frame."""

    link: int
    session: bytes
    messages: list[tuple[m.Message, bytes]]


class Subscribed(msgspec.Struct, frozen=True):
    """The broker's subscription has reached our token socket: what is published from now on arrives."""

    link: int


class ConnectionChanged(msgspec.Struct, frozen=True):
    """The control connection to a broker was made, has broken, or could not be made."""

    link: int
    change: ConnectionChange


class EngineDied(msgspec.Struct, frozen=True):
    """The engine process is gone, by itself or because it was killed; `text` describes how.

    `outside`: by a signal that neither the engine nor this worker has sent.
    """

    text: str
    outside: bool = False


class StopRequested(msgspec.Struct, frozen=True):
    """An operator or supervisor has asked this worker to end: after its runs have ended, or (`urgent`) at once.

    `unless_busy`: the host has; a worker that has runs goes on, and counts that it did (`DrainState.refusals`).
    """

    urgent: bool = False
    unless_busy: bool = False


EngineMessage = Progress | Ready | Step | Refused
Event = Ticked | ControlArrived | Subscribed | ConnectionChanged | EngineMessage | EngineDied | StopRequested


class SpawnEngine(msgspec.Struct, frozen=True):
    """Start an engine child. `Ready` or `EngineDied` will follow. `safe`: without what may not work on this machine."""

    safe: bool = False


class KillEngine(msgspec.Struct, frozen=True):
    """Kill the engine child. `EngineDied` will follow."""


class StartRun(msgspec.Struct, frozen=True):
    """Give this sequence to the engine."""

    start: Start


class StopRun(msgspec.Struct, frozen=True):
    """Stop this sequence in the engine."""

    key: bytes


class NotifyReady(msgspec.Struct, frozen=True):
    """Returned once: from now on a broker can dispatch to this worker."""


class Log(msgspec.Struct, frozen=True):
    """Write a line to the log. `request`: the id of the request that it is about."""

    text: str
    warning: bool = False
    request: bytes = b""


class Exit(msgspec.Struct, frozen=True):
    """End the process; no action follows. A `status` other than 0: the worker could not do its work."""

    text: str
    status: int = 0


EngineAction = SpawnEngine | KillEngine | StartRun | StopRun
Action = LinkAction | EngineAction | NotifyReady | Log | Exit
