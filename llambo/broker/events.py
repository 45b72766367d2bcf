"""What can happen to a broker, in the past tense, and what its core orders the shell to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import Identity

# --- Events: into the core. ---


@dataclass(frozen=True, slots=True)
class Arrived:
    """Control messages of one peer: its route, and the session it claims."""

    route: bytes
    session: bytes
    #: Each with its extra frame, or without.
    messages: list[tuple[m.Message, bytes]]
    #: What to answer for the parts that could not be read.
    problems: list[m.Problem] = field(default_factory=list)
    #: The public key that the connection has proved; empty without keys.
    user: str = ""


@dataclass(frozen=True, slots=True)
class ClientSaid(Arrived):
    """From a client."""


@dataclass(frozen=True, slots=True)
class WorkerSaid(Arrived):
    """From a worker."""


@dataclass(frozen=True, slots=True)
class TokensArrived:
    """Frames from the token plane in order of arrival: all that was there when the socket was drained."""

    frames: list[bytes]


@dataclass(frozen=True, slots=True)
class RouteGone:
    """A message could not be sent: no peer is connected under this route now. It may come back."""

    route: bytes
    to_worker: bool


@dataclass(frozen=True, slots=True)
class Subscribed:
    """A client's subscription to its session topic was granted."""

    topic: bytes


@dataclass(frozen=True, slots=True)
class KeysChanged:
    """From now on these public keys are valid, and no others."""

    identities: Mapping[str, Identity]


@dataclass(frozen=True, slots=True)
class Counted:
    """What the shell has counted since its start, for the metrics."""

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

# --- Actions: out of the core. ---


class ToClient(msgspec.Struct, frozen=True, gc=False):
    """Send on client control. Messages of one round to one route travel as one bundle."""

    route: bytes
    session: bytes
    message: m.Message


class ToWorker(msgspec.Struct, frozen=True, gc=False):
    """Send on worker control; a dispatch has the prompt as its extra frame."""

    route: bytes
    session: bytes
    message: m.Message
    blob: bytes | None = None


class Publish(msgspec.Struct, frozen=True, gc=False):
    """Publish frames on the token plane; each begins with the topic of a session."""

    frames: list[bytes]


Action = ToClient | ToWorker | Publish
