"""Events of the worker core: what has happened, in the past tense.

Messages of the engine child are events as they are: `Progress`, `Ready`, `Step` and `Refused` of `engine.protocol`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llambo.mesh.link.link_core import ConnectionChange
from llambo.worker.engine.protocol import Progress, Ready, Refused, Step


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class ControlArrived:
    """One bundle from a broker: each message with its extra frame."""

    link: int
    session: bytes
    messages: list[tuple[Any, bytes]]


@dataclass(frozen=True, slots=True)
class Subscribed:
    """The broker's subscription has reached our token socket: what is published from now on arrives."""

    link: int


@dataclass(frozen=True, slots=True)
class ConnectionChanged:
    """The control connection to a broker was made, has broken, or could not be made."""

    link: int
    change: ConnectionChange


@dataclass(frozen=True, slots=True)
class EngineDied:
    """The engine process is gone, by itself or because it was killed; `text` says how.

    `outside`: by a signal that neither the engine nor this worker has sent.
    """

    text: str
    outside: bool = False


@dataclass(frozen=True, slots=True)
class StopRequested:
    """An operator or supervisor has asked this worker to end: after its runs have ended, or (`urgent`) at once."""

    urgent: bool = False


EngineMessage = Progress | Ready | Step | Refused
Event = Ticked | ControlArrived | Subscribed | ConnectionChanged | EngineMessage | EngineDied | StopRequested
