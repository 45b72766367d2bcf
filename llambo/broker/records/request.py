"""One request as the broker sees it, and the steps its life may take.

What one rule owns is a record of its own: its place in the queue, its current run, what is missing of its answer,
whether it is suspected of killing engines, what the metrics measure of it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from llambo.broker.records.transcript import Transcript
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m

if TYPE_CHECKING:
    from llambo.broker.records.accounts import Account
    from llambo.broker.records.fair_share import Share
    from llambo.broker.records.meter import Pace
    from llambo.broker.records.registry import ClientEntry, WorkerEntry


#: Looked up once: each step of a request is noted.
_STORY_ENTRIES = limits.STORY_ENTRIES


class RequestState(enum.Enum):
    # Enum hashes a member by its name, in Python; each step of a request would pay for that twice.
    __hash__ = object.__hash__

    WAITING = "waiting"
    DISPATCHED = "dispatched"
    RUNNING = "running"
    COMPLETING = "completing"
    ENDED = "ended"


_S = RequestState
#: Every legal step. The diagram in ARCHITECTURE.md is drawn from this table. "complete": all tokens are here, and the
#: worker or broker is lost that would have sent the END; "failed": refused for good, or more deaths of engines or bytes
#: than are allowed; "forgotten": its client comes from another broker with other tokens, and it begins anew.
REQUEST_STEPS: dict[RequestState, dict[RequestState, str]] = {
    _S.WAITING: {
        _S.DISPATCHED: "a worker was chosen, or its run was adopted",
        _S.ENDED: "cancelled, too late, no worker for it, complete, or forgotten",
    },
    _S.DISPATCHED: {
        _S.RUNNING: "accept",
        _S.COMPLETING: "worker's END, tokens missing",
        _S.WAITING: "refused, not claimed, engine or worker lost, or emptied",
        _S.ENDED: "END, cancelled, too late, failed, complete, or forgotten",
    },
    _S.RUNNING: {
        _S.COMPLETING: "worker's END, tokens missing",
        _S.WAITING: "refused, not claimed, engine or worker lost, or emptied",
        _S.ENDED: "END, cancelled, too late, failed, complete, or forgotten",
    },
    _S.COMPLETING: {
        _S.WAITING: "not claimed, or worker lost",
        _S.ENDED: "last token repaired, cancelled, too late, failed, or forgotten",
    },
    _S.ENDED: {},
}


class Lane(msgspec.Struct, frozen=True, gc=False, cache_hash=True):
    """Requests that the same workers can take, and the pool of these workers."""

    model: str
    #: Only workers with this very model file. "": any worker with a model of that name.
    fingerprint: str = ""
    #: For suspects, of which an engine gets one at a time.
    isolated: bool = False


#: Where requests wait for a worker that may be running them already (recovery.py). They are not dispatched.
AWAITING_RUN = Lane("")


class Followers(dict[bytes, None]):
    """Sessions that follow a request."""

    __slots__ = ("abandoned", "topics")

    def __init__(self) -> None:
        #: Of all of them, if the request streams; otherwise of none.
        self.topics: tuple[bytes, ...] = ()
        #: The request is ended only because no client follows it.
        self.abandoned = False

    def add(self, client: ClientEntry, stream: bool) -> None:
        self[client.session] = None
        if stream and client.topic not in self.topics:
            self.topics = (*self.topics, client.topic)

    def remove(self, client: ClientEntry) -> None:
        self.pop(client.session, None)
        self.topics = tuple(topic for topic in self.topics if topic != client.topic)


@dataclass(slots=True)
class Place:
    """Where it waits, or has waited last. Mainly changed by queue.py; a rule that ends a wait adds to `queued_ms`."""

    queued_at: int
    #: All its waits that are over, together.
    queued_ms: int = 0
    share: Share = field(init=False, repr=False)
    #: Of all requests that were ever queued, and of those of its share.
    ticket: int = 0
    number: int = 0
    #: It comes from another broker. For `adopt_ms` it waits for a worker that still runs it.
    awaiting_run: bool = False


@dataclass(slots=True)
class Run:
    """The current dispatch, and what became of those before it. Mainly changed by dispatching.py; also by an adoption
    (recovery.py), a worker's END (delivery.py) and the end of the request (ending.py).
    """

    #: Of the model that its tokens are from.
    fingerprint: str
    attempt: int = 0
    #: Request id + dispatch id. It is in the fence while the request is with a worker.
    key: bytes = b""
    worker: WorkerEntry | None = None
    #: The last worker that had it.
    worker_name: str = ""
    #: The worker's END, while tokens before it are missing.
    end: m.End | None = None
    moves: int = 0
    refusals: int = 0

    @property
    def dispatch(self) -> bytes:
        return self.key[limits.REQUEST_ID_BYTES :]


class Repair(msgspec.Struct, gc=False):
    """Tokens that its worker has and the transcript has not. Mainly changed by delivery.py; a move begins a new one."""

    #: The worker is known to have tokens up to here.
    wanted: int = 0
    #: When a replay of them is requested, for the first time or again; 0: not planned.
    due: int = 0
    #: One was requested before, which is noted in the story once.
    asked: bool = False


class Suspicion(msgspec.Struct, gc=False):
    """Mainly changed by suspicion.py; an adopted run brings its own."""

    #: Deaths of engines that ran it, whatever caused them.
    failures: int = 0
    #: An engine died when it was to make this token; -1: it is no suspect.
    token: int = -1
    text: str = ""


@dataclass(slots=True)
class Measured:
    """Kept by meter.py."""

    #: Where its times and tokens are counted.
    pace: Pace | None = None
    #: How many of its tokens are counted.
    counted: int = 0
    #: Its first token is to be timed.
    first_awaited: bool = False
    #: How long the first token took; -1: there is none yet, or another broker received it.
    first_ms: int = -1
    #: Up to which token its pauses are taken, and when that came; -1: they are not taken.
    timed_index: int = 0
    timed_at: int = -1


def streams(asked: m.InferenceRequest) -> bool:
    """A result is whole or nothing; it comes with the END."""
    return asked.stream and asked.task == "generate"


def seed_of(asked: m.InferenceRequest) -> int:
    """Fixed by the submit, so that the chance at index i is the same on any worker that gets there."""
    return asked.seed if asked.seed is not None else int.from_bytes(asked.id[:7], "big")


class Request:
    """Everything about a live request. Its transcript outlives it in the archive."""

    __slots__ = (
        "account",
        "asked",
        "followers",
        "id",
        "measured",
        "model",
        "place",
        "prompt",
        "proof",
        "repair",
        "run",
        "state",
        "story",
        "stream",
        "submitted_at",
        "suspicion",
        "task",
        "transcript",
        "watched",
    )

    def __init__(
        self, asked: m.InferenceRequest, model: str, prompt: bytes, submitted_at: int, account: Account
    ) -> None:
        # A copy: what was decoded is a view of the whole bundle, which would live as long as the request. The message
        # is frozen, so it is changed by force; it was decoded for this request alone.
        msgspec.structs.force_setattr(asked, "sampling", asked.sampling.copy())
        self.asked = asked
        self.id = asked.id
        self.task = asked.task
        self.stream = streams(asked)
        #: The model that is meant by the name that was asked for.
        self.model = model
        self.prompt = prompt
        self.submitted_at = submitted_at
        #: Of the identity that has submitted it.
        self.account = account
        #: Shows other brokers that it was admitted (seals.py); empty without keys.
        self.proof = b""
        self.state = RequestState.WAITING
        #: Each of its chunks has a consequence: see `update_watched`.
        self.watched = False
        self.transcript = Transcript(asked.max_tokens, asked.logprobs, asked.task)
        self.place = Place(submitted_at)
        self.run = Run(asked.fingerprint)
        self.followers = Followers()
        self.repair = Repair()
        self.suspicion = Suspicion()
        self.measured = Measured()
        self.story: list[tuple[int, str, str]] = []

    @property
    def deadline_at(self) -> int:
        return self.submitted_at + self.asked.deadline_ms if self.asked.deadline_ms else 0

    @property
    def owner(self) -> str:
        return self.account.name

    @property
    def seed(self) -> int:
        return seed_of(self.asked)

    @property
    def lane(self) -> Lane:
        """Any worker with a model of that name; once it has tokens, only one with the model file that they are from."""
        if self.place.awaiting_run:
            return AWAITING_RUN
        return Lane(self.model, self.run.fingerprint if self.transcript.next_index else "", self.suspicion.token >= 0)

    @property
    def incomplete(self) -> bool:
        """Tokens are known to exist that have not arrived."""
        return self.repair.wanted > self.transcript.next_index

    def step(self, state: RequestState) -> None:
        assert state in REQUEST_STEPS[self.state], f"request cannot go from {self.state} to {state}"
        self.state = state

    def note(self, now_ms: int, what: str, detail: str = "") -> None:
        """Add a step to the story. Of a long one the middle is left out: begin and end explain most."""
        story = self.story
        if len(story) >= _STORY_ENTRIES:
            del story[_STORY_ENTRIES // 2]
        story.append((now_ms, what, detail))

    def update_watched(self) -> None:
        """Set `watched`: whether a chunk may close a gap, clear a suspect, complete the answer, or has to be timed."""
        self.watched = (
            self.run.end is not None
            or self.suspicion.token >= 0
            or self.measured.first_awaited
            or self.measured.timed_at >= 0
            or self.transcript.stash is not None
        )
