"""Everything that is said on the control planes, as types.

Each message is a msgpack map whose `type` is the class name in snake case. Unknown fields are ignored
and missing ones take their default, so that a field can be added without a new version. docs/protocol.md
says what each message means and what happens when it is lost.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import ErrorInfo

# --- What all messages are made of: the base class, and types that carry their limits. ---

#: The versions of the protocol this release speaks.
VERSIONS = (1, 1)

#: Request id and dispatch id together.
KEY_BYTES = limits.REQUEST_ID_BYTES + limits.DISPATCH_ID_BYTES
RequestId = Annotated[bytes, Meta(min_length=limits.REQUEST_ID_BYTES, max_length=limits.REQUEST_ID_BYTES)]
DispatchId = Annotated[bytes, Meta(min_length=limits.DISPATCH_ID_BYTES, max_length=limits.DISPATCH_ID_BYTES)]
#: Where there need not be one: then it is empty.
NoDispatchId = Annotated[bytes, Meta(max_length=limits.DISPATCH_ID_BYTES)]
#: A run of a worker: request id + dispatch id.
RunKey = Annotated[bytes, Meta(min_length=limits.RUN_KEY_BYTES, max_length=limits.RUN_KEY_BYTES)]
SessionId = Annotated[bytes, Meta(min_length=limits.SESSION_ID_BYTES, max_length=limits.SESSION_ID_BYTES)]
Name = Annotated[str, Meta(max_length=limits.NAME_CHARS)]
Count = Annotated[int, Meta(ge=0, le=limits.TOKEN_INDEX)]
Number = Annotated[int, Meta(ge=0, le=limits.BEAT_NUMBER)]
Milliseconds = Annotated[int, Meta(ge=0, le=10**12)]
Port = Annotated[int, Meta(ge=1, le=65_535)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Priority = Literal["interactive", "normal", "batch"]
#: What a request wants: an answer, or something that is made at once and is no stream of tokens (see `tasks`).
Task = Literal["generate", "tokenize", "detokenize", "embed", "model_info"]
#: How many of the likeliest tokens are told beside each; None: not even the token's own logprob.
Logprobs = Annotated[int, Meta(ge=0, le=limits.TOP_LOGPROBS)] | None
Reason = Literal["stop", "length", "cancelled", "deadline", "error"]


def _tag(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class Message(msgspec.Struct, tag_field="type", tag=_tag, omit_defaults=True, frozen=True, gc=False):
    """Anything that may stand in a control bundle."""


# --- What a worker and its broker say to each other, beyond what a client says as well. ---

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


__all__ = [
    "VERSIONS",
    "WITH_BLOB",
    "Accept",
    "Accepted",
    "Adopt",
    "Attach",
    "BrokerHeartbeat",
    "BrokerToClient",
    "BrokerToWorker",
    "Cancel",
    "ClientHeartbeat",
    "ClientHello",
    "ClientToBroker",
    "Detach",
    "Dispatch",
    "DispatchId",
    "Drain",
    "DrainWorker",
    "End",
    "EndAck",
    "EngineLost",
    "Goodbye",
    "InferenceRequest",
    "Lease",
    "Logprobs",
    "Message",
    "ModelInfo",
    "Orphan",
    "Page",
    "Priority",
    "Problem",
    "Query",
    "Reason",
    "Reject",
    "Replay",
    "RequestId",
    "Result",
    "RunKey",
    "Sampling",
    "Task",
    "Usage",
    "Welcome",
    "WorkerHeartbeat",
    "WorkerHello",
    "WorkerState",
    "WorkerToBroker",
]  # fmt: skip

# --- joining and staying, both roles -----------------------------------------------------------------


class Welcome(Message, frozen=True):
    """The broker's answer to a hello: this is your session, and this is where tokens go."""

    session: SessionId
    token_port: Port
    topic: Annotated[bytes, Meta(max_length=limits.TOPIC_BYTES)] = b""
    version: Count = 1
    broker: Name = ""
    heartbeat_ms: Milliseconds = 200
    lease_ms: Milliseconds = 2000
    #: To clients: no page comes that was not asked for. An END is all that says that an answer is there.
    pull: bool = False


class BrokerHeartbeat(Message, frozen=True):
    """Broker to peer: I am here, I saw your token-plane beat `echo`, and this is how far yours have come."""

    number: Number
    echo: Number = 0
    #: To clients: next token index of each request that produces. To workers: empty.
    progress: dict[RequestId, Count] = {}
    #: To clients: how many wait before each queued request.
    waiting: dict[RequestId, Count] = {}
    #: To workers: the control sequence number of this message.
    seq: Number = 0


class Problem(Message, frozen=True):
    """Something that was sent cannot be done. With an `id` it ends that request's submission."""

    error: ErrorInfo
    id: bytes = b""
    query: Number = 0


class Goodbye(Message, frozen=True):
    """The sender leaves on purpose; nobody has to wait for a lease."""

    reason: Annotated[str, Meta(max_length=256)] = ""


# --- client to broker --------------------------------------------------------------------------------


class ClientHello(Message, frozen=True):
    versions: tuple[int, int] = VERSIONS
    name: Name = ""
    software: Name = ""
    #: Random, chosen when the client begins: by it a broker knows the one that was here before.
    incarnation: Annotated[bytes, Meta(max_length=64)] = b""


class ClientHeartbeat(Message, frozen=True):
    """`echo` is the last token-plane beat seen: 0 until the subscription works."""

    echo: Number = 0


class InferenceRequest(Message, frozen=True):
    """Submit a request. Its prompt is this message's extra frame. Sending it again attaches to it.

    A request that a broker had accepted, and lost, comes with `resume` and the tokens its sender holds: they stand
    in the extra frame after the prompt, which then is the first `prompt_bytes` of it (see `transfer`).
    """

    id: RequestId
    model: Name = ""
    max_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_TOKENS)] = 256
    stream: bool = True
    priority: Priority = "normal"
    deadline_ms: Milliseconds = 0
    detached: bool = False
    seed: Seed | None = None
    #: How many tokens the sender holds already: 0 for a new request.
    have: Count = 0
    resume: bool = False
    prompt_bytes: Count = 0
    #: Of the model those tokens are from, as `Accepted` told it.
    fingerprint: Name = ""
    #: Options for the engine, passed on unread: a msgpack map, see `Sampling`.
    sampling: msgspec.Raw = msgspec.Raw(b"\x80")
    #: No part of `sampling`, because the broker has to set aside room for them.
    logprobs: Logprobs = None
    #: For all but `generate`, `max_tokens` counts the pieces of the result, and `sampling` is a `TaskOptions`.
    task: Task = "generate"


class Attach(Message, frozen=True):
    """Follow a request that was submitted earlier, from token index `have` on.

    After a lost link `held` has what the sender was given, as chunks from token 0: another broker may go on otherwise.
    """

    id: RequestId
    have: Count = 0
    held: Annotated[list[bytes], Meta(max_length=limits.PAGE_CHUNKS)] = []
    #: A broker had accepted it: if this one does not know the request yet, it will.
    resume: bool = False


class Detach(Message, frozen=True):
    """Stop following a request. What nobody follows any more is cancelled, unless it is detached."""

    id: RequestId


class Cancel(Message, frozen=True):
    """Client to broker, and (with `dispatch`) broker to worker: stop it. The answer is always an End."""

    id: RequestId
    dispatch: NoDispatchId = b""


class Replay(Message, frozen=True):
    """Send these tokens again. Client to broker, and (with `dispatch`) broker to worker. `until` 0: to the end."""

    id: RequestId
    first: Count
    until: Count = 0
    dispatch: NoDispatchId = b""


class EndAck(Message, frozen=True):
    """All of these are complete here; forget them. Towards a worker each id is request id + dispatch id."""

    ids: Annotated[list[Annotated[bytes, Meta(max_length=KEY_BYTES)]], Meta(max_length=limits.PAGE_CHUNKS)]


class Query(Message, frozen=True):
    """Ask about the mesh: status, workers, models, why, events. Answered by `Result` or `Problem`."""

    query: Number
    what: Name
    argument: Annotated[str, Meta(max_length=1024)] = ""


class DrainWorker(Message, frozen=True):
    """Give a worker no new work (or, with `undo`, work again). `move`: give away what it runs, too."""

    query: Number
    worker: Name
    undo: bool = False
    move: bool = False


class Lease(Message, frozen=True):
    """Ask to be the only one who does something, for a while; asking again in time keeps it. `ms` 0 gives it back.

    Answered with a map: `granted`, `by` (who has it), `left_ms`. What stands in `events` is told in the events feed.
    """

    query: Number
    name: Name
    #: Random, chosen by whoever asks: by it he is known, also to the next broker.
    holder: Annotated[bytes, Meta(min_length=8, max_length=64)]
    ms: Annotated[int, Meta(ge=0, le=limits.LEASE_MS)]
    #: He has it, as far as he knows: a broker that has just begun gives it to nobody else yet.
    renewal: bool = False
    #: Models whose workers come when they are asked for: requests for them wait.
    promised: Annotated[list[Name], Meta(max_length=limits.PROMISED_MODELS)] = []
    events: Annotated[list[Annotated[str, Meta(max_length=256)]], Meta(max_length=64)] = []


# --- broker to client --------------------------------------------------------------------------------


class Accepted(Message, frozen=True):
    """The request is in, and will get an End. `ahead` requests wait before it."""

    id: RequestId
    ahead: Count = 0
    model: Name = ""
    #: Of the model that runs it, once that is known.
    fingerprint: Name = ""


class Usage(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What a request cost, in tokens and milliseconds."""

    prompt_tokens: Count = 0
    cached_tokens: Count = 0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0


class End(Message, frozen=True):
    """A request is over after `count` tokens. Worker to broker, and broker to client; resent until acknowledged."""

    id: RequestId
    count: Count
    reason: Reason
    dispatch: NoDispatchId = b""
    usage: Usage = Usage()
    error: ErrorInfo | None = None
    #: To clients: the worker that finished it, how often it moved, and its milliseconds in the queue.
    worker: Name = ""
    moves: Count = 0
    queued_ms: Count = 0
    #: Of the request's stop strings the one that ended it, if it was one of them. It is no part of the answer.
    stop: Annotated[str, Meta(max_length=limits.STOP_CHARS)] = ""


class Page(Message, frozen=True):
    """Part of a transcript, as token chunks in order. `next` is the index after it, `total` what the sender has."""

    id: RequestId
    first: Count
    next: Count
    total: Count
    chunks: Annotated[list[bytes], Meta(max_length=limits.PAGE_CHUNKS)]
    dispatch: NoDispatchId = b""


class Result(Message, frozen=True):
    """The answer to a query: msgpack, cut into `pages`."""

    query: Number
    page: Count
    pages: Count
    data: bytes


# --- inside the opaque part --------------------------------------------------------------------------


Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-100.0, le=100.0)]
#: The last so many tokens; -1: all.
Window = Annotated[int, Meta(ge=-1, le=limits.MAX_TOKENS)]


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """Options for the engine. The broker never reads them; the worker refuses what it cannot do.

    The defaults, save for those that change nothing, are those of llama.cpp. A model may have others in its file; they
    hold for what a request leaves out. The fake engine knows `stop` only.
    """

    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.8
    stop: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=limits.STOP_CHARS)]],
        Meta(max_length=limits.STOP_STRINGS),
    ] = []
    #: What the prompt is: `text` goes to the model as it is; `user` is what a person says, and is put into the
    #: model's chat template if it has one; `messages` is a JSON list of messages, likewise, and `chat` a JSON object
    #: with `messages` and `tools`.
    form: Literal["text", "user", "messages", "chat"] = "text"
    #: With `user`: the message that tells the model how to behave.
    system: Annotated[str, Meta(max_length=limits.SYSTEM_CHARS)] = ""
    #: Only the likeliest k; 0: all.
    top_k: Annotated[int, Meta(ge=0, le=2**20)] = 40
    top_p: Share = 0.95
    min_p: Share = 0.05
    typical_p: Share = 1.0
    repeat_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    penalty_last_n: Window = 64
    #: 0: no DRY.
    dry_multiplier: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    dry_base: Annotated[float, Meta(ge=1.0, le=100.0)] = 1.75
    dry_allowed_length: Annotated[int, Meta(ge=1, le=4096)] = 2
    dry_penalty_last_n: Window = -1
    xtc_probability: Share = 0.0
    xtc_threshold: Share = 0.1
    #: 2: mirostat version 2. It cannot be replayed exactly when an answer moves.
    mirostat: Literal[0, 2] = 0
    mirostat_tau: Annotated[float, Meta(ge=0.0, le=100.0)] = 5.0
    mirostat_eta: Share = 0.1
    #: Token id to what is added to its logit.
    logit_bias: Annotated[
        dict[Annotated[int, Meta(ge=0, le=2**31 - 1)], Annotated[float, Meta(ge=-1e4, le=1e4)]],
        Meta(max_length=limits.LOGIT_BIASES),
    ] = {}
    #: Never end before `max_tokens`.
    ignore_eos: bool = False
    #: `max_tokens` is as much as there may be, not what there must be room for: the context decides.
    fit: bool = False
    #: GBNF, or a JSON schema as JSON text: at most one of them.
    grammar: Annotated[str, Meta(max_length=limits.GRAMMAR_CHARS)] = ""
    json_schema: Annotated[str, Meta(max_length=limits.GRAMMAR_CHARS)] = ""
    #: With `chat`, whether the model may call its tools, in the form of `llambo.mesh.wire.naming` and with arguments
    #: that their schemas allow. `none`: it is not seen to; `auto`: it may; `required`: it does nothing else.
    tool_choice: Literal["none", "auto", "required"] = "none"
    #: Only these; empty: any of them.
    tool_names: Annotated[list[str], Meta(max_length=limits.TOOLS)] = []
    #: More than one call in an answer, one behind the other. Left out: if the model was made for calls; others tend to
    #: repeat them.
    parallel_tool_calls: bool | None = None


ClientToBroker = (
    ClientHello
    | ClientHeartbeat
    | InferenceRequest
    | Attach
    | Detach
    | Cancel
    | Replay
    | EndAck
    | Query
    | DrainWorker
    | Lease
    | Goodbye
)
BrokerToClient = Welcome | BrokerHeartbeat | Accepted | End | Page | Result | Problem | Goodbye
WorkerToBroker = WorkerHello | WorkerHeartbeat | Accept | Reject | End | EngineLost | Page | Orphan | Goodbye
BrokerToWorker = Welcome | BrokerHeartbeat | Dispatch | Adopt | Cancel | Replay | EndAck | Drain | Problem | Goodbye

#: The messages that bring an extra frame of their own.
WITH_BLOB = frozenset({InferenceRequest, Dispatch, Orphan})
