"""What a caller holds: a stream of pieces, and the answer it adds up to."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from llambo.mesh.client import client_events as e
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.tokens import Logprob

#: What may wait for a slow reader. Then no more is taken: the broker has the transcript, it can be fetched later.
BUFFER_TOKENS = 65_536
BUFFER_BYTES = 4 * 1024 * 1024
#: What a token that is told beside another one counts there.
TOP_TOKEN_BYTES = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that came together. `text` never ends within a character: the rest comes with the next piece."""

    text: str
    ids: list[int]
    #: The position of the first of them in the answer.
    index: int
    #: How likely the model held each of them, if that was asked for.
    logprobs: list[Logprob | None] = field(default_factory=list)
    #: The bytes of each token, as they came: one may have none, and `text` may have a part of the last ones only later.
    pieces: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `reason` tells why it ended: stop, length, cancelled, deadline or error."""

    text: str
    ids: list[int]
    reason: m.Reason
    usage: m.Usage
    worker: str
    #: How often the request moved to another worker.
    moves: int
    id: str
    queued_ms: int
    #: How likely the model held each token, if that was asked for; and then the bytes of each, too.
    logprobs: list[Logprob | None] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    #: With reason `stop`: the stop string that ended it, if one did.
    stop: str = ""


class _Buffer:
    """Tokens that have arrived and were not read yet."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.pieces: list[bytes] = []
        self.logprobs: list[Logprob | None] = []
        self.size = 0

    @property
    def full(self) -> bool:
        return len(self.pieces) >= BUFFER_TOKENS or self.size >= BUFFER_BYTES

    def add(self, ids: list[int], pieces: list[bytes], logprobs: Sequence[Logprob | None]) -> None:
        self.ids += ids
        self.pieces += pieces
        self.size += sum(map(len, pieces))
        if logprobs:
            self.logprobs += logprobs
            self.size += TOP_TOKEN_BYTES * sum(1 + len(each.top) for each in logprobs if each is not None)


class _Transcript:
    """Everything that was read, as tokens and as text."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[Logprob | None] = []
        self.pieces: list[bytes] = []
        self._texts: list[str] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, buffer: _Buffer) -> Piece:
        text = self._decoder.decode(b"".join(buffer.pieces))
        piece = Piece(text, buffer.ids, len(self.ids), buffer.logprobs, buffer.pieces)
        self.ids += buffer.ids
        if buffer.logprobs:
            self.logprobs += buffer.logprobs
            self.pieces += buffer.pieces
        self._texts.append(text)
        return piece

    def finish(self) -> str:
        """The rest of the text: a character of which some bytes never came is replaced."""
        rest = self._decoder.decode(b"", final=True)
        self._texts.append(rest)
        return rest

    @property
    def text(self) -> str:
        return "".join(self._texts)


class Stream:
    """An answer as it comes. Iterate it; leaving the loop early cancels the request.

    One that is not iterated to its end is closed with `async with` or `aclose`. Closing an attached one only
    stops following it: it belongs to whoever submitted it.
    """

    def __init__(self, id: bytes, handle: Callable[[e.Event], None], *, mine: bool) -> None:
        self.id = id.hex()
        #: How many wait before it; None until the broker has accepted it.
        self.ahead: int | None = None
        self.model = ""
        #: The whole answer, once the end was read.
        self.answer: Answer | None = None
        #: Called when `ahead` has changed, for whoever shows it. Must not block.
        self.on_place: Callable[[], None] | None = None
        self._key = id
        self._handle = handle
        self._mine = mine
        self._buffer = _Buffer()
        self._read = _Transcript()
        self._held = False
        self._end: m.End | None = None
        self._error: LlamboError | None = None
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    # --- reading -----------------------------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            while (piece := await self.next_piece()) is not None:
                yield piece
        finally:
            await self.aclose()

    async def next_piece(self) -> Piece | None:
        """What has come since the last time; waits if that is nothing. None after the end."""
        while not self._buffer.pieces:
            if self.answer is not None or self._closed:
                return None
            if self._end is not None:
                return self._finish(self._end)
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._take()

    async def result(self) -> Answer:
        """Read to the end, and return the whole."""
        while await self.next_piece() is not None:
            pass
        if self.answer is None:
            raise asyncio.CancelledError(f"stream {self.id} was closed")
        return self.answer

    async def cancel(self) -> None:
        """Stop the request. The stream then ends, with what it has and the reason `cancelled`."""
        if not self.over:
            self._handle(e.CancelAsked(self._key))

    async def aclose(self) -> None:
        """Nobody reads on: cancel the request if it is mine, and let go of it."""
        if not self.over and not self._closed:
            self._handle(e.CancelAsked(self._key, drop=True) if self._mine else e.ReaderLeft(self._key))
        self._closed = True
        self._wake()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # --- what the client brings ----------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Nothing more will arrive; there may still be something to read."""
        return self._end is not None or self._error is not None

    def deliver(self, ids: list[int], pieces: list[bytes], logprobs: Sequence[Logprob | None]) -> None:
        if self._closed:
            return
        self._buffer.add(ids, pieces, logprobs)
        if self._buffer.full and not self._held:
            self._held = True
            self._handle(e.ReaderBehind(self._key))
        self._wake()

    def place(self, ahead: int, model: str) -> None:
        self.ahead, self.model = ahead, model or self.model
        if self.on_place is not None:
            self.on_place()

    def end(self, end: m.End) -> None:
        self._end = end
        self._wake()

    def fail(self, error: LlamboError) -> None:
        self._error = error
        self._wake()

    # --- inside --------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self) -> Piece:
        buffer, self._buffer = self._buffer, _Buffer()
        piece = self._read.read(buffer)
        if self._held:
            self._held = False
            self._handle(e.ReaderCaughtUp(self._key))
        return piece

    def _finish(self, end: m.End) -> Piece | None:
        """The end was read. It may bring the rest of a character that never became whole."""
        read = self._read
        rest = read.finish()
        self.answer = Answer(
            read.text, read.ids, end.reason, end.usage, end.worker, end.moves, self.id, end.queued_ms,
            read.logprobs, read.pieces, end.stop,
        )  # fmt: skip
        if end.reason == "error" and end.error is not None:
            self._error = LlamboError.of(end.error)
            raise self._error
        return Piece(rest, [], len(read.ids)) if rest else None
