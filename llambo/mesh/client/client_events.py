"""The client core: its events (calls of the user, arrivals) and actions (messages, deliveries to the user)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from llambo.mesh.link.link_core import ConnectionChange, LinkAction, LinkState
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import ErrorInfo
from llambo.mesh.wire.tokens import Logprob

Order = m.DrainWorker | m.HoldModel | m.PullModel | m.Lease

# --- calls of the user -----------------------------------------------------------------------------------


class SubmitAsked(msgspec.Struct, frozen=True):
    """Run this request. Without `follow` this client drops it as soon as it is accepted.

    `resume`: another client submitted it, and is gone. A broker or a worker may have it.
    """

    request: m.InferenceRequest
    prompt: bytes
    follow: bool = True
    resume: bool = False


class AttachAsked(msgspec.Struct, frozen=True):
    """Follow a request that was submitted earlier, from token index `have` on."""

    id: bytes
    have: int = 0
    #: The request, if this client submitted it: it is submitted again to a broker that does not know it.
    again: tuple[m.InferenceRequest, bytes] | None = None


class CancelAsked(msgspec.Struct, frozen=True):
    """Stop a request of this or another client. With `drop` its remaining tokens are not delivered."""

    id: bytes
    drop: bool = False


class QueryAsked(msgspec.Struct, frozen=True):
    query: int
    what: str
    argument: str = ""


class CommandAsked(msgspec.Struct, frozen=True):
    """A command that is answered as a query is; its `query` is the number of the answer."""

    message: Order


class ReaderLeft(msgspec.Struct, frozen=True):
    """The caller no longer waits for this request or query. A request goes on without this client."""

    key: bytes | int


class ReaderBehind(msgspec.Struct, frozen=True):
    """The reader of this request is too far behind: leave out its tokens for now."""

    id: bytes
    #: How many to fetch at a time once it has caught up.
    at_a_time: int = limits.TOKEN_INDEX


class ReaderCaughtUp(msgspec.Struct, frozen=True):
    """The reader has caught up: fetch what was left out, and go on."""

    id: bytes


class LeaveAsked(msgspec.Struct, frozen=True):
    reason: str = ""


# --- arrivals and time -----------------------------------------------------------------------------------


class ControlArrived(msgspec.Struct, frozen=True):
    """One decoded control bundle (`codec.Bundle`)."""

    session: bytes
    messages: list[tuple[Any, bytes]]
    problems: list[m.Problem]
    link: int = 0


class TokensArrived(msgspec.Struct, frozen=True):
    """A drained batch of token-plane frames, without their topic."""

    frames: list[bytes]
    link: int = 0


class ConnectionChanged(msgspec.Struct, frozen=True):
    """The control connection was made, was lost, or could not be made."""

    change: ConnectionChange


class BrokersFound(msgspec.Struct, frozen=True):
    """The names were looked up: the client can use so many brokers."""

    count: int


class Tick(msgspec.Struct, frozen=True):
    """The time of `next_wakeup_ms` has come."""


UserEvent = (
    SubmitAsked | AttachAsked | CancelAsked | QueryAsked | CommandAsked | ReaderLeft | ReaderBehind | ReaderCaughtUp
)
Event = UserEvent | LeaveAsked | ControlArrived | TokensArrived | ConnectionChanged | BrokersFound | Tick

# --- deliveries to the user --------------------------------------------------------------------------------


class DeliverTokens(msgspec.Struct, frozen=True):
    """The next tokens of a request, in order, and the bytes of each."""

    id: bytes
    ids: list[int]
    pieces: list[bytes]
    #: Of each token, if they were requested.
    logprobs: Sequence[Logprob | None] = ()


class ReportPlace(msgspec.Struct, frozen=True):
    """The request is accepted, for this model; `ahead` others wait before it. `fake`: its words are made up."""

    id: bytes
    ahead: int
    model: str
    fake: bool = False


class ReportNote(msgspec.Struct, frozen=True):
    """Why the request waits, if there is more to say than its place; empty: there is no more."""

    id: bytes
    note: str


class ReportEnd(msgspec.Struct, frozen=True):
    """The request has ended, and all its tokens were delivered, unless they were not wanted."""

    id: bytes
    end: m.End


class ReportFailure(msgspec.Struct, frozen=True):
    """The request (bytes) or query (int) has failed."""

    key: bytes | int
    error: ErrorInfo


class DeliverResult(msgspec.Struct, frozen=True):
    """The answer to a query: msgpack."""

    query: int
    data: bytes


class ReportLink(msgspec.Struct, frozen=True):
    state: LinkState
    problem: ErrorInfo | None = None
    link: int = 0


#: Deliveries for one request or query.
Delivery = DeliverTokens | ReportPlace | ReportNote | ReportEnd | ReportFailure | DeliverResult
Action = LinkAction | Delivery | ReportLink
