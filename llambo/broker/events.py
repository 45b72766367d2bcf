"""What can happen to a broker, in the past tense, and what its core orders the shell to do."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import Identity

# --- Events: into the core. ---


class Arrived(msgspec.Struct, frozen=True):
    """Control messages of one peer: its route, and the session it claims."""

    route: bytes
    session: bytes
    #: Each with its extra frame, or without.
    messages: list[tuple[m.Message, bytes]]
    #: What to answer for the parts that could not be read.
    problems: list[m.Problem] = msgspec.field(default_factory=list)
    #: The public key that the connection has proved; empty without keys.
    user: str = ""


class ClientSaid(Arrived, frozen=True):
    """From a client."""


class WorkerSaid(Arrived, frozen=True):
    """From a worker."""


class TokensArrived(msgspec.Struct, frozen=True):
    """Frames from the token plane in order of arrival: all that was there when the socket was drained."""

    frames: list[bytes]


class RouteGone(msgspec.Struct, frozen=True):
    """A message could not be sent: no peer is connected under this route now. It may come back."""

    route: bytes
    to_worker: bool


class PeersDisconnected(msgspec.Struct, frozen=True):
    """Connections of workers or hosts have ended. Which ones, only the next message to each shows."""


class Subscribed(msgspec.Struct, frozen=True):
    """A client's subscription to its session topic was granted."""

    topic: bytes


class KeysChanged(msgspec.Struct, frozen=True):
    """From now on these public keys are valid, and no others."""

    identities: Mapping[str, Identity]


class Counted(msgspec.Struct, frozen=True):
    """What the shell has counted since its start, for the metrics."""

    dropped_frames: int = 0
    doors_refused: int = 0
    subscriptions_refused: int = 0


class StopAsked(msgspec.Struct, frozen=True):
    """The broker is about to end."""

    reason: str


class Tick(msgspec.Struct, frozen=True):
    """Time has passed."""

    #: The longest turn of the shell's loop since the last tick.
    turn_ms: int = 0
    #: For how long there has been something on the control planes that was not read yet; 0: everything was read.
    unread_ms: int = 0
    #: The limit of descriptors, while most of them are in use; else 0.
    crowded: int = 0


Event = (
    ClientSaid
    | WorkerSaid
    | TokensArrived
    | RouteGone
    | PeersDisconnected
    | Subscribed
    | KeysChanged
    | Counted
    | StopAsked
    | Tick
)

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
