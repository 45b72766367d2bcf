"""The answers of a broker to queries, as typed rows.

On the wire each is a map by field names. Fields may be added and none changes its meaning: a reader ignores fields it
does not know, and a field that an older broker does not send has its default here.
"""

from __future__ import annotations

import msgspec


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    pass


class AccountRow(_Row, frozen=True, kw_only=True):
    """What one identity has in use on the broker, and its limits. A limit of 0 means that there is none."""

    identity: str = ""
    role: str = ""
    in_flight: int = 0
    queued: int = 0
    bytes: int = 0
    submitted: int = 0
    ended: int = 0
    tokens: int = 0
    refused: int = 0
    #: Refused requests by error code.
    refused_for: dict[str, int] = {}
    max_in_flight: int = 0
    max_queued: int = 0
    max_bytes: int = 0
    per_minute: int = 0


class ModelRow(_Row, frozen=True, kw_only=True):
    """One model: the workers that serve it, those of them that load it, their slots, and the requests in its queue."""

    model: str = ""
    workers: int = 0
    loading: int = 0
    slots: int = 0
    waiting: int = 0


class MeshStatus(_Row, frozen=True, kw_only=True):
    """The answer to `status`. Clients, requests and counters are those of the broker that answers."""

    broker: str = ""
    workers: int = 0
    up_ms: int = 0
    ready: int = 0
    #: Names of the workers that are much slower than their peers.
    slow: list[str] = []
    #: Percent loaded, by name of the worker.
    loading: dict[str, int] = {}
    slots: int = 0
    busy: int = 0
    #: Slots taken by requests of other brokers.
    busy_elsewhere: int = 0
    clients: int = 0
    running: int = 0
    waiting: int = 0
    waiting_bytes: int = 0
    tokens_per_s: float = 0.0
    requests_per_s: float = 0.0
    transcript_bytes: int = 0
    detached_bytes: int = 0
    #: Requests that have ended and can still be asked for.
    remembered: int = 0
    policy: str = ""
    models: list[ModelRow] = []
    identities: list[AccountRow] = []
    #: By name, since the broker started.
    counters: dict[str, int] = {}

    @property
    def busy_slots(self) -> int:
        return self.busy + self.busy_elsewhere


class WorkerRow(_Row, frozen=True, kw_only=True):
    """One worker."""

    worker: str = ""
    #: As `llambo workers --help` lists them.
    state: str = ""
    node_class: str = msgspec.field(default="", name="class")
    host: str = ""
    pid: int = 0
    models: list[str] = []
    slots: int = 0
    busy: int = 0
    #: Slots taken by requests of other brokers.
    busy_elsewhere: int = 0
    tokens_per_s: float = 0.0
    #: Tokens per second of one request.
    pace: float = 0.0
    weight: float = 0.0
    #: Requests it has completed.
    done: int = 0
    engine_restarts: int = 0
    #: Time since its last message.
    heard_ms: int = 0
    up_ms: int = 0
    #: How much of the model its engine has loaded.
    percent: int = 0
    note: str = ""
    #: Why it counts as slow; empty if it does not.
    slow: str = ""
    #: The library of llama.cpp that computes, with its version.
    library: str = ""

    @property
    def busy_slots(self) -> int:
        return self.busy + self.busy_elsewhere


class RequestRow(_Row, frozen=True, kw_only=True):
    """One request that waits or runs."""

    id: str = ""
    state: str = ""
    model: str = ""
    task: str = ""
    priority: str = ""
    #: The worker that has it; empty while it waits.
    worker: str = ""
    tokens: int = 0
    max_tokens: int = 0
    moves: int = 0
    #: Requests before it in its queue.
    ahead: int = 0
    queued_ms: int = 0
    age_ms: int = 0
    detached: bool = False


class StoryStep(_Row, frozen=True, kw_only=True):
    """One thing that happened to a request."""

    #: Time since the request was submitted.
    at_ms: int = 0
    what: str = ""
    detail: str = ""


class RequestStory(RequestRow, frozen=True, kw_only=True):
    """The answer to `why`. A request that has ended has the state `ended`, a reason, and fewer of the other fields."""

    reason: str = ""
    error: str = ""
    #: True if the broker still has its tokens.
    kept: bool = False
    story: list[StoryStep] = []


class EventRow(_Row, frozen=True, kw_only=True):
    """One event of the broker."""

    number: int = 0
    age_ms: int = 0
    kind: str = ""
    text: str = ""
    worker: str = ""
    #: An operator should look at it. An older broker does not say so.
    warning: bool = True


class SampleRow(_Row, frozen=True, kw_only=True):
    """Figures of the mesh at one moment. There is one sample a second."""

    number: int = 0
    tokens_per_s: float = 0.0
    running: int = 0
    waiting: int = 0
    #: Slots in use, also by requests of other brokers.
    busy: int = 0
    slots: int = 0
    ready: int = 0
    workers: int = 0
    #: Since the broker started, as is `failed`.
    ended: int = 0
    failed: int = 0
    #: The median time to the first token of the requests that ended since the sample before; 0 if there were none.
    first_ms: int = 0
    age_ms: int = 0


class EndedRow(_Row, frozen=True, kw_only=True):
    """One request that has ended."""

    id: str = ""
    model: str = ""
    task: str = ""
    worker: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    moves: int = 0
    reason: str = ""
    error: str = ""
    queued_ms: int = 0
    #: To its first token; -1 if it had none.
    first_ms: int = 0
    decode_ms: int = 0
    total_ms: int = 0
    age_ms: int = 0


class Recent(_Row, frozen=True, kw_only=True):
    """The answer to `recent`: samples, and the requests that ended in their time. The latest is last in both."""

    samples: list[SampleRow] = []
    ended: list[EndedRow] = []


class FoundRequest(_Row, frozen=True, kw_only=True):
    """The answer to `find`: the full id of the only request whose id has the given beginning."""

    id: str


class MetricsPage(_Row, frozen=True, kw_only=True):
    """The answer to `metrics`: a page in the text format of Prometheus."""

    page: str


class DrainReply(_Row, frozen=True, kw_only=True):
    """The answer to `DrainWorker`: the state of the worker."""

    worker: str = ""
    draining: bool = False
    #: Its running requests are moved to other workers.
    moving: bool = False
    #: Requests that still run on it, including those of other brokers.
    running: int = 0


class LeaseReply(_Row, frozen=True, kw_only=True):
    """The answer to `Lease`: whether it was granted, and who holds it now."""

    granted: bool = False
    by: str = ""
    left_ms: int = 0
