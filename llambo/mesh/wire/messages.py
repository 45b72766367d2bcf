"""All messages of the control planes, as types.

Each message is a msgpack map whose `type` is the class name in snake case. Unknown fields are ignored and missing ones
have their default, so that a field can be added without a new version. docs/protocol.md explains what each message
means and what happens when it is lost.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import ErrorInfo

# --- What all messages consist of: the base class, and types with their limits. ---

#: The versions of the protocol that this release supports: lowest and highest.
VERSIONS = (1, 1)

RequestId = Annotated[bytes, Meta(min_length=limits.REQUEST_ID_BYTES, max_length=limits.REQUEST_ID_BYTES)]
DispatchId = Annotated[bytes, Meta(min_length=limits.DISPATCH_ID_BYTES, max_length=limits.DISPATCH_ID_BYTES)]
#: Empty: there is none.
NoDispatchId = Annotated[bytes, Meta(max_length=limits.DISPATCH_ID_BYTES)]
#: A run of a worker: request id and dispatch id.
RunKey = Annotated[bytes, Meta(min_length=limits.RUN_KEY_BYTES, max_length=limits.RUN_KEY_BYTES)]
#: A proof that brokers make and check; empty: without keys, or by an older broker.
Mark = Annotated[bytes, Meta(max_length=limits.MARK_BYTES)]
SessionId = Annotated[bytes, Meta(min_length=limits.SESSION_ID_BYTES, max_length=limits.SESSION_ID_BYTES)]
Name = Annotated[str, Meta(max_length=limits.NAME_CHARS)]
Count = Annotated[int, Meta(ge=0, le=limits.TOKEN_INDEX)]
Number = Annotated[int, Meta(ge=0, le=limits.BEAT_NUMBER)]
Milliseconds = Annotated[int, Meta(ge=0, le=10**12)]
Bytes = Annotated[int, Meta(ge=0, le=2**53)]
Port = Annotated[int, Meta(ge=1, le=65_535)]
#: The name of a model at its source, such as `hf:org/repo`. Only hosts read it.
Ref = Annotated[str, Meta(min_length=1, max_length=limits.REF_CHARS)]
#: Random, drawn by a broker: who has it may fetch the files of one model from one host.
Ticket = Annotated[bytes, Meta(min_length=limits.TICKET_BYTES, max_length=limits.TICKET_BYTES)]
#: Of a host that has files for others: `tcp://host:port`.
ShareAddress = Annotated[str, Meta(max_length=256)]
#: A public key as ZeroMQ writes it; empty: the mesh has no keys.
PublicKey = Annotated[str, Meta(max_length=40)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Priority = Literal["interactive", "normal", "batch"]
#: The kind of a request: an answer, or a task, whose result is not a stream of tokens (see `tasks`).
Task = Literal["generate", "tokenize", "detokenize", "embed", "model_info", "rerank"]
#: How many of the likeliest tokens are sent with each token; None: not even the logprob of the token itself.
Logprobs = Annotated[int, Meta(ge=0, le=limits.TOP_LOGPROBS)] | None
Reason = Literal["stop", "length", "cancelled", "deadline", "error"]
#: What a model is for, by the metadata of its file.
Kind = Literal["generate", "embed", "rerank"]


def snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class Message(msgspec.Struct, tag_field="type", tag=snake_case, omit_defaults=True, frozen=True, gc=False):
    """Base class of the messages in a control bundle."""


# --- worker to broker --------------------------------------------------------------------------------


class ModelInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model that a worker serves. Answers continue only where the fingerprint is the same."""

    name: Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]
    fingerprint: Name = ""
    context_tokens: Count = 0
    #: Empty: not known yet, or the worker is older, and then it generates.
    kind: Literal["", "generate", "embed", "rerank"] = ""


#: The state of a worker: its engine loads the model, it accepts work, or it accepts no new work.
WorkerState = Literal["starting", "ready", "draining"]


class WorkerHello(Message, frozen=True):
    """A worker joins. While it still loads its model it announces what it will serve, as far as it knows."""

    name: Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]
    #: Random, chosen when the process starts: with another incarnation the same worker has restarted.
    incarnation: Annotated[bytes, Meta(max_length=64)]
    models: Annotated[list[ModelInfo], Meta(max_length=limits.MODELS_PER_WORKER)]
    slots: Annotated[int, Meta(ge=1, le=limits.SLOTS_PER_WORKER)]
    versions: tuple[int, int] = VERSIONS
    software: Name = ""
    node_class: Name = ""
    host: Name = ""
    pid: Count = 0
    state: WorkerState = "ready"
    #: The library that computes, with its version, for people. Unknown until it is loaded.
    library: Name = ""
    #: It goes by `idle_ms` and by the intervals in heartbeats.
    paced: bool = False
    #: An order to drain, or to end a drain, has reached this process.
    ordered: bool = False


class WorkerHeartbeat(Message, frozen=True):
    """The runs of the worker, by request id and dispatch id, with the next token index of each."""

    #: The highest control sequence number that it has received: only a dispatch at or below it can be missing.
    seq: Number = 0
    #: The last beat that the worker published on the token plane, to compare with the last that arrived.
    beat: Number = 0
    claims: dict[RunKey, Count] = {}
    #: Slots taken by requests of other brokers, or by orphans.
    busy: Count = 0
    state: WorkerState = "ready"
    #: Tokens per second over the last seconds.
    rate: float = 0.0
    #: What the engine does now, for people.
    note: Annotated[str, Meta(max_length=256)] = ""
    engine_restarts: Count = 0
    #: In the state `starting`: how much of the model is loaded.
    percent: Annotated[int, Meta(ge=0, le=100)] = 0
    #: What it serves, if that differs from the hello of this session; empty, and 0: it does not.
    models: Annotated[list[ModelInfo], Meta(max_length=limits.MODELS_PER_WORKER)] = []
    slots: Annotated[int, Meta(ge=0, le=limits.SLOTS_PER_WORKER)] = 0
    #: Tokens per second of each stream over the last seconds, with the wait for the first token; 0: there were none.
    pace: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0
    #: An operator has drained it, through any broker.
    drained: bool = False
    #: It is drained, and its runs are to move to other workers.
    moving: bool = False
    #: It runs a suspect of another broker, or of one that is gone, so it must not get one from this broker.
    wary: bool = False
    #: Beside `models`: the library that computes.
    library: Name = ""


class Accept(Message, frozen=True):
    """The dispatch has arrived, and has a slot."""

    id: RequestId
    dispatch: DispatchId


class Reject(Message, frozen=True):
    """The worker cannot run the dispatch. `final`: no other can, so the request ends with this error."""

    id: RequestId
    dispatch: DispatchId
    error: ErrorInfo
    final: bool = False


class EngineLost(Message, frozen=True):
    """The engine died while it ran these (request id and dispatch id each). Their tokens so far remain valid."""

    runs: Annotated[list[RunKey], Meta(max_length=limits.SLOTS_PER_WORKER)]
    text: Annotated[str, Meta(max_length=1024)] = ""
    #: The next token index of each, in the same order: the broker may not have received all tokens.
    made: Annotated[list[Count], Meta(max_length=limits.SLOTS_PER_WORKER)] = []
    #: A person or the system killed it: none of the requests is a suspect.
    outside: bool = False


# --- broker to worker --------------------------------------------------------------------------------


class Dispatch(Message, frozen=True):
    """Run a request. The prompt is the extra frame of this message, `prefix` the tokens that already exist.

    With a prefix the extra frame continues after `prompt_bytes` with the same tokens as chunks, so that the worker can
    return the whole answer if the broker is gone (see `Orphan`).
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
    #: An engine died at this token: until the run is past it, the worker must not run another suspect.
    suspect: Count | None = None
    #: The identity that has submitted it: no other may follow it, at this or the next broker.
    owner: Name = ""
    #: Proves to the next broker that this run was given to this worker. A worker does not read it.
    seal: Mark = b""


class Adopt(Message, frozen=True):
    """This broker takes over the orphan: claim it, publish its tokens and send its END here."""

    id: RequestId
    dispatch: DispatchId
    seq: Number


class Drain(Message, frozen=True):
    """Accept no new work; finish the runs, or (`move`) let them move to other workers. `undo` ends the drain."""

    undo: bool = False
    move: bool = False


# --- host to broker, and back -----------------------------------------------------------------------------
# A host is a process that runs workers on demand, one for each loaded model. Those join as workers with sessions of
# their own; the session of the host is about which models it has, which are loaded, and which should be.

#: A model at a host. `failed`: the last load did not succeed; it is tried again after `retry_ms`.
HostedState = Literal["stored", "loading", "ready", "unloading", "failed"]


class HostedModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model that a host has: loaded, or stored and loaded when it is wanted."""

    name: Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]
    kind: Kind = "generate"
    state: HostedState = "stored"
    #: How much of it is loaded, in the state `loading`.
    percent: Annotated[int, Meta(ge=0, le=100)] = 0
    #: Bytes that it takes of each kind of memory when it is loaded, as measured or estimated.
    needs: dict[Name, Bytes] = {}
    #: The worker that serves it while it is loaded.
    worker: Name = ""
    #: It is never evicted.
    pinned: bool = False
    #: Who wants it to be loaded, apart from requests.
    holders: Annotated[list[Name], Meta(max_length=limits.HOLDERS_PER_MODEL)] = []
    #: How long its last load took; 0: it was not loaded yet.
    load_ms: Milliseconds = 0
    #: How often it was loaded.
    loads: Count = 0
    #: Why it failed, or cannot be loaded at all, for people.
    note: Annotated[str, Meta(max_length=256)] = ""
    #: The time until a failed model is tried again; 0: when it is asked for.
    retry_ms: Milliseconds = 0
    #: Names of the adapters that it is served with: it can be asked for as `NAME+ADAPTER` as well.
    adapters: Annotated[list[Name], Meta(max_length=limits.ADAPTERS)] = []


class Memory(msgspec.Struct, frozen=True, omit_defaults=True):
    """A kind of memory of a host that models are loaded into."""

    #: The budget: what all loaded models may take together.
    bytes: Bytes
    #: What those that are loaded, or being loaded, take.
    used: Bytes = 0
    #: What embed and rerank models may take of it without being evicted for models that generate.
    helpers: Bytes = 0


#: The files of a model at a host. `wanted`: the host itself asks for them. `stuck`: other hosts do not
#: have more of them, or cannot be reached, or what they have is wrong.
FileState = Literal["absent", "wanted", "waiting", "fetching", "here", "stuck", "failed"]


class HostedFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model that is known by the name of its source, and whether its files are on this host."""

    ref: Ref
    state: FileState
    #: That are here, and of all its files; 0: not known yet.
    bytes: Bytes = 0
    size: Bytes = 0
    #: Those of them that this process has downloaded from its source.
    outside: Bytes = 0
    #: Why it failed, or what it waits for, for people.
    note: Annotated[str, Meta(max_length=256)] = ""
    #: As in the order (`FetchFiles`) that this is about.
    attempt: Number = 0
    #: Hosts that have sent wrong bytes of it.
    wrong: Annotated[list[Name], Meta(max_length=limits.SOURCES_PER_FILE)] = []


class FileSource(msgspec.Struct, frozen=True, omit_defaults=True):
    """A host that files of a model can be fetched from."""

    host: Name
    address: ShareAddress
    ticket: Ticket
    #: What its connection has to prove.
    key: PublicKey = ""


class FileOrder(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model that a host is to have, or, without `want`, is only to report about."""

    ref: Ref
    want: bool = False
    #: Download what other hosts do not have from its source. One host at a time has such an order.
    outside: bool = False
    #: Those whose statements count first come first.
    sources: Annotated[list[FileSource], Meta(max_length=limits.SOURCES_PER_FILE)] = []
    #: With a higher number it is tried again after a failure.
    attempt: Number = 0


class FileGrant(msgspec.Struct, frozen=True, omit_defaults=True):
    """Another host may fetch the files of this model here."""

    ticket: Ticket
    ref: Ref
    #: What its connection has to prove.
    key: PublicKey = ""


class HostHello(Message, frozen=True):
    """A host joins. Its first heartbeat says what it has."""

    name: Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]
    #: Random, chosen when the process starts: with another incarnation the same host has restarted.
    incarnation: Annotated[bytes, Meta(max_length=64)]
    versions: tuple[int, int] = VERSIONS
    software: Name = ""
    node_class: Name = ""
    host: Name = ""
    pid: Count = 0
    #: Where other hosts can fetch files of its models; empty: it gives none away.
    share: ShareAddress = ""
    #: It carries out `FetchFiles`.
    fetches: bool = False


class HostHeartbeat(Message, frozen=True):
    """What the host has, if the broker does not have this revision of it yet (`BrokerHeartbeat.echo`)."""

    #: The highest control sequence number that it has received.
    seq: Number = 0
    #: Rises with each change of `models` or `memory`.
    revision: Number = 0
    #: All of them; empty: as in the revision that the broker has.
    models: Annotated[list[HostedModel], Meta(max_length=limits.MODELS_PER_HOST)] = []
    #: By name: `ram`, and the devices of llama.cpp.
    memory: Annotated[dict[Name, Memory], Meta(max_length=limits.DEVICES_PER_HOST)] = {}
    #: Those that the broker has asked about, and those that this host wants, with `models` and `memory`.
    files: Annotated[list[HostedFile], Meta(max_length=limits.FILES_PER_HOST)] = []


class PlaceModels(Message, frozen=True):
    """What the broker wants to be loaded here, in this order, and what may be evicted for it, in this order.

    All of it each time, and again with each heartbeat until the host reports it as loaded, so it does not matter which
    one is lost. The host decides: it keeps to its budget, and evicts no model that is busy, pinned or held, or was
    loaded a moment ago.
    """

    seq: Number
    load: Annotated[list[Name], Meta(max_length=limits.MODELS_PER_HOST)] = []
    evict: Annotated[list[Name], Meta(max_length=limits.MODELS_PER_HOST)] = []


class Hold(Message, frozen=True):
    """Load this model and keep it, on behalf of a holder; with `undo` the holder gives it back.

    Sent again with each heartbeat until the host reports the holder.
    """

    seq: Number
    model: Name
    holder: Name
    #: The holder counts for so long; 0: until it gives the model back.
    ttl_ms: Milliseconds = 0
    pin: bool = False
    undo: bool = False


class FetchFiles(Message, frozen=True):
    """Which models a host is to have the files of, and which hosts may fetch some here.

    All of it each time, and again with each heartbeat while there is any. A host forgets it when it was not sent again
    for some heartbeats.
    """

    seq: Number
    orders: Annotated[list[FileOrder], Meta(max_length=limits.FILES_PER_HOST)] = []
    grants: Annotated[list[FileGrant], Meta(max_length=limits.FILE_GRANTS)] = []


# --- worker to broker: orphans -------------------------------------------------------------------------


class Orphan(Message, frozen=True):
    """A run whose broker is gone: `work` is its dispatch, and the extra frame has its prompt and all its tokens.

    Sent on each new session, and to the other brokers as soon as one is lost. The run continues meanwhile.
    """

    work: Dispatch
    #: The receiver is the broker of the dispatch, or runs at its address.
    home: bool = False


# --- joining and staying, both roles -----------------------------------------------------------------


class Welcome(Message, frozen=True):
    """The answer to a hello: the session, and the port of the token plane."""

    session: SessionId
    token_port: Port
    topic: Annotated[bytes, Meta(max_length=limits.TOPIC_BYTES)] = b""
    version: Count = 1
    broker: Name = ""
    heartbeat_ms: Milliseconds = 200
    lease_ms: Milliseconds = 2000
    #: To clients: pages are sent on request only. END is the only sign that an answer without `stream` is complete.
    pull: bool = False
    #: To workers: the interval of heartbeats, in both directions, while nothing runs there; 0: the same as otherwise.
    idle_ms: Milliseconds = 0


class BrokerHeartbeat(Message, frozen=True):
    """The broker lives. To clients it also reports the progress of their requests."""

    number: Number
    #: To workers: the last beat of theirs that arrived on the token plane. To hosts: the last revision of their report.
    echo: Number = 0
    #: To clients: the next token index of each request that has new tokens. To workers: empty.
    progress: dict[RequestId, Count] = {}
    #: To clients: how many requests wait before each of theirs in the queue.
    waiting: dict[RequestId, Count] = {}
    #: To workers and hosts: the control sequence number of this message.
    seq: Number = 0
    #: To clients: why a request of theirs waits, if there is more to say than its place; for people.
    notes: dict[RequestId, Annotated[str, Meta(max_length=256)]] = {}
    #: To workers: the intervals of the welcome, as they are now; 0: unchanged.
    heartbeat_ms: Milliseconds = 0
    idle_ms: Milliseconds = 0
    #: To workers: requests were dispatched to it that have not ended, as far as the broker knows.
    busy: bool = False


class Problem(Message, frozen=True):
    """Something that the peer has sent cannot be done. With an `id` it refuses or ends that request."""

    error: ErrorInfo
    id: bytes = b""
    query: Number = 0


class Goodbye(Message, frozen=True):
    """The sender disconnects on purpose, so its peer need not wait for the lease."""

    reason: Annotated[str, Meta(max_length=256)] = ""


# --- client to broker --------------------------------------------------------------------------------


class ClientHello(Message, frozen=True):
    versions: tuple[int, int] = VERSIONS
    name: Name = ""
    software: Name = ""
    #: Random, chosen when the client starts: a broker recognizes a client that connects again.
    incarnation: Annotated[bytes, Meta(max_length=64)] = b""


class ClientHeartbeat(Message, frozen=True):
    """`echo` is the last beat received on the token plane: 0 until the subscription works."""

    echo: Number = 0


class InferenceRequest(Message, frozen=True):
    """Submit a request. Its prompt is the extra frame of this message. Sending it again attaches to it.

    `resume`: a broker had accepted the request and is lost. The tokens that the sender has follow the prompt in the
    extra frame, whose first `prompt_bytes` are then the prompt (see `transfer`).
    """

    id: RequestId
    model: Name = ""
    max_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_TOKENS)] = 256
    stream: bool = True
    priority: Priority = "normal"
    deadline_ms: Milliseconds = 0
    detached: bool = False
    seed: Seed | None = None
    #: How many tokens the sender has: 0 for a new request.
    have: Count = 0
    resume: bool = False
    prompt_bytes: Count = 0
    #: The fingerprint of the model that made those tokens, from `Accepted`.
    fingerprint: Name = ""
    #: Options for the engine, which the broker passes on unread: a msgpack map, see `Sampling`.
    sampling: msgspec.Raw = msgspec.Raw(b"\x80")
    #: Not in `sampling`, because the broker has to reserve memory for them.
    logprobs: Logprobs = None
    #: For all tasks but `generate`, `max_tokens` limits the pieces of the result, and `sampling` is a `TaskOptions`.
    task: Task = "generate"
    #: With `resume`: as it came in `Accepted`. Without it the request counts as a new one.
    proof: Mark = b""


class Attach(Message, frozen=True):
    """Follow a request that was submitted earlier, from token index `have` on.

    After a lost link `held` has the tokens of the sender, as chunks from token 0: that of another broker may differ.
    """

    id: RequestId
    have: Count = 0
    held: Annotated[list[bytes], Meta(max_length=limits.PAGE_CHUNKS)] = []
    #: A broker had accepted it: if this one does not know the request yet, a worker or client may still bring it.
    resume: bool = False
    #: Of the model file that `held` is of.
    fingerprint: Name = ""


class Detach(Message, frozen=True):
    """Stop following a request. When no client follows it any more it is cancelled, unless it is detached."""

    id: RequestId


class Cancel(Message, frozen=True):
    """Client to broker, and (with `dispatch`) broker to worker: stop the request. The answer is always an End."""

    id: RequestId
    dispatch: NoDispatchId = b""


class Replay(Message, frozen=True):
    """Client to broker, and (with `dispatch`) broker to worker: send these tokens again. `until` 0: to the end."""

    id: RequestId
    first: Count
    until: Count = 0
    dispatch: NoDispatchId = b""


class EndAck(Message, frozen=True):
    """All of these are complete at the sender: drop them. To a worker each id is request id and dispatch id."""

    ids: Annotated[list[Annotated[bytes, Meta(max_length=limits.RUN_KEY_BYTES)]], Meta(max_length=limits.PAGE_CHUNKS)]


class Query(Message, frozen=True):
    """Ask about the mesh: status, workers, models, why, events. Answered by `Result` or `Problem`."""

    query: Number
    what: Name
    argument: Annotated[str, Meta(max_length=1024)] = ""


class DrainWorker(Message, frozen=True):
    """Give a worker no new work, or with `undo` work again. `move`: its runs move to other workers."""

    query: Number
    worker: Name
    undo: bool = False
    move: bool = False


class HoldModel(Message, frozen=True):
    """Load a model somewhere, or on one host, and keep it loaded; with `undo` give it back. Asking again renews it.

    The answer is a `HoldReply`.
    """

    query: Number
    model: Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]
    #: Empty: where the broker finds it best.
    host: Name = ""
    #: Chosen by the sender. The broker prefixes it with the identity of the sender.
    holder: Annotated[str, Meta(max_length=limits.HOLDER_CHARS)] = ""
    #: The holder counts for so long; 0: until it gives the model back.
    ttl_ms: Milliseconds = 0
    #: It is never evicted, until it is given back. For admins.
    pin: bool = False
    undo: bool = False


class PullModel(Message, frozen=True):
    """Let hosts have the files of a model: one downloads them, the others get them from it. For admins.

    The answer is a `PullReply`. `poll`: only ask how far it is, if this broker knows of it; otherwise as without.
    """

    query: Number
    ref: Ref
    #: The name of a host, or of a class; `all`.
    to: Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]
    poll: bool = False


class Lease(Message, frozen=True):
    """Ask for a lease, which has one holder at a time. Asking again in time renews it; `ms` 0 returns it.

    The answer is a map: `granted`, `by` (the holder), `left_ms`. The broker adds the texts in `events` to its events.
    """

    #: The number of the query; a client sets it.
    query: Number
    #: The name of the lease.
    name: Name
    #: Random, chosen by the sender: it identifies the sender, also at the next broker.
    holder: Annotated[bytes, Meta(min_length=8, max_length=64)]
    #: How long it is wanted; 0 returns it.
    ms: Annotated[int, Meta(ge=0, le=limits.LEASE_MS)]
    #: The sender has the lease, as far as it knows: a broker that has just started grants it to no other yet.
    renewal: bool = False
    #: Models whose workers are started on demand: requests for them wait.
    promised: Annotated[list[Name], Meta(max_length=limits.PROMISED_MODELS)] = []
    #: Texts for the events of the broker.
    events: Annotated[list[Annotated[str, Meta(max_length=256)]], Meta(max_length=64)] = []


# --- broker to client --------------------------------------------------------------------------------


class Accepted(Message, frozen=True):
    """The request is accepted, and will get an End. `ahead` requests wait before it."""

    id: RequestId
    ahead: Count = 0
    model: Name = ""
    #: The fingerprint of the model that runs it, once it is known.
    fingerprint: Name = ""
    #: Proves to the next broker that this one has admitted the request. A client does not read it.
    proof: Mark = b""


class Usage(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The cost of a request, in tokens and milliseconds."""

    #: Tokens of the prompt, after the chat template.
    prompt_tokens: Count = 0
    #: Those of them that did not have to be computed.
    cached_tokens: Count = 0
    #: The time for the prompt.
    prefill_ms: float = 0.0
    #: The time for the tokens of the answer.
    decode_ms: float = 0.0


class End(Message, frozen=True):
    """Worker to broker, and broker to client: a request ended after `count` tokens. Resent until acknowledged."""

    id: RequestId
    count: Count
    reason: Reason
    dispatch: NoDispatchId = b""
    usage: Usage = Usage()
    error: ErrorInfo | None = None
    #: To clients: the worker that finished it, how many times it moved, and its time in the queue.
    worker: Name = ""
    moves: Count = 0
    queued_ms: Count = 0
    #: The stop string that ended it, if one did. It is not part of the answer.
    stop: Annotated[str, Meta(max_length=limits.STOP_CHARS)] = ""


class Page(Message, frozen=True):
    """Part of a transcript, as chunks in order. `next` is the index after it, `total` that after all the sender has."""

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


# --- the part that the broker does not read --------------------------------------------------------------------------


Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-100.0, le=100.0)]
#: So many of the last tokens; -1: all.
Window = Annotated[int, Meta(ge=-1, le=limits.MAX_TOKENS)]


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """Options for the engine. The broker does not read them; the worker refuses those that it cannot apply.

    The defaults are those of llama.cpp, except for those that switch something off. The file of a model may have other
    defaults, which apply to what a request leaves out. The fake engine knows `stop` only.
    """

    #: 0: always the likeliest token.
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.8
    #: The answer ends before any of these strings.
    stop: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=limits.STOP_CHARS)]],
        Meta(max_length=limits.STOP_STRINGS),
    ] = []
    #: The form of the prompt: `text` goes to the model as it is; `user` is one message of a user, for the chat template
    #: of the model if it has one; `messages` is a JSON list of messages, and `chat` a JSON object with `messages` and
    #: `tools`, for the chat template as well.
    form: Literal["text", "user", "messages", "chat"] = "text"
    #: With `user`: the system message.
    system: Annotated[str, Meta(max_length=limits.SYSTEM_CHARS)] = ""
    #: Sample from the k likeliest tokens; 0: from all.
    top_k: Annotated[int, Meta(ge=0, le=2**20)] = 40
    #: Sample from the likeliest tokens that together have this probability; 1: from all.
    top_p: Share = 0.95
    #: Leave out tokens that are less likely than this share of the likeliest.
    min_p: Share = 0.05
    #: Sample from the tokens whose information is near the average; 1: off.
    typical_p: Share = 1.0
    #: Above 1: tokens of the last `penalty_last_n` are less likely.
    repeat_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    #: Subtracted from the logits of tokens that were there.
    presence_penalty: Penalty = 0.0
    #: Subtracted for each time that the token was there.
    frequency_penalty: Penalty = 0.0
    #: How far back the penalties look.
    penalty_last_n: Window = 64
    #: 0: DRY is off.
    dry_multiplier: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    #: How fast the penalty of DRY grows with the length of a repetition.
    dry_base: Annotated[float, Meta(ge=1.0, le=100.0)] = 1.75
    #: Repetitions that are shorter cost nothing.
    dry_allowed_length: Annotated[int, Meta(ge=1, le=4096)] = 2
    #: How far back DRY looks.
    dry_penalty_last_n: Window = -1
    #: How often XTC leaves out the likeliest tokens; 0: never.
    xtc_probability: Share = 0.0
    #: XTC leaves out tokens that are likelier than this, except the last of them.
    xtc_threshold: Share = 0.1
    #: 2: mirostat version 2. Its state cannot be restored exactly when an answer moves.
    mirostat: Literal[0, 2] = 0
    #: The surprise that mirostat aims at.
    mirostat_tau: Annotated[float, Meta(ge=0.0, le=100.0)] = 5.0
    #: How fast mirostat adapts.
    mirostat_eta: Share = 0.1
    #: By token id, a number that is added to its logit.
    logit_bias: Annotated[
        dict[Annotated[int, Meta(ge=0, le=2**31 - 1)], Annotated[float, Meta(ge=-1e4, le=1e4)]],
        Meta(max_length=limits.LOGIT_BIASES),
    ] = {}
    #: Do not end before `max_tokens`.
    ignore_eos: bool = False
    #: True: if the context has no room for `max_tokens` after the prompt, the answer ends where the context is full.
    fit: bool = False
    #: A grammar in GBNF, which the answer follows. Not together with `json_schema`.
    grammar: Annotated[str, Meta(max_length=limits.GRAMMAR_CHARS)] = ""
    #: A JSON schema as JSON text, which the answer satisfies.
    json_schema: Annotated[str, Meta(max_length=limits.GRAMMAR_CHARS)] = ""
    #: With `chat`: whether the model calls tools, in the form of `llambo.mesh.wire.conversation`, with arguments that
    #: their schemas allow. `none`: calls are not enforced; `auto`: it may call; `required`: it must.
    tool_choice: Literal["none", "auto", "required"] = "none"
    #: The tools it may call; empty: all of them.
    tool_names: Annotated[list[str], Meta(max_length=limits.TOOLS)] = []
    #: Several calls in one answer are allowed. Left out: only if the model was trained for calls; others tend to repeat
    #: them.
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
    | HoldModel
    | PullModel
    | Lease
    | Goodbye
)
BrokerToClient = Welcome | BrokerHeartbeat | Accepted | End | Page | Result | Problem | Goodbye
HostToBroker = HostHello | HostHeartbeat | Goodbye
WorkerToBroker = WorkerHello | WorkerHeartbeat | Accept | Reject | End | EngineLost | Page | Orphan | Goodbye
BrokerToHost = Welcome | BrokerHeartbeat | PlaceModels | Hold | FetchFiles | Problem | Goodbye
BrokerToWorker = Welcome | BrokerHeartbeat | Dispatch | Adopt | Cancel | Replay | EndAck | Drain | Problem | Goodbye

#: The messages that have an extra frame.
WITH_BLOB = frozenset({InferenceRequest, Dispatch, Orphan})
