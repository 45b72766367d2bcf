"""From chunk frames in any order to tokens in order, each index exactly once.

The token plane may lose, repeat and reorder frames. A frame that continues the stream is the usual case
and must stay cheap: one unpack, one compare, one decode. Everything else is sorted out beside it:

    older than what is held      dropped
    overlaps what is held        trimmed
    later, with a gap before it  stashed, until a replay fills the gap

The gap is what the owner asks to have sent again; what did not fit into the stash is simply asked for too.

`Chunks` is that order. The broker's transcript is one, which stores and forwards frames; a client's `Reassembly` is
one, which also reads them.
"""

from __future__ import annotations

import enum
from bisect import insort
from collections.abc import Iterator

from llambo.mesh.wire import limits
from llambo.mesh.wire.tokens import CHUNK, FINAL, HEAD_BYTES, KEY_END, Logprob, head, read_body, trim_chunk


class Stash:
    """Chunks that arrived before their turn. Bounded: when it is full the nearest stay."""

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
        """The frame that holds `next_index`; it may begin before it. Older ones are dropped on the way."""
        entries = self._entries
        while entries and entries[0][0] <= next_index:
            first, count, frame = entries.pop(0)
            if first + count > next_index:
                return frame
        return None


class Fit(enum.Enum):
    """How a chunk fits to what is held."""

    IMPOSSIBLE = "no chunk has such indexes"
    OLD = "all of it is held"
    NEXT = "it goes on from here, or overlaps"
    EARLY = "something before it is missing"


class Chunks:
    """Chunks in order, each index once. The owner appends: to `chunks`, moving `next_index`."""

    __slots__ = ("chunks", "next_index", "stash")

    def __init__(self, next_index: int = 0) -> None:
        self.chunks: list[bytes] = []
        self.next_index = next_index
        #: What arrived before its turn; None while that is nothing.
        self.stash: Stash | None = None

    def fit(self, first: int, count: int) -> Fit:
        if not 0 < count <= limits.CHUNK_TOKENS or first + count > limits.TOKEN_INDEX:
            return Fit.IMPOSSIBLE
        if first > self.next_index:
            return Fit.EARLY
        return Fit.NEXT if first + count > self.next_index else Fit.OLD

    def put_aside(self, first: int, count: int, frame: bytes) -> bool:
        """False if it was there already or found no room."""
        if self.stash is None:
            self.stash = Stash()
        return self.stash.put(first, count, frame)

    def trimmed(self, frame: bytes) -> bytes | None:
        """What of a frame that fits is new; None if it is malformed."""
        first, _, _ = head(frame, KEY_END)
        return frame if first >= self.next_index else trim_chunk(frame, self.next_index)

    def released(self) -> Iterator[bytes]:
        """Frames of the stash whose turn has come. Each is to be appended before the next is asked for."""
        while self.stash:
            frame = self.stash.pop_next(self.next_index)
            if frame is None:
                break
            yield frame
        if not self.stash:
            self.stash = None


class Reassembly(Chunks):
    """One stream, in its client. `add` frames as they come, then `take` what is in order since the last time."""

    __slots__ = (
        "_ids",
        "_pieces",
        "base",
        "final_index",
        "logprobs",
        "malformed",
        "old",
        "overlaps",
        "stashed",
    )

    def __init__(self, next_index: int = 0) -> None:
        # `chunks` stays whole, to be shown to a broker that does not know this answer.
        super().__init__(next_index)
        self.base = next_index
        #: The number of tokens of the whole answer, once the chunk that says so was taken.
        self.final_index: int | None = None
        self.old = self.overlaps = self.stashed = self.malformed = 0
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
        return max(self.next_index, self.stash.end_index) if self.stash else self.next_index

    def add(self, frame: bytes) -> bool:
        """True if there is more to take than before. The caller has checked whose frame it is."""
        if len(frame) <= HEAD_BYTES or frame[:1] != CHUNK:
            self.malformed += 1
            return False
        first, count, flags = head(frame, KEY_END)
        if first != self.next_index:
            return self._add_unordered(frame, first, count)
        if not self._append(frame, count, flags):
            return False
        if self.stash:
            self._unstash()
        return True

    def forget_stash(self) -> None:
        self.stash = None

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

    def _append(self, frame: bytes, count: int, flags: int) -> bool:
        body = read_body(frame, count)
        if body is None:
            self.malformed += 1
            return False
        if body.logprobs is not None:
            # In step with the ids, should earlier chunks have left some out.
            self.logprobs += [None] * (len(self._ids) - len(self.logprobs))
            self.logprobs += body.logprobs
        self._ids += body.ids
        self._pieces += body.pieces
        self.chunks.append(frame)
        self.next_index += count
        if flags & FINAL:
            self.final_index = self.next_index
        return True

    def _add_unordered(self, frame: bytes, first: int, count: int) -> bool:
        fit = self.fit(first, count) if len(frame) <= limits.TOKEN_FRAME_BYTES else Fit.IMPOSSIBLE
        if fit is Fit.NEXT:
            self.overlaps += 1
            if not self._append_trimmed(frame):
                return False
            self._unstash()
            return True
        if fit is Fit.EARLY:
            self.stashed += self.put_aside(first, count, frame)
        elif fit is Fit.OLD:
            self.old += 1
        else:
            self.malformed += 1
        return False

    def _append_trimmed(self, frame: bytes) -> bool:
        new = self.trimmed(frame)
        if new is None:
            self.malformed += 1
            return False
        _, count, flags = head(new, KEY_END)
        return self._append(new, count, flags)

    def _unstash(self) -> None:
        for frame in self.released():
            self._append_trimmed(frame)
