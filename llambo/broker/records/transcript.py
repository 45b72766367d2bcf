"""What a request has produced so far: the chunks as they came, in order, each index once.

Everything that makes an answer survive comes from here: repairing a gap at a client, continuing on another
worker, letting a client attach again. So a chunk is appended before it is forwarded, and the bytes it may
need are reserved when the request is admitted.
"""

from __future__ import annotations

from bisect import bisect_right

from llambo.mesh.wire import limits, tokens
from llambo.mesh.wire import messages as m

#: What one token may cost in a transcript: a chunk of its own with its piece.
BYTES_PER_TOKEN = 128
#: What its logprob may cost, and each of the likeliest tokens told with it.
BYTES_PER_LOGPROB = 16
BYTES_PER_TOP_TOKEN = 48
#: What an empty transcript is charged with.
BYTES_PER_TRANSCRIPT = 1_024


def reservation(max_tokens: int, logprobs: int | None = None, task: m.Task = "generate") -> int:
    """The bytes to set aside for an answer of at most this many tokens, or a result of so many pieces."""
    each = BYTES_PER_TOKEN if task == "generate" else limits.RESULT_PIECE_BYTES + BYTES_PER_TOKEN
    if logprobs is not None:
        each += BYTES_PER_LOGPROB + BYTES_PER_TOP_TOKEN * logprobs
    return BYTES_PER_TRANSCRIPT + each * max_tokens


class Transcript:
    """The fields are public because the token path appends in place; see `delivery.tokens_arrived`."""

    __slots__ = ("chunks", "final", "next_index", "reserved", "size")

    def __init__(self, max_tokens: int, logprobs: int | None = None, task: m.Task = "generate") -> None:
        self.reserved = reservation(max_tokens, logprobs, task)
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        self.chunks: list[bytes] = []
        self.next_index = 0
        self.size = 0
        #: The flags of the last chunk, once it is here.
        self.final = 0

    def restore(self, chunks: list[bytes]) -> None:
        """Begin with these, which were checked: what somebody was given of this answer before."""
        self.chunks = list(chunks)
        self.size = sum(map(len, chunks))
        if chunks:
            first, count, flags = tokens.head(chunks[-1], tokens.KEY_END)
            self.next_index = first + count
            self.final = flags & (tokens.FINAL | tokens.STOPPED)

    def ids(self) -> list[int]:
        """All token ids, for the worker that continues."""
        return tokens.ids_of(self.chunks)

    def page(self, first: int, until: int) -> tuple[list[bytes], int]:
        """The chunks that hold `first` and what follows, up to a page; and the index after them."""
        chunks: list[bytes] = []
        size, index = 0, first
        stop = min(until or self.next_index, self.next_index)
        for at in range(self._holding(first), len(self.chunks)):
            chunk = self.chunks[at]
            size += len(chunk)
            if index >= stop or len(chunks) >= limits.PAGE_CHUNKS or (chunks and size > limits.PAGE_BYTES):
                break
            chunks.append(chunk)
            index = _end(chunk)
        return chunks, index

    def _holding(self, index: int) -> int:
        """Where in `chunks` the chunk with this token index is."""
        return max(0, bisect_right(self.chunks, index, key=_first) - 1)


def _first(chunk: bytes) -> int:
    return int(tokens.head(chunk, tokens.KEY_END)[0])


def _end(chunk: bytes) -> int:
    first, count, _ = tokens.head(chunk, tokens.KEY_END)
    return int(first + count)
