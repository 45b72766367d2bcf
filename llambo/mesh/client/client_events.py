"""What happens to a client core, and what it orders: facts in the past tense or wishes of the user in,
orders to the sockets and deliveries to the user out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llambo.mesh.link.link_core import ConnectionChange, LinkAction, LinkState
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import ErrorInfo
from llambo.mesh.wire.tokens import Logprob

# --- the user wishes -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SubmitAsked:
    """Run this request. Without `follow` it is forgotten here as soon as it is accepted."""

    request: m.InferenceRequest
    prompt: bytes
    follow: bool = True


@dataclass(frozen=True, slots=True)
class AttachAsked:
    """Follow a request that somebody submitted earlier, from token index `have` on."""

    id: bytes
    have: int = 0
    #: How it was submitted, if that was from here: a broker that never knew it, or has lost it, is asked anew.
    again: tuple[m.InferenceRequest, bytes] | None = None


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """Stop a request, mine or not. With `drop` its remaining tokens are not wanted either."""

    id: bytes
    drop: bool = False


@dataclass(frozen=True, slots=True)
class QueryAsked:
    query: int
    what: str
    argument: str = ""


@dataclass(frozen=True, slots=True)
class CommandAsked:
    """A wish that is no question, but is answered like one; its `query` is the number of the answer."""

    message: m.DrainWorker | m.Lease


@dataclass(frozen=True, slots=True)
class ReaderLeft:
    """Nobody waits for this request or query any more; it goes on without us."""

    key: bytes | int


@dataclass(frozen=True, slots=True)
class ReaderBehind:
    """The reader of this request is too far behind: take no more tokens for it."""

    id: bytes


@dataclass(frozen=True, slots=True)
class ReaderCaughtUp:
    """The reader has caught up: fetch what was left out, and go on."""

    id: bytes


@dataclass(frozen=True, slots=True)
class LeaveAsked:
    reason: str = ""


# --- the world reports -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ControlArrived:
    """One decoded control bundle (`codec.Bundle`)."""

    session: bytes
    messages: list[tuple[Any, bytes]]
    problems: list[m.Problem]
    link: int = 0


@dataclass(frozen=True, slots=True)
class TokensArrived:
    """A drained batch of token-plane frames, without their topic."""

    frames: list[bytes]
    link: int = 0


@dataclass(frozen=True, slots=True)
class ConnectionChanged:
    """The control connection is there, is broken, or cannot be had."""

    change: ConnectionChange


@dataclass(frozen=True, slots=True)
class BrokersFound:
    """The names were looked up: there are so many brokers to choose from."""

    count: int


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that was asked for has come."""


UserEvent = (
    SubmitAsked | AttachAsked | CancelAsked | QueryAsked | CommandAsked | ReaderLeft | ReaderBehind | ReaderCaughtUp
)
Event = UserEvent | LeaveAsked | ControlArrived | TokensArrived | ConnectionChanged | BrokersFound | Tick

# --- deliveries to the user --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeliverTokens:
    """The next tokens of a request, in order, and the bytes of each."""

    id: bytes
    ids: list[int]
    pieces: list[bytes]
    #: Of each token, if they were asked for.
    logprobs: Sequence[Logprob | None] = ()


@dataclass(frozen=True, slots=True)
class ReportPlace:
    """The request is in, for this model; `ahead` others wait before it."""

    id: bytes
    ahead: int
    model: str


@dataclass(frozen=True, slots=True)
class ReportEnd:
    """The request is over and all its tokens were delivered (unless they were not wanted)."""

    id: bytes
    end: m.End


@dataclass(frozen=True, slots=True)
class ReportFailure:
    """The request (bytes) or query (int) could not be done."""

    key: bytes | int
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class DeliverResult:
    """The answer to a query: msgpack."""

    query: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ReportLink:
    state: LinkState
    problem: ErrorInfo | None = None
    link: int = 0


#: What is about one request or query.
Delivery = DeliverTokens | ReportPlace | ReportEnd | ReportFailure | DeliverResult
Action = LinkAction | Delivery | ReportLink
