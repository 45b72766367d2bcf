"""From chunk frames in any order to tokens in order, each index exactly once.

The token plane may lose, repeat and reorder frames. A frame that continues the stream is the usual case
and must stay cheap: one unpack, one compare, one decode. Everything else is sorted out beside it:

    older than what is held      dropped
    overlaps what is held        trimmed
    later, with a gap before it  stashed, until a replay fills the gap

The gap is what the owner asks to have sent again; whatever did not fit the stash is simply asked for too.
"""

from __future__ import annotations

from bisect import insort

import msgspec

from llambo.mesh.wire import limits
from llambo.mesh.wire.tokens import CHUNK, FINAL, HEAD_BYTES, KEY_END, Body, Logprob, head, trim_chunk

_decode_body = msgspec.msgpack.Decoder(Body).decode
#: What a decoder raises for bytes that are not what they should be.
_UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Stash:
    """Chunks that arrived before their turn. Bounded: when it is full the nearest are kept."""

    __slots__ = ("_entries", "_limit", "refused")

    def __init__(self, limit: int = limits.STASH_CHUNKS) -> None:
        self.refused = 0
        self._limit = limit
        self._entries: list[tuple[int, int, bytes]] = []  # first, count, frame; sorted

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def first_index(self) -> int:
        """The lowest index that is held; only meaningful while there is one."""
        return self._entries[0][0]

    @property
    def end_index(self) -> int:
        """The index after the last token that is held; 0 when there is none."""
        return max((first + count for first, count, _ in self._entries), default=0)

    def put(self, first: int, count: int, frame: bytes) -> bool:
        """False if this frame was known already or found no room."""
        if any(f <= first and first + count <= f + c for f, c, _ in self._entries):
            return False
        if len(self._entries) >= self._limit:
            self.refused += 1
            if first >= self._entries[-1][0]:
                return False
            self._entries.pop()
        insort(self._entries, (first, count, frame))
        return True

    def pop_next(self, next_index: int) -> bytes | None:
        """The frame that holds `next_index`; it may begin before it. Older ones are forgotten on the way."""
        entries = self._entries
        while entries and entries[0][0] <= next_index:
            first, count, frame = entries.pop(0)
            if first + count > next_index:
                return frame
        return None


class Reassembly:
    """One stream. `add` frames as they come, then `take` what is in order since the last time."""

    __slots__ = (
        "_ids",
        "_pieces",
        "base",
        "final_index",
        "kept",
        "logprobs",
        "malformed",
        "next_index",
        "old",
        "stash",
        "stashed",
        "trimmed",
    )

    def __init__(self, next_index: int = 0) -> None:
        self.base = self.next_index = next_index
        #: The number of tokens of the whole answer, once the chunk that says so was taken.
        self.final_index: int | None = None
        self.stash = Stash()
        #: All that was taken, in order, to be shown to a broker that does not know this answer.
        self.kept: list[bytes] = []
        self.old = self.trimmed = self.stashed = self.malformed = 0
        self._ids: list[int] = []
        self._pieces: list[bytes] = []
        #: Of the tokens that are taken next, if there are any: see `take_logprobs`.
        self.logprobs: list[Logprob | None] = []

    @property
    def gap(self) -> tuple[int, int] | None:
        """The first missing index and the first one held after it."""
        return (self.next_index, self.stash.first_index) if self.stash else None

    @property
    def seen_index(self) -> int:
        """The index after the furthest token that is held, in order or not."""
        return max(self.next_index, self.stash.end_index)

    def add(self, frame: bytes) -> bool:
        """True if there is more to take than before. The caller has checked whose frame it is."""
        if len(frame) <= HEAD_BYTES or frame[:1] != CHUNK:
            self.malformed += 1
            return False
        first, count, flags = head(frame, KEY_END)
        if first != self.next_index:
            return self._add_unordered(frame, first, count, flags)
        if not self._append(frame, count, flags):
            return False
        if self.stash:
            self._unstash()
        return True

    def forget_stash(self) -> None:
        self.stash = Stash()

    def take(self) -> tuple[list[int], list[bytes]]:
        """The token ids and their bytes that have come into order since the last take."""
        ids, pieces = self._ids, self._pieces
        if ids:
            self._ids, self._pieces = [], []
        return ids, pieces

    def take_logprobs(self, count: int) -> list[Logprob | None]:
        """Those of the tokens that were just taken, if `logprobs` has any."""
        logprobs, self.logprobs = self.logprobs, []
        return logprobs + [None] * (count - len(logprobs))

    def _append(self, frame: bytes, count: int, flags: int, skip: int = 0) -> bool:
        try:
            body = _decode_body(frame[HEAD_BYTES:])
        except _UNDECODABLE:
            self.malformed += 1
            return False
        ids, pieces = body.ids, body.pieces
        if not 0 < count <= limits.CHUNK_TOKENS or len(ids) != count or len(pieces) != count:
            self.malformed += 1
            return False
        if body.logprobs is not None:
            if len(body.logprobs) != count:
                self.malformed += 1
                return False
            # In step with the ids, whoever left some out before.
            self.logprobs += [None] * (len(self._ids) - len(self.logprobs))
            self.logprobs += body.logprobs[skip:]
        self._ids += ids[skip:] if skip else ids
        self._pieces += pieces[skip:] if skip else pieces
        self.kept.append(trim_chunk(frame, self.next_index) or b"" if skip else frame)
        self.next_index += count - skip
        if flags & FINAL:
            self.final_index = self.next_index
        return True

    def _add_unordered(self, frame: bytes, first: int, count: int, flags: int) -> bool:
        possible = 0 < count <= limits.CHUNK_TOKENS and first + count <= limits.TOKEN_INDEX
        if not possible or len(frame) > limits.TOKEN_FRAME_BYTES:
            self.malformed += 1
            return False
        if first > self.next_index:
            self.stashed += self.stash.put(first, count, frame)
            return False
        if first + count <= self.next_index:
            self.old += 1
            return False
        self.trimmed += 1
        if not self._append(frame, count, flags, self.next_index - first):
            return False
        self._unstash()
        return True

    def _unstash(self) -> None:
        while (frame := self.stash.pop_next(self.next_index)) is not None:
            first, count, flags = head(frame, KEY_END)
            self._append(frame, count, flags, self.next_index - first)
