"""What a client knows about one request or query of its own."""

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


#: Every legal step of a request in its client. The diagram in ARCHITECTURE.md is drawn from this table.
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
    """What the reader of a request, in this client, wants of it."""

    #: False when its tokens will not be read. Then an End is enough.
    wanted: bool = True
    #: False: the request is forgotten as soon as it is accepted.
    follow: bool = True
    #: The reader is too far behind: tokens are left out, and fetched later.
    held: bool = False


@dataclass(slots=True)
class QueuePlace:
    """What the broker has said about an accepted request."""

    ahead: int = -1
    model: str = ""
    fingerprint: str = ""


@dataclass(slots=True)
class RepairState:
    """Which tokens are known to exist, and which were asked for. 0: no alarm is set, nothing was asked for.

    If fewer than `target` tokens are here when the alarm rings, a replay of [asked_first, asked_until) is asked for.
    """

    owed: int = 0
    target: int = 0
    asked_first: int = 0
    asked_until: int = 0

    def forget(self) -> None:
        self.target = self.asked_first = self.asked_until = 0


@dataclass(slots=True)
class Request:
    """One request as its client sees it. `message` is None for one that is only cancelled from here."""

    id: bytes
    message: m.InferenceRequest | m.Attach | None
    prompt: bytes | None = None
    #: 0: none.
    deadline_at: int = 0
    reader: ReaderWishes = field(default_factory=ReaderWishes)
    state: RequestState = RequestState.WAITING
    #: How often it was sent on this link without an answer.
    tries: int = 0
    #: It was sent at least once, on any link.
    sent: bool = False
    cancelled: bool = False
    place: QueuePlace = field(default_factory=QueuePlace)
    end: m.End | None = None
    tokens: Reassembly = field(default_factory=Reassembly)
    #: What to submit if the broker does not know the request that this client attaches to.
    again: tuple[m.InferenceRequest, bytes] | None = None
    repair: RepairState = field(default_factory=RepairState)

    @property
    def mine(self) -> bool:
        """Submitted from here, and not only attached to or cancelled."""
        return isinstance(self.message, m.InferenceRequest)

    @property
    def detached(self) -> bool:
        return isinstance(self.message, m.InferenceRequest) and self.message.detached

    @property
    def whole(self) -> bool:
        """A result: of no use in parts, since the rest may come from another worker, which need not agree with it."""
        return isinstance(self.message, m.InferenceRequest) and self.message.task != "generate"

    @property
    def streams(self) -> bool:
        return not isinstance(self.message, m.InferenceRequest) or self.message.stream

    @property
    def repairable(self) -> bool:
        """A replay would help: the broker knows the request, and there is a reader for what it sends."""
        if self.reader.held or not self.reader.wanted:
            return False
        return self.state is RequestState.ENDING or (self.state is RequestState.RUNNING and self.streams)

    @property
    def missing_until(self) -> int:
        """The end of the first hole; 0 if nothing is known to be missing."""
        gap = self.tokens.gap
        if gap is not None:
            return gap[1]
        return self.repair.owed if self.repair.owed > self.tokens.next_index else 0

    @property
    def complete(self) -> bool:
        return self.end is not None and (not self.reader.wanted or self.tokens.next_index >= self.end.count)

    def enter(self, state: RequestState) -> None:
        assert state in CLIENT_STEPS[self.state], f"request cannot go from {self.state} to {state}"
        self.state = state

    def introduction(self, now_ms: int) -> tuple[m.InferenceRequest | m.Attach | None, bytes | None]:
        """The message that makes a broker know this request, and its extra frame.

        A broker may have been restarted, or be another one: it gets what is held of the answer as well.
        """
        have = self.tokens.next_index
        if not isinstance(self.message, m.InferenceRequest):
            if self.message is None:
                return None, None
            return m.Attach(self.id, have, self._held(), bool(self.place.model)), None
        left = max(1, self.deadline_at - now_ms) if self.deadline_at else 0
        if not self.place.model and not have:
            return msgspec.structs.replace(self.message, have=have, deadline_ms=left), self.prompt
        # A broker has accepted it once.
        blob, prompt_bytes = transfer.pack(self.prompt or b"", self.tokens.chunks)
        message = msgspec.structs.replace(
            self.message,
            model=self.place.model or self.message.model,
            have=have,
            deadline_ms=left,
            resume=True,
            prompt_bytes=prompt_bytes,
            fingerprint=self.place.fingerprint,
        )
        return message, blob

    def _held(self) -> list[bytes]:
        """What was given to us, if that is all from the first token on and not too much to be said."""
        kept = self.tokens.chunks
        if not kept or self.tokens.base or sum(map(len, kept)) > limits.CONTROL_BODY_BYTES // 2:
            return []
        return transfer.merge(kept)


@dataclass(slots=True)
class OpenQuery:
    """A query, sent again until all pages of one answer have come in a row."""

    message: m.Query | m.DrainWorker | m.Lease
    parts: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, result: m.Result) -> bytes | None:
        """The whole answer when this was its last page.

        Pages of two answers never mix: an answer begins with page 0 and what is out of turn is dropped.
        """
        if result.page == 0:
            self.parts, self.size = [], 0
        if result.page != len(self.parts) or self.size + len(result.data) > limits.RESULT_BYTES:
            return None
        self.parts.append(result.data)
        self.size += len(result.data)
        return b"".join(self.parts) if len(self.parts) >= result.pages else None


@dataclass(slots=True)
class Counters:
    """What a client had to put up with; for tests and for people who wonder."""

    frames: int = 0
    stray_frames: int = 0
    held_frames: int = 0
    malformed: int = 0
    stale_messages: int = 0
    problems: int = 0
    resends: int = 0
    replays: int = 0
    pages: int = 0
    end_acks: int = 0
