"""What a worker and its broker say to each other, beyond what a client says as well."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llambo.mesh import limits
from llambo.mesh.errors import ErrorInfo
from llambo.mesh.message import (
    VERSIONS,
    Count,
    DispatchId,
    Logprobs,
    Message,
    Milliseconds,
    Name,
    Number,
    Priority,
    RequestId,
    RunKey,
    Seed,
    Task,
)

# --- worker to broker --------------------------------------------------------------------------------


class ModelInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model a worker serves. Streams continue only where the fingerprint is the same."""

    name: Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]
    fingerprint: Name = ""
    context_tokens: Count = 0


#: How a worker is: its engine is loading, or works, or it takes nothing new.
WorkerState = Literal["starting", "ready", "draining"]


class WorkerHello(Message, frozen=True):
    """Who has come. One that is still loading says what it is going to serve, as far as it knows."""

    name: Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]
    #: Random, chosen when the process starts: the same worker with another incarnation has restarted.
    incarnation: Annotated[bytes, Meta(max_length=64)]
    models: Annotated[list[ModelInfo], Meta(max_length=limits.MODELS_PER_WORKER)]
    slots: Annotated[int, Meta(ge=1, le=limits.SLOTS_PER_WORKER)]
    versions: tuple[int, int] = VERSIONS
    software: Name = ""
    node_class: Name = ""
    host: Name = ""
    pid: Count = 0
    state: WorkerState = "ready"


class WorkerHeartbeat(Message, frozen=True):
    """What the worker runs, by request id + dispatch id, with the next token index of each.

    `seq` is the highest control sequence number it has received: only a dispatch at or below it can be missing.
    """

    seq: Number = 0
    #: The last token-plane beat the worker published, to compare with the one the broker saw.
    beat: Number = 0
    claims: dict[RunKey, Count] = {}
    #: Slots taken by what other brokers have given it, or by what has lost its broker.
    busy: Count = 0
    state: WorkerState = "ready"
    #: Tokens per second over the last moments, and what the engine is doing, for people.
    rate: float = 0.0
    note: Annotated[str, Meta(max_length=256)] = ""
    engine_restarts: Count = 0
    #: While it is starting: how much of the model is loaded.
    percent: Annotated[int, Meta(ge=0, le=100)] = 0
    #: What it serves, if that is not what this session's hello said; empty: it is.
    models: Annotated[list[ModelInfo], Meta(max_length=limits.MODELS_PER_WORKER)] = []
    slots: Annotated[int, Meta(ge=0, le=limits.SLOTS_PER_WORKER)] = 0
    #: Tokens per second of each stream over the last moments, waiting for the first included; 0: there were none.
    pace: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0
    #: An operator's order is in force, whichever broker passed it on; and it is to give away what runs.
    drained: bool = False
    moving: bool = False
    #: A suspect of another broker, or of one that is gone, is aboard.
    wary: bool = False


class Accept(Message, frozen=True):
    """The dispatch has arrived and has a slot."""

    id: RequestId
    dispatch: DispatchId


class Reject(Message, frozen=True):
    """The dispatch cannot be done here. `final`: nor anywhere else, so the request ends with this error."""

    id: RequestId
    dispatch: DispatchId
    error: ErrorInfo
    final: bool = False


class EngineLost(Message, frozen=True):
    """The engine died with these aboard (request id + dispatch id each); their tokens so far remain valid."""

    runs: Annotated[list[RunKey], Meta(max_length=limits.SLOTS_PER_WORKER)]
    text: Annotated[str, Meta(max_length=1024)] = ""
    #: The next token index of each, in the same order: the broker may not have them all.
    made: Annotated[list[Count], Meta(max_length=limits.SLOTS_PER_WORKER)] = []
    #: Somebody has ended it, a person or the machine: none of these is to blame.
    outside: bool = False


# --- broker to worker --------------------------------------------------------------------------------


class Dispatch(Message, frozen=True):
    """Generate. The prompt is this message's extra frame. `prefix` holds the tokens that exist already.

    With a prefix the extra frame goes on after `prompt_bytes` with the same tokens as chunks, text and all, so that
    the worker can return the whole answer should the broker be gone (see `Orphan`).
    """

    id: RequestId
    dispatch: DispatchId
    seq: Number
    model: Name
    max_tokens: Count
    seed: Seed
    prefix: list[int] = []
    prompt_bytes: Count = 0
    deadline_ms: Milliseconds = 0
    stream: bool = True
    priority: Priority = "normal"
    detached: bool = False
    sampling: msgspec.Raw = msgspec.Raw(b"\x80")
    logprobs: Logprobs = None
    task: Task = "generate"
    #: An engine died when it was to make this token: no other suspect may be aboard until it is past it.
    suspect: Count | None = None
    #: The identity that has submitted it: nobody else may follow it, at the next broker either.
    owner: Name = ""


class Adopt(Message, frozen=True):
    """This orphan has a broker again: claim it, publish its tokens here, say its END here."""

    id: RequestId
    dispatch: DispatchId
    seq: Number


class Drain(Message, frozen=True):
    """Take no new work; finish what runs, or (`move`) have it taken elsewhere. `undo` ends it."""

    undo: bool = False
    move: bool = False


# --- worker to broker, once more ---------------------------------------------------------------------


class Orphan(Message, frozen=True):
    """A run whose broker is gone, with all it was given: `work`, and in the extra frame the prompt and every token.

    Said on each new session, and to the other brokers as soon as one is lost. It runs on meanwhile.
    """

    work: Dispatch
    #: This is the broker that gave it, or what has taken its place at its address.
    home: bool = False
