"""What can happen to one connection, and what it orders: facts in the past tense, orders in the imperative."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from llambo.mesh.client.request_options import Options
from llambo.mesh.wire.errors import ErrorInfo

# --- facts -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrived:
    data: bytes


@dataclass(frozen=True, slots=True)
class PeerFinished:
    """It says nothing more, but may still listen: `printf ... | nc -N` does that."""


@dataclass(frozen=True, slots=True)
class PeerHungUp:
    """It does not listen any more. What it had said may not be read yet."""


@dataclass(frozen=True, slots=True)
class Filled:
    """The peer reads slower than it is told."""


@dataclass(frozen=True, slots=True)
class Drained:
    """It has caught up."""


@dataclass(frozen=True, slots=True)
class Text:
    """More of the answer `number`."""

    number: int
    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The answer `number` is complete, or the question is answered."""

    number: int
    data: Any


@dataclass(frozen=True, slots=True)
class Failed:
    number: int
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Stopping:
    """The bridge is about to end: what runs may finish."""


@dataclass(frozen=True, slots=True)
class TimeIsUp:
    """It ends now."""


Fact = Arrived | PeerFinished | PeerHungUp | Filled | Drained | Text | Done | Failed | Stopping | TimeIsUp

# --- orders ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Write:
    data: bytes


@dataclass(frozen=True, slots=True)
class Infer:
    """Have this answered. Each piece comes back as `Text` if `streamed`, and the end as `Done` or `Failed`."""

    number: int
    prompt: str
    options: Options = field(repr=False)
    streamed: bool


@dataclass(frozen=True, slots=True)
class Ask:
    """Have this looked up; comes back as `Done` or `Failed`."""

    number: int
    what: Literal["status", "models"]


@dataclass(frozen=True, slots=True)
class Drop:
    """Nobody wants this answer any more."""

    number: int


@dataclass(frozen=True, slots=True)
class Read:
    """Go on reading, or stop."""

    on: bool


@dataclass(frozen=True, slots=True)
class Close:
    """Once everything is written."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Nobody is there to read it."""


@dataclass(frozen=True, slots=True)
class StopBridge:
    pass


Order = Write | Infer | Ask | Drop | Read | Close | Abort | StopBridge
