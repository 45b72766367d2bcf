"""Facts for the worker core: what has happened, in the past tense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llambo.mesh.link.link_core import ConnectionChange
from llambo.mesh.wire.errors import ErrorInfo
from llambo.mesh.wire.messages import ModelInfo
from llambo.worker.engine.protocol import Output


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
    """The control connection to a broker is there, is broken, or cannot be had."""

    link: int
    change: ConnectionChange


@dataclass(frozen=True, slots=True)
class EngineProgressed:
    """The engine is still loading, or has a problem with it and ends."""

    note: str
    problem: str = ""
    percent: int = -1


@dataclass(frozen=True, slots=True)
class EngineReady:
    models: list[ModelInfo]
    slots: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class EngineStep:
    """One decoding step. Without outputs it only says that the engine is alive."""

    outputs: list[Output]


@dataclass(frozen=True, slots=True)
class EngineRefused:
    key: bytes
    error: ErrorInfo
    final: bool = False


@dataclass(frozen=True, slots=True)
class EngineDied:
    """The engine process is gone, by itself or because it was killed; `text` says how.

    `outside`: by a signal that neither it nor we have sent.
    """

    text: str
    outside: bool = False


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody wants this worker to end: after what runs, or (`urgent`) at once."""

    urgent: bool = False


EngineEvent = EngineProgressed | EngineReady | EngineStep | EngineRefused | EngineDied
Event = Ticked | ControlArrived | Subscribed | ConnectionChanged | EngineEvent | StopRequested
