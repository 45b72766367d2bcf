"""What a client knows about one request."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import msgspec

from llambo.mesh.wire import limits, transfer
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.stream import Reassembly


class RequestState(enum.Enum):
    WAITING = "waiting"
    SUBMITTED = "submitted"
    RUNNING = "running"
    CANCELLING = "cancelling"
    ENDING = "ending"
    DONE = "done"


#: Every legal step of a request in its client. The diagram in ARCHITECTURE.md is generated from this table.
CLIENT_STEPS: dict[RequestState, dict[RequestState, str]] = {
    RequestState.WAITING: {
        RequestState.SUBMITTED: "link ready",
        RequestState.DONE: "cancelled before it was sent, or no broker",
    },
    RequestState.SUBMITTED: {
        RequestState.RUNNING: "accepted",
        RequestState.CANCELLING: "cancel",
        RequestState.ENDING: "end, tokens missing",
        RequestState.WAITING: "link lost",
        RequestState.DONE: "end, refused, or accepted and not followed",
    },
    RequestState.RUNNING: {
        RequestState.CANCELLING: "cancel",
        RequestState.ENDING: "end, tokens missing",
        RequestState.WAITING: "link lost",
        RequestState.DONE: "end, or a problem",
    },
    RequestState.CANCELLING: {
        RequestState.ENDING: "end, tokens missing",
        RequestState.WAITING: "link lost",
        RequestState.DONE: "end, or unknown to the broker",
    },
    RequestState.ENDING: {
        RequestState.WAITING: "link lost",
        RequestState.DONE: "last token",
    },
    RequestState.DONE: {},
}


@dataclass(slots=True)
class ReaderWishes:
    """What the reader of a request, in this client, needs of it."""

    #: False if its tokens will not be read. Then an END is enough.
    wanted: bool = True
    #: False: the request is dropped here as soon as it is accepted.
    follow: bool = True
    #: The reader is too far behind: tokens are left out now, and fetched later.
    held: bool = False
    #: Tokens that are fetched at a time, once the reader was behind.
    at_a_time: int = limits.TOKEN_INDEX


@dataclass(slots=True)
class QueuePlace:
    """What the broker has reported about an accepted request."""

    ahead: int = -1
    model: str = ""
    fingerprint: str = ""
    #: The fingerprint is known, or the model has none.
    known: bool = False
    #: It was admitted when another client submitted it.
    before: bool = False
    #: For the next broker: that this one has admitted it.
    proof: bytes = b""
    #: Why it waits, for people.
    note: str = ""

    @property
    def admitted(self) -> bool:
        """A broker has admitted it. A heartbeat may say so before the answer to the submit does."""
        return self.before or self.ahead >= 0


@dataclass(slots=True)
class RepairState:
    """Which tokens are known to exist, and which have been requested again.

    If fewer than `target` tokens are here when the alarm of the request fires, a replay is requested.
    """

    #: The index after the last token that is known to exist.
    known: int = 0
    #: 0: no alarm is set.
    target: int = 0
    #: The replay that was requested last; 0, 0: none.
    asked_first: int = 0
    asked_until: int = 0

    def forget(self) -> None:
        self.target = self.asked_first = self.asked_until = 0


@dataclass(slots=True)
class Request:
    """One request in its client. `message` is None if this client only cancels it."""

    id: bytes
    message: m.InferenceRequest | m.Attach | None
    prompt: bytes | None = None
    #: 0: no deadline.
    deadline_at: int = 0
    reader: ReaderWishes = field(default_factory=ReaderWishes)
    state: RequestState = RequestState.WAITING
    #: How many times it was sent on this link without an answer.
    tries: int = 0
    #: It was sent at least once, on this or an earlier link.
    sent: bool = False
    cancelled: bool = False
    place: QueuePlace = field(default_factory=QueuePlace)
    end: m.End | None = None
    tokens: Reassembly = field(default_factory=Reassembly)
    #: What to submit if the broker does not know a request to attach to.
    again: tuple[m.InferenceRequest, bytes] | None = None
    repair: RepairState = field(default_factory=RepairState)
    #: When this broker was asked again which file its tokens are of; 0: never.
    asked_at: int = 0

    @property
    def mine(self) -> bool:
        """This client has submitted it, and does not only follow or cancel it."""
        return isinstance(self.message, m.InferenceRequest)

    @property
    def detached(self) -> bool:
        return isinstance(self.message, m.InferenceRequest) and self.message.detached

    @property
    def whole(self) -> bool:
        """A result of a task. Parts are useless: the rest may come from another worker, whose result may differ."""
        return isinstance(self.message, m.InferenceRequest) and self.message.task != "generate"

    @property
    def streams(self) -> bool:
        return not isinstance(self.message, m.InferenceRequest) or self.message.stream

    @property
    def repairable(self) -> bool:
        """A replay would help: the broker knows the request, and a reader wants its tokens."""
        if self.reader.held or not self.reader.wanted:
            return False
        return self.state is RequestState.ENDING or (self.state is RequestState.RUNNING and self.streams)

    @property
    def missing_until(self) -> int:
        """The end of the first gap; 0 if no token is known to be missing."""
        gap = self.tokens.gap
        if gap is not None:
            return gap[1]
        return self.repair.known if self.repair.known > self.tokens.next_index else 0

    @property
    def deliverable(self) -> bool:
        """Its tokens may be delivered: should this broker be lost, the next one learns of which file they are."""
        return self.complete or (self.place.known and not self.whole)

    @property
    def complete(self) -> bool:
        return self.end is not None and (not self.reader.wanted or self.tokens.next_index >= self.end.count)

    def enter(self, state: RequestState) -> None:
        assert state in CLIENT_STEPS[self.state], f"request cannot go from {self.state} to {state}"
        self.state = state

    def introduction(self, now_ms: int) -> tuple[m.InferenceRequest | m.Attach | None, bytes | None]:
        """The message that introduces this request to a broker, and its extra frame.

        A broker may have been restarted, or be another one: it gets the tokens of the answer that are here as well.
        """
        have = self.tokens.next_index
        if not isinstance(self.message, m.InferenceRequest):
            if self.message is None:
                return None, None
            place = self.place
            return m.Attach(self.id, have, self._sent_chunks(), place.admitted, place.fingerprint), None
        left = max(1, self.deadline_at - now_ms) if self.deadline_at else 0
        if not self.place.admitted and not have:
            return msgspec.structs.replace(self.message, have=have, deadline_ms=left), self.prompt
        # A broker had accepted it.
        blob, prompt_bytes = transfer.pack(self.prompt or b"", self.tokens.chunks)
        message = msgspec.structs.replace(
            self.message,
            model=self.place.model or self.message.model,
            have=have,
            deadline_ms=left,
            resume=True,
            prompt_bytes=prompt_bytes,
            fingerprint=self.place.fingerprint,
            proof=self.place.proof,
        )
        return message, blob

    def _sent_chunks(self) -> list[bytes]:
        """The chunks that are here, if they begin with the first token and fit into a message."""
        chunks = self.tokens.chunks
        if not chunks or self.tokens.base or sum(map(len, chunks)) > limits.CONTROL_BODY_BYTES // 2:
            return []
        return transfer.merge(chunks)


@dataclass(slots=True)
class Counters:
    """What a client has received, sent again and repaired: for tests, and to find the cause of a delay."""

    #: Frames of tokens and heartbeats that have arrived.
    frames: int = 0
    #: Those of requests that have ended, or of a connection that was lost.
    stray_frames: int = 0
    #: Those that were left out because the reader of the stream is behind.
    held_frames: int = 0
    #: Those that could not be read.
    malformed: int = 0
    #: Messages of a connection that was lost.
    stale_messages: int = 0
    #: Messages that report an error, or could not be read.
    problems: int = 0
    #: Requests and cancels that were sent again.
    resends: int = 0
    #: Requests for missing tokens.
    replays: int = 0
    #: Answers to them.
    pages: int = 0
    #: Ends that were acknowledged.
    end_acks: int = 0
