"""From chunk frames in any order to tokens in order, each index exactly once.

The token plane may lose, repeat and reorder frames. The usual frame continues the stream, and must stay cheap: one
unpack, one compare, one decode. All other frames are handled separately:

    older than the stream        dropped
    overlaps the stream          trimmed
    later, with a gap before it  stashed, until a replay fills the gap

The owner requests a replay of the gap, and of frames that did not fit into the stash.

`Chunks` has this logic. The transcript of a broker is one, which stores and forwards frames; the `Reassembly` of a
client is one, which also decodes them.
"""

from __future__ import annotations

import enum
from bisect import insort
from collections.abc import Iterator

from llambo.mesh.wire import limits
from llambo.mesh.wire.tokens import CHUNK, FINAL, HEAD_BYTES, KEY_END, Logprob, head, read_body, trim_chunk


class Stash:
    """Chunks that arrived too early. Bounded: when it is full, those with the lowest indexes stay."""

    __slots__ = ("_entries", "_limit", "refused")

    def __init__(self, limit: int = limits.STASH_CHUNKS) -> None:
        self.refused = 0
        self._limit = limit
        self._entries: list[tuple[int, int, bytes]] = []  # first, count, frame; sorted

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def first_index(self) -> int:
        """The lowest index in the stash, which must not be empty."""
        return self._entries[0][0]

    @property
    def end_index(self) -> int:
        """The index after the last token in the stash; 0 if it is empty."""
        return max((first + count for first, count, _ in self._entries), default=0)

    def put(self, first: int, count: int, frame: bytes) -> bool:
        """False if the stash has these tokens already, or has no room for them."""
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
        """The frame with the token `next_index`, which may begin before it. Older frames are dropped."""
        entries = self._entries
        while entries and entries[0][0] <= next_index:
            first, count, frame = entries.pop(0)
            if first + count > next_index:
                return frame
        return None


class Fit(enum.Enum):
    """How a chunk relates to the tokens so far."""

    IMPOSSIBLE = "its indexes are invalid"
    OLD = "all its tokens are known"
    NEXT = "it continues the stream, or overlaps"
    EARLY = "there is a gap before it"


class Chunks:
    """Chunks in order, each index once. The owner appends to `chunks`, and advances `next_index`."""

    __slots__ = ("chunks", "next_index", "stash")

    def __init__(self, next_index: int = 0) -> None:
        self.chunks: list[bytes] = []
        self.next_index = next_index
        #: Chunks that arrived too early; None while there are none.
        self.stash: Stash | None = None

    def fit(self, first: int, count: int) -> Fit:
        if not 0 < count <= limits.CHUNK_TOKENS or first + count > limits.TOKEN_INDEX:
            return Fit.IMPOSSIBLE
        if first > self.next_index:
            return Fit.EARLY
        return Fit.NEXT if first + count > self.next_index else Fit.OLD

    def put_aside(self, first: int, count: int, frame: bytes) -> bool:
        """False if the stash has these tokens already, or has no room for them."""
        if self.stash is None:
            self.stash = Stash()
        return self.stash.put(first, count, frame)

    def trimmed(self, frame: bytes) -> bytes | None:
        """The new part of a frame that fits NEXT; None if it is malformed."""
        first, _, _ = head(frame, KEY_END)
        return frame if first >= self.next_index else trim_chunk(frame, self.next_index)

    def released(self) -> Iterator[bytes]:
        """Frames of the stash that now continue the stream. Append each before taking the next one."""
        while self.stash:
            frame = self.stash.pop_next(self.next_index)
            if frame is None:
                break
            yield frame
        if not self.stash:
            self.stash = None


class Reassembly(Chunks):
    """One stream in its client. `add` frames as they arrive, then `take` the tokens that are in order now."""

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
        # `chunks` stays complete, for a broker that does not know this answer.
        super().__init__(next_index)
        self.base = next_index
        #: The number of tokens of the whole answer, once the chunk with the flag FINAL was added.
        self.final_index: int | None = None
        self.old = self.overlaps = self.stashed = self.malformed = 0
        self._ids: list[int] = []
        self._pieces: list[bytes] = []
        #: Logprobs of the tokens that are taken next, if there are any: see `take_logprobs`.
        self.logprobs: list[Logprob | None] = []

    @property
    def gap(self) -> tuple[int, int] | None:
        """The first missing index, and the first index after the gap."""
        return (self.next_index, self.stash.first_index) if self.stash else None

    @property
    def seen_index(self) -> int:
        """The index after the last token that is here, in order or not."""
        return max(self.next_index, self.stash.end_index) if self.stash else self.next_index

    def add(self, frame: bytes) -> bool:
        """True if there are new tokens to take. The caller has checked the request id of the frame."""
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
        """The token ids and their bytes that are in order since the last call."""
        ids, pieces = self._ids, self._pieces
        if ids:
            self._ids, self._pieces = [], []
        return ids, pieces

    def take_logprobs(self, count: int) -> list[Logprob | None]:
        """The logprobs of the tokens that were just taken, if `logprobs` has any."""
        logprobs, self.logprobs = self.logprobs, []
        return logprobs + [None] * (count - len(logprobs))

    def _append(self, frame: bytes, count: int, flags: int) -> bool:
        body = read_body(frame, count)
        if body is None:
            self.malformed += 1
            return False
        if body.logprobs is not None:
            # Aligned with the ids, if earlier chunks had none.
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
