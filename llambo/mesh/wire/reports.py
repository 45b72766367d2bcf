"""The answers of a broker to queries, as typed rows.

On the wire each is a map by field names. Fields may be added and none changes its meaning: a reader ignores fields it
does not know, and a field that an older broker does not send has its default here.
"""

from __future__ import annotations

import msgspec

from llambo.mesh.wire.naming import is_in_class


def waiting(what: str, verb: str = "waiting") -> str:
    """A sentence of `waits_for`, or of a note: "waiting for memory on box2"; "loading qwen3 on box2, 41 %" is one."""
    if what.startswith("loading ") or " is about to " in what:
        return what
    return f"{verb} {what}" if what.startswith(("for ", "until ")) else f"{verb} for {what}"


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    pass


class AccountRow(_Row, frozen=True, kw_only=True):
    """What one identity has in use on the broker, and its limits. A limit of 0 means that there is none."""

    #: Its name.
    identity: str = ""
    #: "client", "worker" or "admin".
    role: str = ""
    #: Requests that are dispatched.
    in_flight: int = 0
    #: Requests that wait.
    queued: int = 0
    #: Memory of the broker for its prompts and answers.
    bytes: int = 0
    #: Since the broker started, as are `ended`, `tokens` and `refused`.
    submitted: int = 0
    #: Requests that have ended.
    ended: int = 0
    #: Tokens of its answers.
    tokens: int = 0
    #: Refused requests.
    refused: int = 0
    #: Refused requests by error code.
    refused_for: dict[str, int] = {}
    #: The limit of `in_flight`; likewise `max_queued` and `max_bytes`.
    max_in_flight: int = 0
    #: The limit of `queued`.
    max_queued: int = 0
    #: The limit of `bytes`.
    max_bytes: int = 0
    #: Requests that may be submitted in a minute.
    per_minute: int = 0


class ModelVariant(_Row, frozen=True, kw_only=True):
    """Workers that serve a model alike, so that answers can move between them."""

    #: What they have in common: model file, context and type of the KV cache.
    fingerprint: str = ""
    #: Their names; of many the first ones.
    workers: list[str] = []


class ModelHost(_Row, frozen=True, kw_only=True):
    """A model at one of the hosts that have it."""

    #: The name of the host.
    host: str = ""
    #: "stored", "loading", "ready", "unloading" or "failed".
    state: str = ""
    #: How much of it is loaded, in the state "loading".
    percent: int = 0
    #: What it takes when it is loaded, of all memory together.
    bytes: int = 0
    #: The same by kind of memory.
    needs: dict[str, int] = {}
    #: It is never evicted.
    pinned: bool = False
    #: Who has loaded it: the name of a key, and what its client calls this use. Without an admin key only the own ones.
    holders: list[str] = []
    #: How many there are, including those of others.
    held: int = 0
    #: The worker that serves it while it is loaded.
    worker: str = ""
    #: Why it failed, or cannot be loaded at all.
    note: str = ""
    #: The time until a failed model may be tried again.
    retry_ms: int = 0
    #: How often it was loaded.
    loads: int = 0
    #: How long its last load took; 0: it was not loaded yet.
    load_ms: int = 0
    #: The time since its last use; 0: it is in use; -1: it is not loaded.
    idle_ms: int = -1


class ModelRow(_Row, frozen=True, kw_only=True):
    """One model: the workers that serve it, those of them that load it, their slots, and the requests in its queue."""

    #: Its name; `NAME@CLASS` is the same on the workers of a class.
    model: str = ""
    #: Workers that serve it, or are loading it.
    workers: int = 0
    #: Those of them that are loading it.
    loading: int = 0
    #: Requests that they can run at a time.
    slots: int = 0
    #: Requests in its queue, and requests that wait to go on at a worker that can continue them.
    waiting: int = 0
    #: A fake engine serves it: its words are made up.
    fake: bool = False
    #: If its workers do not all serve the very same model: who can continue whose answers.
    variants: list[ModelVariant] = []
    #: What it is for: "generate", "embed" or "rerank"; empty: a worker is loading it, and that is not known yet.
    kind: str = ""
    #: The hosts that have it, loaded or not.
    hosts: list[ModelHost] = []
    #: What its requests wait for, if not only for a free slot.
    note: str = ""

    @property
    def state(self) -> str:
        """The best of what it is anywhere: "ready", "loading", "stored", "failed"; "lost": its workers are gone."""
        if self.workers > self.loading:
            return "ready"
        states = {"loading"} if self.loading else set[str]()
        states |= {"stored" if there.state == "unloading" else there.state for there in self.hosts}
        return next((each for each in ("ready", "loading", "stored", "failed") if each in states), "lost")


class MeshStatus(_Row, frozen=True, kw_only=True):
    """The answer to `status`. Clients, requests and counters are those of the broker that answers."""

    #: The name of the broker.
    broker: str = ""
    #: Workers that are connected.
    workers: int = 0
    #: Time since the broker started.
    up_ms: int = 0
    #: Workers that accept requests.
    ready: int = 0
    #: Names of the workers that are much slower than their peers.
    slow: list[str] = []
    #: Percent loaded, by name of the worker.
    loading: dict[str, int] = {}
    #: Requests that all workers can run at a time.
    slots: int = 0
    #: Slots taken by requests of this broker.
    busy: int = 0
    #: Slots taken by requests of other brokers.
    busy_elsewhere: int = 0
    #: Clients that are connected.
    clients: int = 0
    #: Requests that are dispatched.
    running: int = 0
    #: Requests that wait.
    waiting: int = 0
    #: The size of their prompts.
    waiting_bytes: int = 0
    #: Tokens per second in the last seconds.
    tokens_per_s: float = 0.0
    #: Requests that ended per second in the last seconds.
    requests_per_s: float = 0.0
    #: Memory that is reserved for answers, or holds those that are not fetched yet.
    transcript_bytes: int = 0
    #: Memory of stored results of detached requests.
    detached_bytes: int = 0
    #: Requests that have ended and can still be asked for.
    remembered: int = 0
    #: How a worker is chosen.
    policy: str = ""
    #: The models that are served.
    models: list[ModelRow] = []
    #: With keys: what each identity has in use, for an admin; for others their own.
    identities: list[AccountRow] = []
    #: By name, since the broker started.
    counters: dict[str, int] = {}
    #: The longest turn of the broker's loop in the last second.
    turn_ms: int = 0
    #: The broker does not keep up, and refuses new requests.
    behind: bool = False

    @property
    def busy_slots(self) -> int:
        """Slots that are taken, by requests of any broker."""
        return self.busy + self.busy_elsewhere


class WorkerRow(_Row, frozen=True, kw_only=True):
    """One worker."""

    #: Its name.
    worker: str = ""
    #: As `llambo workers --help` lists them.
    state: str = ""
    #: The class of its node; empty if it has none.
    node_class: str = msgspec.field(default="", name="class")
    #: The host it runs on.
    host: str = ""
    #: Its process there.
    pid: int = 0
    #: The models it serves.
    models: list[str] = []
    #: Requests that it can run at a time.
    slots: int = 0
    #: Slots taken by requests of this broker.
    busy: int = 0
    #: Slots taken by requests of other brokers.
    busy_elsewhere: int = 0
    #: Of all its requests in the last seconds.
    tokens_per_s: float = 0.0
    #: Tokens per second of one request.
    pace: float = 0.0
    #: Less than 1 if it is slow: then it gets fewer requests.
    weight: float = 0.0
    #: Requests it has completed.
    done: int = 0
    #: How often its engine was started again.
    engine_restarts: int = 0
    #: Time since its last message.
    heard_ms: int = 0
    #: Time since it connected.
    up_ms: int = 0
    #: How much of the model its engine has loaded.
    percent: int = 0
    #: What it says about its engine and model.
    note: str = ""
    #: Why it counts as slow; empty if it does not.
    slow: str = ""
    #: The library of llama.cpp that computes, with its version.
    library: str = ""
    #: By the name of a model, what tells it from others of that name: `ModelVariant.fingerprint`.
    fingerprints: dict[str, str] = {}
    #: How often it sends a message while nothing runs there; 0: something runs there, so it sends them often.
    interval_ms: int = 0

    @property
    def plain_models(self) -> list[str]:
        """Each model once, and not again under the name with the class."""
        return [name for name in self.models if not is_in_class(name, self.models)]

    @property
    def busy_slots(self) -> int:
        """Slots that are taken, by requests of any broker."""
        return self.busy + self.busy_elsewhere


class MemoryRow(_Row, frozen=True, kw_only=True):
    """A kind of memory of a host that models are loaded into."""

    #: What all loaded models may take together.
    budget: int = 0
    #: What those take that are loaded, or being loaded.
    used: int = 0
    #: What embed and rerank models may take of it without being evicted for models that generate.
    helpers: int = 0


class HostRow(_Row, frozen=True, kw_only=True):
    """One host that loads models on demand."""

    #: Its name.
    host: str = ""
    #: The machine it runs on.
    machine: str = ""
    #: Its process there.
    pid: int = 0
    #: The class of its node; empty if it has none.
    node_class: str = msgspec.field(default="", name="class")
    #: By name: "ram", and the devices of llama.cpp.
    memory: dict[str, MemoryRow] = {}
    #: Models that it has.
    models: int = 0
    #: Those that are loaded.
    loaded: list[str] = []
    #: Those that this broker wants to be loaded there, in this order.
    load: list[str] = []
    #: Those that may be unloaded for it, in this order.
    evict: list[str] = []
    #: Time since its last message.
    heard_ms: int = 0
    #: Time since it connected.
    up_ms: int = 0
    #: The release of llambo that it runs.
    software: str = ""


class RequestRow(_Row, frozen=True, kw_only=True):
    """One request that waits or runs."""

    #: Its id.
    id: str = ""
    #: "waiting", "dispatched", "running" or "completing"; for `why` also "ended".
    state: str = ""
    #: The model.
    model: str = ""
    #: "generate", or another task.
    task: str = ""
    #: "interactive", "normal" or "batch".
    priority: str = ""
    #: The worker that has it; empty while it waits.
    worker: str = ""
    #: Tokens of the answer so far.
    tokens: int = 0
    #: Tokens at most.
    max_tokens: int = 0
    #: How often it moved to another worker.
    moves: int = 0
    #: Requests before it in its queue.
    ahead: int = 0
    #: How long it waited for a worker.
    queued_ms: int = 0
    #: Time since it was submitted.
    age_ms: int = 0
    #: It runs on without its client.
    detached: bool = False
    #: While it waits: the worker that it waits for, if none that is there can take it; or what is loaded for it.
    waits_for: str = ""


class StoryStep(_Row, frozen=True, kw_only=True):
    """One thing that happened to a request."""

    #: Time since the request was submitted.
    at_ms: int = 0
    #: What happened: submitted, dispatched, accepted, ...
    what: str = ""
    #: More about it, such as the worker.
    detail: str = ""


class RequestStory(RequestRow, frozen=True, kw_only=True):
    """The answer to `why`. A request that has ended has the state `ended`, a reason, and fewer of the other fields."""

    #: Why it ended; empty if it has not.
    reason: str = ""
    #: The error that ended it, if one did.
    error: str = ""
    #: True if the broker still has its tokens.
    kept: bool = False
    #: What happened to it, in order.
    story: list[StoryStep] = []


class EventRow(_Row, frozen=True, kw_only=True):
    """One event of the broker."""

    #: Its number since the broker started.
    number: int = 0
    #: How long ago it was.
    age_ms: int = 0
    #: The kind of event.
    kind: str = ""
    #: What happened.
    text: str = ""
    #: The worker it is about, if it is about one.
    worker: str = ""
    #: An operator should look at it. An older broker does not say so.
    warning: bool = True

    @property
    def matters(self) -> bool:
        """A short pause of the broker does not: its leases allow for it."""
        return self.warning or self.kind != "stood still"


class SampleRow(_Row, frozen=True, kw_only=True):
    """Figures of the mesh at one moment. There is one sample a second."""

    #: Its number since the broker started.
    number: int = 0
    #: Tokens per second.
    tokens_per_s: float = 0.0
    #: Requests that are dispatched.
    running: int = 0
    #: Requests that wait.
    waiting: int = 0
    #: Slots in use, also by requests of other brokers.
    busy: int = 0
    #: Slots of all workers.
    slots: int = 0
    #: Workers that accept requests.
    ready: int = 0
    #: Workers that are connected.
    workers: int = 0
    #: Since the broker started, as is `failed`.
    ended: int = 0
    #: Requests that ended with an error.
    failed: int = 0
    #: The median time to the first token of the requests that ended since the sample before; 0 if there were none.
    first_ms: int = 0
    #: How long ago it was taken.
    age_ms: int = 0


class EndedRow(_Row, frozen=True, kw_only=True):
    """One request that has ended."""

    #: Its id.
    id: str = ""
    #: The model.
    model: str = ""
    #: "generate", or another task.
    task: str = ""
    #: The worker that finished it.
    worker: str = ""
    #: Tokens of the answer.
    tokens: int = 0
    #: Tokens of the prompt.
    prompt_tokens: int = 0
    #: How often it moved to another worker.
    moves: int = 0
    #: Why it ended.
    reason: str = ""
    #: The error that ended it, if one did.
    error: str = ""
    #: How long it waited for a worker.
    queued_ms: int = 0
    #: To its first token; -1 if it had none.
    first_ms: int = 0
    #: The time for the tokens of the answer.
    decode_ms: int = 0
    #: From submit to end.
    total_ms: int = 0
    #: How long ago it ended.
    age_ms: int = 0


class Recent(_Row, frozen=True, kw_only=True):
    """The answer to `recent`: samples, and the requests that ended in their time. The latest is last in both."""

    #: One for each second.
    samples: list[SampleRow] = []
    #: Requests that ended in that time.
    ended: list[EndedRow] = []


class FoundRequest(_Row, frozen=True, kw_only=True):
    """The answer to `find`: the full id of the only request whose id has the given beginning."""

    id: str
    #: It is live, or has ended and its tokens are stored. False as well from an older broker.
    stored: bool = False


class MetricsPage(_Row, frozen=True, kw_only=True):
    """The answer to `metrics`: a page in the text format of Prometheus."""

    page: str


class DrainReply(_Row, frozen=True, kw_only=True):
    """The answer to `drain`: the state of the worker."""

    #: Its name.
    worker: str = ""
    #: It gets no new work.
    draining: bool = False
    #: Its running requests are moved to other workers.
    moving: bool = False
    #: Requests that still run on it, including those of other brokers.
    running: int = 0


class PullHost(_Row, frozen=True, kw_only=True):
    """The files of a model at one host."""

    #: Its name.
    host: str = ""
    #: waiting, fetching, here, failed, or gone: it has left.
    state: str = ""
    #: That are there.
    bytes: int = 0
    #: Of all files; 0: not known yet.
    size: int = 0
    #: Those of them that it has downloaded from outside the mesh.
    outside: int = 0
    #: What it waits for, or why it failed.
    note: str = ""


class PullReply(_Row, frozen=True, kw_only=True):
    """The answer to `pull_model`: how far each host is."""

    #: The name of the model at its source.
    ref: str = ""
    #: Every host that is to have it.
    hosts: list[PullHost] = []


class HoldReply(_Row, frozen=True, kw_only=True):
    """The answer to `hold_model` and `release_model`: the model as it is now, and where."""

    #: Its name.
    model: str = ""
    #: The host; empty: none is chosen yet, or it is given back at several.
    host: str = ""
    #: As `ModelHost.state`; "ready" also if only workers without a host serve it.
    state: str = ""
    #: How much of it is loaded, in the state "loading".
    percent: int = 0
    #: The name of the holder: the name of the key, and what its client calls this use.
    holder: str = ""
    #: The holder counts for so long; 0: until the model is given back.
    ttl_ms: int = 0
    #: What it waits for, or why it failed.
    note: str = ""


class LeaseReply(_Row, frozen=True, kw_only=True):
    """The answer to `lease`."""

    #: The lease is the caller's.
    granted: bool = False
    #: The name of the client that holds it.
    by: str = ""
    #: How long it is valid.
    left_ms: int = 0
