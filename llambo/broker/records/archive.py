"""Requests that have ended: their END for whoever asks again, and their tokens for as long as promised.

A tombstone (the END) stays until newer ones push it out, so that a late CANCEL or a repeated submit gets
the same answer. The tokens stay until every follower has acknowledged them; those of a detached request
stay for its retention time, within a bound of bytes, oldest out first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from llambo.broker.records.request import Request
from llambo.broker.records.transcript import Transcript
from llambo.mesh.wire import messages as m


@dataclass(slots=True)
class Ended:
    """What is left of a request."""

    end: m.End
    model: str
    stream: bool
    detached: bool
    ended_at: int
    story: list[tuple[int, str, str]]
    task: m.Task
    #: None: the tokens are gone.
    transcript: Transcript | None
    #: Sessions that have not acknowledged the END yet.
    owed: set[bytes] = field(default_factory=set)
    #: It was ended because its client was gone. If that is back, it has not ended.
    forsaken: bool = False
    owner: str = ""
    first_ms: int = -1


class Archive:
    def __init__(self, tombstones: int, detached_bytes: int, detached_ms: int) -> None:
        self.ended: OrderedDict[bytes, Ended] = OrderedDict()
        #: Bytes of transcripts that wait for an acknowledgement, and of those kept because they are detached.
        self.owed_bytes = 0
        self.kept_bytes = 0
        self._kept: OrderedDict[bytes, None] = OrderedDict()
        self._tombstones = tombstones
        self._detached_bytes = detached_bytes
        self._detached_ms = detached_ms

    def get(self, id: bytes) -> Ended | None:
        return self.ended.get(id)

    def add(self, request: Request, end: m.End, now_ms: int) -> Ended:
        transcript = request.transcript
        ended = Ended(
            end, request.model, request.stream, request.detached, now_ms, request.story, request.task, transcript,
            set(request.followers), request.forsaken, request.owner, request.first_ms,
        )  # fmt: skip
        self.ended[request.id] = ended
        if ended.detached:
            self._kept[request.id] = None
            self.kept_bytes += transcript.size
        else:
            self.owed_bytes += transcript.size
            if not ended.owed:
                self._forget_tokens(ended)
        self._trim(now_ms)
        return ended

    def acknowledged(self, id: bytes, session: bytes) -> None:
        """This session has the whole answer, or is gone and never will."""
        ended = self.ended.get(id)
        if ended is None:
            return
        ended.owed.discard(session)
        if not ended.owed and not ended.detached:
            self._forget_tokens(ended)

    def forget(self, id: bytes) -> None:
        """As if it had never been here."""
        ended = self.ended.pop(id)
        self._forget_tokens(ended)
        self._kept.pop(id, None)

    def expire(self, now_ms: int) -> None:
        """Detached results whose time is over."""
        while self._kept:
            id = next(iter(self._kept))
            if now_ms - self.ended[id].ended_at < self._detached_ms:
                return
            self._drop_kept(id)

    def _trim(self, now_ms: int) -> None:
        while self.kept_bytes > self._detached_bytes and self._kept:
            self._drop_kept(next(iter(self._kept)))
        while len(self.ended) > self._tombstones:
            id = next(iter(self.ended))
            if id in self._kept:
                self._drop_kept(id)
            self._forget_tokens(self.ended[id])
            del self.ended[id]

    def _drop_kept(self, id: bytes) -> None:
        del self._kept[id]
        self._forget_tokens(self.ended[id])

    def _forget_tokens(self, ended: Ended) -> None:
        if ended.transcript is None:
            return
        if ended.detached:
            self.kept_bytes -= ended.transcript.size
        else:
            self.owed_bytes -= ended.transcript.size
        ended.transcript = None
