"""The client core: its events (calls of the user, arrivals) and actions (messages, deliveries to the user)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llambo.mesh.link.link_core import ConnectionChange, LinkAction, LinkState
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import ErrorInfo
from llambo.mesh.wire.tokens import Logprob

# --- calls of the user -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SubmitAsked:
    """Run this request. Without `follow` this client drops it as soon as it is accepted."""

    request: m.InferenceRequest
    prompt: bytes
    follow: bool = True


@dataclass(frozen=True, slots=True)
class AttachAsked:
    """Follow a request that was submitted earlier, from token index `have` on."""

    id: bytes
    have: int = 0
    #: The request, if this client submitted it: it is submitted again to a broker that does not know it.
    again: tuple[m.InferenceRequest, bytes] | None = None


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """Stop a request of this or another client. With `drop` its remaining tokens are not delivered."""

    id: bytes
    drop: bool = False


@dataclass(frozen=True, slots=True)
class QueryAsked:
    query: int
    what: str
    argument: str = ""


@dataclass(frozen=True, slots=True)
class CommandAsked:
    """A command that is answered as a query is; its `query` is the number of the answer."""

    message: m.DrainWorker | m.Lease


@dataclass(frozen=True, slots=True)
class ReaderLeft:
    """The caller no longer waits for this request or query. A request goes on without this client."""

    key: bytes | int


@dataclass(frozen=True, slots=True)
class ReaderBehind:
    """The reader of this request is too far behind: leave out its tokens for now."""

    id: bytes


@dataclass(frozen=True, slots=True)
class ReaderCaughtUp:
    """The reader has caught up: fetch what was left out, and go on."""

    id: bytes


@dataclass(frozen=True, slots=True)
class LeaveAsked:
    reason: str = ""


# --- arrivals and time -----------------------------------------------------------------------------------


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
    """The control connection was made, was lost, or could not be made."""

    change: ConnectionChange


@dataclass(frozen=True, slots=True)
class BrokersFound:
    """The names were looked up: the client can use so many brokers."""

    count: int


@dataclass(frozen=True, slots=True)
class Tick:
    """The time of `next_wakeup_ms` has come."""


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
    #: Of each token, if they were requested.
    logprobs: Sequence[Logprob | None] = ()


@dataclass(frozen=True, slots=True)
class ReportPlace:
    """The request is accepted, for this model; `ahead` others wait before it. `fake`: its words are made up."""

    id: bytes
    ahead: int
    model: str
    fake: bool = False


@dataclass(frozen=True, slots=True)
class ReportEnd:
    """The request has ended, and all its tokens were delivered, unless they were not wanted."""

    id: bytes
    end: m.End


@dataclass(frozen=True, slots=True)
class ReportFailure:
    """The request (bytes) or query (int) has failed."""

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


#: Deliveries for one request or query.
Delivery = DeliverTokens | ReportPlace | ReportEnd | ReportFailure | DeliverResult
Action = LinkAction | Delivery | ReportLink
