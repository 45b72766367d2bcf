"""What callers receive: streams of pieces, whole answers; and how a client reaches its callers."""

from __future__ import annotations

import asyncio
import codecs
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from llambo.mesh.client import client_events as e
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo, LlamboError, printable
from llambo.mesh.wire.tokens import Logprob
from llambo.mesh.wire.tool_calls import CalledTool, split_calls

T = TypeVar("T")
#: Tokens that wait for a slow reader. Beyond that no more are accepted: the broker has the transcript, and they are
#: fetched later.
BUFFER_TOKENS = 65_536
BUFFER_BYTES = 4 * 1024 * 1024
#: The size of an alternative token in that sum.
TOP_TOKEN_BYTES = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that arrived together."""

    #: Their text. It never ends within a character: the rest comes with the next piece.
    text: str
    #: Their ids in the vocabulary of the model.
    ids: list[int]
    #: The index of the first of them in the answer.
    index: int
    #: With the option `logprobs`: the log-probability of each of them.
    logprobs: list[Logprob | None] = field(default_factory=list)
    #: The bytes of each token: a token may have none, and the last bytes may be part of the `text` of the next piece.
    pieces: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    #: All of it. With tools the calls are part of it, as the model wrote them.
    text: str
    #: The ids of its tokens.
    ids: list[int]
    #: Why it ended: "stop" (the model ended it, or a stop string did), "length" (`max_tokens`, or the context is full),
    #: "cancelled" or "deadline". For "error" the client raises the error instead.
    reason: m.Reason
    #: Tokens of the prompt, those of them that a cache had, and the time for the prompt and for the answer.
    usage: m.Usage
    #: The worker that finished it.
    worker: str
    #: How many times the request moved to another worker.
    moves: int
    #: The id of the request.
    id: str
    #: How long it waited for a worker.
    queued_ms: int
    #: With the option `logprobs`: the log-probability of each token.
    logprobs: list[Logprob | None] = field(default_factory=list)
    #: With the option `logprobs`: the bytes of each token.
    pieces: list[bytes] = field(default_factory=list)
    #: With the reason "stop": the stop string that ended it, if one did.
    stop: str = ""
    #: The calls in it, if the request had tools.
    tool_calls: list[CalledTool] = field(default_factory=list)
    #: A fake engine made its words up. False as well if the broker did not report which model it was.
    fake: bool = False

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message, to add to the conversation."""
        if not self.tool_calls:
            return {"role": "assistant", "content": self.text}
        content, _ = split_calls(self.text, self.id)
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.tool_calls
        ]
        return {"role": "assistant", "content": content, "tool_calls": calls}


class _Buffer:
    """Tokens that have arrived and have not been read yet."""

    def __init__(self, tokens: int = BUFFER_TOKENS, size: int = BUFFER_BYTES) -> None:
        self.limits = tokens, size
        self.ids: list[int] = []
        self.pieces: list[bytes] = []
        self.logprobs: list[Logprob | None] = []
        self.size = 0

    @property
    def full(self) -> bool:
        return len(self.pieces) >= self.limits[0] or self.size >= self.limits[1]

    def add(self, ids: list[int], pieces: list[bytes], logprobs: Sequence[Logprob | None]) -> None:
        self.ids += ids
        self.pieces += pieces
        self.size += sum(map(len, pieces))
        if logprobs:
            self.logprobs += logprobs
            self.size += TOP_TOKEN_BYTES * sum(1 + len(each.top) for each in logprobs if each is not None)


class _Transcript:
    """Everything that has been read, as tokens and as text. `tools`: the text may have calls."""

    def __init__(self, tools: bool) -> None:
        self._tools = tools
        #: Its words are made up.
        self.fake = False
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
        """The rest of the text: an incomplete character is replaced."""
        rest = self._decoder.decode(b"", final=True)
        self._texts.append(rest)
        return rest

    def answer(self, end: m.End) -> Answer:
        text, id = "".join(self._texts), end.id.hex()
        return Answer(
            text=text, ids=self.ids, reason=end.reason, usage=end.usage, worker=end.worker, moves=end.moves, id=id,
            queued_ms=end.queued_ms, logprobs=self.logprobs, pieces=self.pieces, stop=end.stop,
            tool_calls=split_calls(text, id)[1] if self._tools else [], fake=self.fake,
        )  # fmt: skip


class Stream:
    """An answer as it arrives. Iterate it; leaving the loop early cancels the request.

    If it is not iterated to its end, close it with `async with` or `aclose`. Closing a stream of `attach` stops
    following the request, and does not cancel it.
    """

    def __init__(self, id: bytes, handle: Callable[[e.Event], None], *, mine: bool, tools: bool = False) -> None:
        #: The id of the request, for `attach`, `cancel` and `why`.
        self.id: str = id.hex()
        #: How many requests wait before it; None until the broker has accepted it.
        self.ahead: int | None = None
        #: The model that answers; empty until the broker has accepted the request.
        self.model: str = ""
        #: The whole answer, once its end has been read.
        self.answer: Answer | None = None
        #: Why it waits, if there is more to say than its place: "loading qwen3 on box2, 41 %". Empty if there is not.
        self.note: str = ""
        #: A function of yours, called when `ahead` or `note` has changed. It must not block.
        self.on_place: Callable[[], None] | None = None
        self._key = id
        self._handle = handle
        self._mine = mine
        self._buffer = _Buffer()
        self._read = _Transcript(tools)
        self._behind = False
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
        """What has arrived since the last call; waits if that is nothing. None after the end, then `answer` is there.

        Raises the error that ended the request, after the last piece.
        """
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
        """Read to the end, and return the whole answer, also what was read before."""
        while await self.next_piece() is not None:
            pass
        if self.answer is None:
            hint = "read a stream before its `with` block or its loop ends"
            raise LlamboError(Code.CANCELLED, f"the stream of request {self.id} was closed before its end", hint=hint)
        return self.answer

    async def cancel(self) -> None:
        """Stop the request. The stream then ends with the tokens it has and the reason `cancelled`."""
        if not self.over:
            self._handle(e.CancelAsked(self._key))

    async def aclose(self) -> None:
        """Stop reading. Cancels the request, unless this stream only follows it."""
        self._close(e.CancelAsked(self._key, drop=True) if self._mine else e.ReaderLeft(self._key))

    async def detach(self) -> None:
        """Stop reading. The broker cancels the request if no other client follows it, and it is not detached."""
        self._close(e.ReaderLeft(self._key))

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # --- what the client delivers ----------------------------------------------------------------------------------

    @property
    def fake(self) -> bool:
        """A fake engine makes its words up. Known at the latest when the first piece arrives."""
        return self._read.fake

    @property
    def over(self) -> bool:
        """True if nothing more will arrive. There may still be something to read."""
        return self._end is not None or self._error is not None

    def _deliver(self, ids: list[int], pieces: list[bytes], logprobs: Sequence[Logprob | None]) -> None:
        if self._closed:
            return
        self._buffer.add(ids, pieces, logprobs)
        if self._buffer.full and not self._behind:
            self._behind = True
            self._handle(e.ReaderBehind(self._key, self._buffer.limits[0]))
        self._wake()

    def _set_place(self, ahead: int, model: str, *, fake: bool) -> None:
        self.ahead, self.model, self._read.fake = ahead, model or self.model, fake
        if self.on_place is not None:
            self.on_place()

    def _set_note(self, note: str) -> None:
        self.note = printable(note)
        if self.on_place is not None:
            self.on_place()

    def _set_end(self, end: m.End) -> None:
        self._end, self.note = end, ""
        self._wake()

    def _set_error(self, error: LlamboError) -> None:
        self._error = error
        self._wake()

    # --- inside --------------------------------------------------------------------------------------------------

    def _close(self, event: e.Event) -> None:
        if not self.over and not self._closed:
            self._handle(event)
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self) -> Piece:
        buffer, self._buffer = self._buffer, _Buffer(*self._buffer.limits)
        piece = self._read.read(buffer)
        if self._behind:
            self._behind = False
            self._handle(e.ReaderCaughtUp(self._key))
        return piece

    def _finish(self, end: m.End) -> Piece | None:
        """The end has been read. It returns a piece if the text ends with an incomplete character."""
        read = self._read
        rest = read.finish()
        self.answer = read.answer(end)
        if end.reason == "error" and end.error is not None:
            self._error = LlamboError.of(end.error)
            raise self._error
        return Piece(rest, [], len(read.ids)) if rest else None


def limit_buffer(stream: Stream, tokens: int, size: int) -> None:
    """For a reader with memory of its own, which reads the stream at once or not at all."""
    stream._buffer.limits = tokens, size


# --- all callers of one client -------------------------------------------------------------------------------

#: Submitted requests that a client stores.
SUBMITTED, SUBMITTED_BYTES = 1_000, 16 * 2**20


class RequestReader(Protocol):
    """The receiver of what arrives for a request: a stream, or the collector of a result."""

    def _deliver(self, ids: list[int], pieces: list[bytes], logprobs: Sequence[Logprob | None]) -> None: ...
    def _set_place(self, ahead: int, model: str, *, fake: bool) -> None: ...
    def _set_note(self, note: str) -> None: ...
    def _set_end(self, end: m.End) -> None: ...
    def _set_error(self, error: LlamboError) -> None: ...


class Waiters:
    """Callers that wait for this client: streams, submits, cancels and queries."""

    def __init__(self, error_of: Callable[[ErrorInfo], LlamboError]) -> None:
        self.streams: dict[bytes, RequestReader] = {}
        #: Callers that do not read a request: submits wait until it is accepted, cancels until it has ended.
        self.submits: dict[bytes, asyncio.Future[None]] = {}
        self.cancels: dict[bytes, asyncio.Future[m.End]] = {}
        self.questions: dict[int, asyncio.Future[bytes]] = {}
        #: Requests that were submitted without a stream, in case this client attaches to one. The oldest are removed.
        self.submitted: OrderedDict[bytes, tuple[m.InferenceRequest, bytes]] = OrderedDict()
        self._submitted_bytes = 0
        self._error_of = error_of

    def remember(self, request: m.InferenceRequest, prompt: bytes) -> None:
        self.submitted[request.id] = request, prompt
        self._submitted_bytes += len(prompt)
        while len(self.submitted) > SUBMITTED or self._submitted_bytes > SUBMITTED_BYTES:
            _, (_, oldest) = self.submitted.popitem(last=False)
            self._submitted_bytes -= len(oldest)

    def deliver(self, delivery: e.Delivery) -> None:
        match delivery:
            case e.DeliverTokens(id, ids, pieces, logprobs):
                if (stream := self.streams.get(id)) is not None:
                    stream._deliver(ids, pieces, logprobs)
            case e.ReportPlace(id, ahead, model, fake):
                if (stream := self.streams.get(id)) is not None:
                    stream._set_place(ahead, model, fake=fake)
                resolve(self.submits.get(id), None)
            case e.ReportNote(id, note):
                if (stream := self.streams.get(id)) is not None:
                    stream._set_note(note)
            case e.ReportEnd(id, end):
                if (stream := self.streams.pop(id, None)) is not None:
                    stream._set_end(end)
                resolve(self.submits.get(id), None)
                resolve(self.cancels.pop(id, None), end)
            case e.ReportFailure(key, info):
                self.fail(key, self._error_of(info))
            case e.DeliverResult(query, data):
                resolve(self.questions.get(query), data)

    def fail(self, key: bytes | int, error: LlamboError) -> None:
        if isinstance(key, int):
            reject(self.questions.get(key), error)
            return
        if (stream := self.streams.pop(key, None)) is not None:
            stream._set_error(error)
        reject(self.submits.get(key), error)
        reject(self.cancels.pop(key, None), error)

    def fail_all(self, error: LlamboError) -> None:
        for id in {*self.streams, *self.submits, *self.cancels}:
            self.fail(id, error)
        for query in list(self.questions):
            self.fail(query, error)


def resolve(future: asyncio.Future[T] | None, value: T) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def reject(future: asyncio.Future[T] | None, error: LlamboError) -> None:
    if future is not None and not future.done():
        future.set_exception(error)
