"""What can happen to a broker: facts, in the past tense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import Identity


@dataclass(frozen=True, slots=True)
class ClientSaid:
    """A control message from a client: its route, the session it claims, and what it said.

    `user`: the public key that its connection has proved; empty where there are no keys.
    """

    route: bytes
    session: bytes
    messages: list[tuple[m.Message, bytes]]
    problems: list[m.Problem] = field(default_factory=list)
    user: str = ""


@dataclass(frozen=True, slots=True)
class WorkerSaid:
    """A control message from a worker."""

    route: bytes
    session: bytes
    messages: list[tuple[m.Message, bytes]]
    problems: list[m.Problem] = field(default_factory=list)
    user: str = ""


@dataclass(frozen=True, slots=True)
class TokensArrived:
    """Frames from the token plane, in order of arrival; whatever was there when the socket was drained."""

    frames: list[bytes]


@dataclass(frozen=True, slots=True)
class RouteGone:
    """A message could not be sent: nobody is connected under this route now. A hint, not a verdict."""

    route: bytes
    to_worker: bool


@dataclass(frozen=True, slots=True)
class Subscribed:
    """A client's subscription to its session topic was granted."""

    topic: bytes


@dataclass(frozen=True, slots=True)
class KeysChanged:
    """These public keys are valid from now on, and nobody else's."""

    identities: Mapping[str, Identity]


@dataclass(frozen=True, slots=True)
class Counted:
    """What the shell has counted since it began, for whoever looks at the metrics."""

    dropped_frames: int = 0
    doors_refused: int = 0
    subscriptions_refused: int = 0


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The broker is about to end."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = ClientSaid | WorkerSaid | TokensArrived | RouteGone | Subscribed | KeysChanged | Counted | StopAsked | Tick
