"""Requests that have ended: their END, should a client ask again, and their tokens for as long as promised.

A tombstone (the END) stays until newer ones push it out, and takes tokens that are still here with it. While it is
here a late CANCEL gets it. So does a repeated submit, as long as the tokens are here or if the request failed or was
cancelled; otherwise that submit is run again (`recovery.forget_outdated`).

The tokens stay until every follower has acknowledged them. A client that is gone counts as one that has. Those of a
detached request stay for its retention time, within a bound of bytes, oldest out first.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from llambo.broker.records.request import Request
from llambo.broker.records.transcript import Transcript
from llambo.mesh.wire import messages as m


class EndedRequest(msgspec.Struct):
    """What is left of a request."""

    end: m.End
    model: str
    #: Of the file that its tokens are of.
    fingerprint: str
    stream: bool
    detached: bool
    ended_at: int
    story: list[tuple[int, str, str]]
    task: m.Task
    #: None: its tokens are dropped.
    transcript: Transcript | None
    #: Sessions that have not acknowledged the END yet.
    owed: set[bytes] = msgspec.field(default_factory=set)
    #: It was ended because its client was gone. If the client submits it again, it has not ended; no client is given
    #: this END (`recovery.is_outdated`).
    abandoned: bool = False
    owner: str = ""
    first_ms: int = -1
    #: An acknowledgement of its END has counted as a receipt (backlog.py). Once: an attach has the END sent again.
    paid: bool = False


class Archive:
    def __init__(self, tombstones: int, detached_bytes: int, detached_ms: int) -> None:
        self.ended: OrderedDict[bytes, EndedRequest] = OrderedDict()
        #: Bytes of transcripts that wait for an acknowledgement, and of those stored because they are detached.
        self.owed_bytes = 0
        self.detached_bytes = 0
        self._detached: OrderedDict[bytes, None] = OrderedDict()
        self._tombstones = tombstones
        self._max_detached_bytes = detached_bytes
        self._max_detached_ms = detached_ms

    def get(self, id: bytes) -> EndedRequest | None:
        return self.ended.get(id)

    def add(self, request: Request, end: m.End, now_ms: int) -> EndedRequest:
        transcript = request.transcript
        ended = EndedRequest(
            end,
            request.model,
            request.run.fingerprint,
            request.stream,
            request.asked.detached,
            now_ms,
            request.story,
            task=request.task,
            transcript=transcript,
            owed=set(request.followers),
            abandoned=request.followers.abandoned,
            owner=request.account.name,
            first_ms=request.measured.first_ms,
        )
        self.ended[request.id] = ended
        if ended.detached:
            self._detached[request.id] = None
            self.detached_bytes += transcript.size
        else:
            self.owed_bytes += transcript.size
            if not ended.owed:
                self._drop_tokens(ended)
        self._trim()
        return ended

    def acknowledged(self, id: bytes, session: bytes) -> None:
        """This session needs nothing more of it: it has the whole answer, has detached, or is gone."""
        ended = self.ended.get(id)
        if ended is None:
            return
        ended.owed.discard(session)
        if not ended.owed and not ended.detached:
            self._drop_tokens(ended)

    def forget(self, id: bytes) -> None:
        """As if it had never been here."""
        ended = self.ended.pop(id)
        self._drop_tokens(ended)
        self._detached.pop(id, None)

    def expire(self, now_ms: int) -> None:
        """Detached results whose time is over."""
        while self._detached:
            id = next(iter(self._detached))
            if now_ms - self.ended[id].ended_at < self._max_detached_ms:
                return
            self._drop_detached(id)

    def _trim(self) -> None:
        while self.detached_bytes > self._max_detached_bytes and self._detached:
            self._drop_detached(next(iter(self._detached)))
        while len(self.ended) > self._tombstones:
            id = next(iter(self.ended))
            if id in self._detached:
                self._drop_detached(id)
            self._drop_tokens(self.ended[id])
            del self.ended[id]

    def _drop_detached(self, id: bytes) -> None:
        del self._detached[id]
        self._drop_tokens(self.ended[id])

    def _drop_tokens(self, ended: EndedRequest) -> None:
        if ended.transcript is None:
            return
        if ended.detached:
            self.detached_bytes -= ended.transcript.size
        else:
            self.owed_bytes -= ended.transcript.size
        ended.transcript = None
