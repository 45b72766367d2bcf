"""One request as the broker sees it, and the steps its life may take."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from llambo.broker.records.transcript import Transcript
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.stream import Stash

if TYPE_CHECKING:
    from llambo.broker.records.accounts import Account
    from llambo.broker.records.meter import Pace
    from llambo.broker.records.queue import Share
    from llambo.broker.records.registry import WorkerEntry


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
#: Every legal step. The diagram in ARCHITECTURE.md is drawn from this table.
REQUEST_STEPS: dict[RequestState, dict[RequestState, str]] = {
    _S.WAITING: {_S.DISPATCHED: "a worker was chosen", _S.ENDED: "cancelled, too late, or nobody to do it"},
    _S.DISPATCHED: {
        _S.RUNNING: "accept",
        _S.COMPLETING: "worker's END, tokens missing",
        _S.WAITING: "refused, or worker lost or emptied",
        _S.ENDED: "END, cancelled or too late",
    },
    _S.RUNNING: {
        _S.COMPLETING: "worker's END, tokens missing",
        _S.WAITING: "worker lost or emptied",
        _S.ENDED: "END, cancelled or too late",
    },
    _S.COMPLETING: {_S.WAITING: "worker lost", _S.ENDED: "last token repaired, cancelled or too late"},
    _S.ENDED: {},
}


#: Where those wait that are not to be dispatched.
PARKED = "\0parked"
#: The end of the names of lanes for those that may have killed an engine: suspicion.py.
WARY = "\0\0wary"


def lane(model: str, fingerprint: str) -> str:
    """The name of a line and of its pool. A model without a fingerprint goes on wherever its name is known."""
    return f"{model}\0{fingerprint}" if fingerprint else model


def plain(lane: str) -> str:
    """The lane of the same requests if nothing spoke against them."""
    return lane.removesuffix(WARY)


class Request:
    """Everything about a live request. Its transcript outlives it in the archive."""

    __slots__ = (
        "account",
        "asked_ms",
        "attempt",
        "awaited",
        "blame",
        "counted",
        "deadline_at",
        "detached",
        "end",
        "failures",
        "fingerprint",
        "first_ms",
        "followers",
        "forsaken",
        "heard",
        "heard_at",
        "id",
        "key",
        "logprobs",
        "max_tokens",
        "model",
        "moves",
        "owner",
        "pace",
        "parked",
        "place",
        "priority",
        "prompt",
        "queued_at",
        "queued_ms",
        "refusals",
        "repair_due",
        "sampling",
        "seed",
        "share",
        "stash",
        "state",
        "story",
        "stream",
        "submitted_at",
        "suspect_at",
        "suspicion",
        "task",
        "ticket",
        "topics",
        "transcript",
        "wanted",
        "watched",
        "worker",
    )

    #: Where it waits, or has waited last.
    share: Share

    def __init__(self, asked: m.InferenceRequest, model: str, prompt: bytes, now_ms: int, account: Account) -> None:
        self.id = asked.id
        #: Of the identity that has submitted it, and that one's name.
        self.account = account
        self.owner = account.name
        self.model = model
        self.prompt = prompt
        self.max_tokens = asked.max_tokens
        self.logprobs = asked.logprobs
        self.task = asked.task
        # A result is whole or nothing; it comes with the END.
        self.stream = asked.stream and asked.task == "generate"
        self.priority = asked.priority
        self.detached = asked.detached
        self.sampling = bytes(asked.sampling)
        # The seed is fixed now, so that the chance at index i is the same on whatever worker gets there.
        self.seed = asked.seed if asked.seed is not None else int.from_bytes(asked.id[:7], "big")
        self.deadline_at = now_ms + asked.deadline_ms if asked.deadline_ms else 0
        self.submitted_at = self.queued_at = now_ms
        self.queued_ms = 0
        self.state = RequestState.WAITING
        self.transcript = Transcript(asked.max_tokens, asked.logprobs, asked.task)
        #: Sessions that follow this request, and the topics of those that want a stream.
        self.followers: dict[bytes, None] = {}
        self.topics: tuple[bytes, ...] = ()
        # --- the current dispatch
        self.attempt = 0
        self.key = b""  # request id + dispatch id: the fence
        self.worker: WorkerEntry | None = None
        #: Of the model its tokens are from.
        self.fingerprint = asked.fingerprint
        self.stash: Stash | None = None
        self.end: m.End | None = None
        #: The worker is known to have tokens up to here.
        self.wanted = 0
        self.repair_due = 0
        self.asked_ms = 0
        #: Each chunk is looked at: an END waits for it, it would clear a suspect, or its time is taken.
        self.watched = False
        # --- kept by meter.py: where its times go, how many of its tokens are counted, whether the first is to be timed
        self.pace: Pace | None = None
        self.counted = 0
        self.awaited = False
        #: How long its first token took; -1: it has none, or began elsewhere.
        self.first_ms = -1
        #: Up to which token, and when it came; -1: no pauses of this one are taken.
        self.heard = 0
        self.heard_at = -1
        # --- its fate so far
        self.ticket = 0
        #: Which one of its share it is.
        self.place = 0
        #: Its broker is gone; for a moment it waits for a worker that runs it still.
        self.parked = False
        #: It is ended only because nobody follows it.
        self.forsaken = False
        self.moves = 0
        #: Engine deaths it was aboard of, whatever caused them.
        self.failures = 0
        #: An engine died when it was to make this token, and how; -1: nothing speaks against it.
        self.suspect_at = -1
        self.suspicion = ""
        self.refusals = 0
        self.blame = ""
        self.story: list[tuple[int, str, str]] = []

    @property
    def lane(self) -> str:
        """Who may run it: any worker with its model, or, once it has tokens, one with the very same model."""
        if self.parked:
            return PARKED
        name = lane(self.model, self.fingerprint) if self.transcript.next_index else self.model
        return name if self.suspect_at < 0 else name + WARY

    def step(self, state: RequestState) -> None:
        assert state in REQUEST_STEPS[self.state], f"request cannot go from {self.state} to {state}"
        self.state = state

    def note(self, now_ms: int, what: str, detail: str = "") -> None:
        """Remember why. The middle of a long story is what nobody misses."""
        story = self.story
        if len(story) >= _STORY_ENTRIES:
            del story[_STORY_ENTRIES // 2]
        story.append((now_ms, what, detail))

    def watch(self) -> None:
        """What was waited for has come: is there anything else?"""
        self.watched = self.end is not None or self.suspect_at >= 0 or self.awaited or self.heard_at >= 0

    @property
    def dispatch(self) -> bytes:
        return self.key[limits.REQUEST_ID_BYTES :]

    @property
    def missing(self) -> bool:
        """Tokens are known to exist that have not arrived."""
        return self.wanted > self.transcript.next_index
