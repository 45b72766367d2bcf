"""What a request has produced so far: the chunks as they came, in order, each index once.

Everything that makes an answer survive comes from here: repairing a gap at a client, continuing on another
worker, letting a client attach again. So a chunk is appended before it is forwarded, and the bytes it may
need are reserved when the request is admitted. Bytes are checked, tokens are not counted: a worker that sends more than
`max_tokens` is noticed when they take more than is reserved. What a client brings with a resumed request counts too,
although the error then names the worker.
"""

from __future__ import annotations

from bisect import bisect_right

from llambo.mesh.wire import limits, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.stream import Chunks

#: What one token may cost in a transcript: a chunk of its own with its piece.
BYTES_PER_TOKEN = 128
#: What its logprob may cost, and each of the likeliest tokens sent with it.
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


class Transcript(Chunks):
    """The fields are public because the token path appends in place: `delivery.tokens_arrived`."""

    __slots__ = ("final", "reserved", "size")

    def __init__(self, max_tokens: int, logprobs: int | None = None, task: m.Task = "generate") -> None:
        super().__init__()
        self.reserved = reservation(max_tokens, logprobs, task)
        self.size = 0
        #: FINAL and STOPPED, if the last chunk is here and has them. They end nothing: an END does; or, if the worker
        #: or broker is lost that would have sent it, `dispatching.finish_complete`.
        self.final = 0

    def clear(self) -> None:
        self.restore([])

    def restore(self, chunks: list[bytes]) -> None:
        """Begin with these: what a client has of this answer already.

        `transfer.check` has checked their form and order. Not checked are the request id in them, and that they fit
        into what is reserved.
        """
        self.chunks = list(chunks)
        self.next_index, self.stash, self.final = 0, None, 0
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
        for at in range(max(0, bisect_right(self.chunks, index, key=_first) - 1), len(self.chunks)):
            chunk = self.chunks[at]
            size += len(chunk)
            if index >= stop or len(chunks) >= limits.PAGE_CHUNKS or (chunks and size > limits.PAGE_BYTES):
                break
            chunks.append(chunk)
            begin, count, _ = tokens.head(chunk, tokens.KEY_END)
            index = begin + count
        return chunks, index


def _first(chunk: bytes) -> int:
    return int(tokens.head(chunk, tokens.KEY_END)[0])
