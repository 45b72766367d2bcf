"""Answers on their way, apart from the connections that read them.

A stream belongs to its feed, and a connection reads from one. When the connection breaks the feed goes on for
`resume_ms`, so that its reader may come back with `Last-Event-ID` and miss nothing; then it is cancelled. A feed keeps
its tokens as they came. Whoever reads makes events of them, from the first one on: the same tokens make the same
events, so a reader that comes back is given those after the last one it saw.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Callable, Iterator, Mapping

from llambo.gateway.access import Caller
from llambo.gateway.answers.asking import About, Ask
from llambo.gateway.answers.problems import of_exception
from llambo.gateway.observe.telemetry import Telemetry
from llambo.gateway.observe.tracing import Traces
from llambo.mesh.client.answer_stream import Answer, Stream
from llambo.mesh.client.client import Client
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.tokens import Logprob

log = logging.getLogger(__name__)

#: How long a finished feed is kept for a reader whose connection broke at the very end, and how many of them.
KEPT_S = 30.0
KEPT_FEEDS = 1_000
#: What those may hold together, and what one may hold before it is ended; about.
KEPT_BYTES, FEED_BYTES = 64 * 1024 * 1024, 128 * 1024 * 1024
#: What is counted for a token beside its bytes, and for each log probability.
_TOKEN_BYTES, _LOGPROB_BYTES = 64, 160
#: Prompts of one request, each as often as it is submitted.
SUBMITTED_CHARS = 32 * 1024 * 1024
#: Choices of one request, over all of its prompts.
CHOICES = 128


class Feed:
    """One request of one caller: an answer, or several choices of it."""

    def __init__(self, caller: Caller, model: str, digest: bytes, created: int, telemetry: Telemetry) -> None:
        self.caller, self.digest = caller, digest
        #: It was begun by somebody else, or in another life of this gateway.
        self.resumed = False
        #: How many of its tokens are counted.
        self.counted = 0
        #: Asked when it is over.
        self.on_over: Callable[[Feed], None] | None = None
        self._telemetry = telemetry
        self.id, self.created = "", created
        #: The tokens of all choices as they came. None: this choice is complete.
        self.pieces: list[bytes | None] = []
        self.ids = array("q")
        self.choices = array("B")
        self.logprobs: dict[int, Logprob] = {}
        self.answers: dict[int, Answer] = {}
        self.error: LlamboError | None = None
        self.over = False
        #: About what it holds.
        self.bytes = 0
        #: Connections that read it.
        self.readers = 0
        self.began_at = telemetry.clock()
        self._asked_model = model
        self._streams: list[Stream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._wakers: dict[object, Callable[[], None]] = {}

    @property
    def accepted_model(self) -> str:
        """As the mesh calls it, once it has accepted this."""
        return self._streams[0].model if self._streams else ""

    @property
    def requests(self) -> list[str]:
        """Their ids in the mesh, by choice."""
        return [stream.id for stream in self._streams]

    @property
    def about(self) -> About:
        return About(self.id, self.created, self.accepted_model or self._asked_model)

    @property
    def ahead(self) -> int | None:
        """How many wait before it; None: the mesh has not answered yet."""
        places = [stream.ahead for stream in self._streams]
        return None if None in places else max([place for place in places if place is not None], default=0)

    @property
    def begun(self) -> bool:
        return bool(self.pieces) or self.over

    def all_answers(self) -> list[Answer]:
        return [self.answers[choice] for choice in sorted(self.answers)]

    # --- running -----------------------------------------------------------------------------------------------

    def run(self, streams: list[Stream]) -> None:
        """Read these; the loop has not turned yet since they were submitted."""
        self._streams = streams
        self.id = streams[0].id
        self.caller.open += 1
        for choice, stream in enumerate(streams):
            stream.on_place = self._wake
            self._tasks.append(asyncio.create_task(self._read(choice, stream)))

    async def _read(self, choice: int, stream: Stream) -> None:
        try:
            while (piece := await stream.next_piece()) is not None:
                if not self.pieces:
                    self._telemetry.heard(self)
                for at, logprob in enumerate(piece.logprobs):
                    if logprob is not None:
                        self.logprobs[len(self.pieces) + at] = logprob
                        self.bytes += _LOGPROB_BYTES * (1 + len(logprob.top))
                self.bytes += sum(map(len, piece.pieces)) + _TOKEN_BYTES * len(piece.ids)
                self.pieces += piece.pieces
                self.ids.extend(piece.ids)
                self.choices.extend([choice] * len(piece.ids))
                if self.bytes > FEED_BYTES:
                    raise LlamboError(Code.OVER_LIMIT, "this is more than a gateway holds of one request; ask for less")
                self._wake()
            assert stream.answer is not None, "it was read to its end"
            self.answers[choice] = stream.answer
            self.pieces.append(None)
            self.ids.append(-1)
            self.choices.append(choice)
            if len(self.answers) == len(self._streams):
                self._finish(None)
            else:
                self._wake()
        except LlamboError as error:
            self._finish(error)
        except Exception as error:
            log.exception("request %s failed here", stream.id)
            self._finish(of_exception(error))

    def _finish(self, error: LlamboError | None) -> None:
        if self.over:
            return
        self.over, self.error = True, error
        self.caller.open -= 1
        self._telemetry.ended(self)
        if self.on_over is not None:
            self.on_over(self)
        if error is not None:
            self._let_go()
        self._wake()

    def _let_go(self) -> None:
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        for stream in self._streams:
            closing = asyncio.get_running_loop().create_task(stream.aclose())
            _CLOSING.add(closing)
            closing.add_done_callback(_CLOSING.discard)

    def cancel(self, why: str) -> None:
        """Nobody wants it any more."""
        if not self.over:
            self._finish(LlamboError(Code.CANCELLED, why))

    # --- reading -----------------------------------------------------------------------------------------------

    def watch(self, who: object, wake: Callable[[], None]) -> None:
        self._wakers[who] = wake
        self.readers += 1

    def unwatch(self, who: object) -> None:
        del self._wakers[who]
        self.readers -= 1

    def _wake(self) -> None:
        for wake in list(self._wakers.values()):
            wake()


class Feeds:
    """All of them: those that run, and for a while those that have ended."""

    def __init__(self, resume_ms: int, telemetry: Telemetry | None = None) -> None:
        self.telemetry = telemetry or Telemetry()
        #: Whoever wants to know what becomes of them.
        self.traces: Traces | None = None
        self._resume_s = resume_ms / 1_000
        self._by_id: dict[str, Feed] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def __iter__(self) -> Iterator[Feed]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return sum(not feed.over for feed in self._by_id.values())

    async def begin(self, caller: Caller, ask: Ask, digest: bytes = b"") -> Feed:
        """Submit it. What the mesh says to it comes with the feed."""
        client = await caller.client()
        feed = Feed(caller, str(ask.options.get("model") or ""), digest, int(time.time()), self.telemetry)
        feed.run(streams_of(client, ask))
        self._by_id[feed.id] = feed
        return feed

    def trace(self, feed: Feed, name: str, headers: Mapping[str, str], route: str) -> None:
        if self.traces is not None:
            self.traces.follow(feed, name, headers, {"http.route": route})

    async def resume(self, caller: Caller, id: str, created: int, digest: bytes) -> Feed:
        """The one that was begun earlier: here, or at another gateway, or at this one before it was restarted."""
        feed = self._by_id.get(id)
        if feed is None:
            client = await caller.client()
            try:
                stream = await client.attach(id)
            except LlamboError:
                if id in self._by_id:  # two came back at once, and this is the second
                    return await self.resume(caller, id, created, digest)
                raise
            feed = Feed(caller, "", digest, created, self.telemetry)
            feed.resumed = True
            feed.run([stream])
            self._by_id[id] = feed
        elif feed.caller.name != caller.name:
            raise LlamboError(Code.UNKNOWN_REQUEST, f"no request {id} is known here")
        elif feed.digest != digest:
            raise LlamboError(Code.BAD_REQUEST, "Last-Event-ID belongs to a stream of another request body")
        self._quiet(feed)
        self.telemetry.resumed()
        return feed

    def left(self, feed: Feed, *, finished: bool) -> None:
        """A connection reads it no more; `finished`: it has been given all of it."""
        if feed.readers or feed.id not in self._by_id:
            return
        loop, self_id = asyncio.get_running_loop(), feed.id
        if finished or feed.over:
            self._timers[self_id] = loop.call_later(KEPT_S, self._forget, feed)
            over = [each for each in self._by_id.values() if each.over and not each.readers]
            left, held = len(over), sum(each.bytes for each in over)
            for each in over:
                if left <= KEPT_FEEDS and held <= KEPT_BYTES:
                    break
                self._forget(each)
                left, held = left - 1, held - each.bytes
        else:
            self._timers[self_id] = loop.call_later(self._resume_s, self._given_up, feed)

    def drop(self, feed: Feed, why: str) -> None:
        feed.cancel(why)
        self._forget(feed)

    def close(self) -> None:
        for feed in list(self._by_id.values()):
            self.drop(feed, "the gateway stops")

    def _given_up(self, feed: Feed) -> None:
        self.drop(feed, "the client was gone for too long")

    def _quiet(self, feed: Feed) -> None:
        timer = self._timers.pop(feed.id, None)
        if timer is not None:
            timer.cancel()

    def _forget(self, feed: Feed) -> None:
        self._quiet(feed)
        self._by_id.pop(feed.id, None)


def streams_of(client: Client, ask: Ask) -> list[Stream]:
    """One for each choice of each prompt. A seed counts up, so that choices differ and still can be had again."""
    prompts = (ask.prompt, *ask.more)
    if len(prompts) * ask.choices > CHOICES:
        raise LlamboError(Code.BAD_REQUEST, f"{len(prompts) * ask.choices} answers are asked for, {CHOICES} may be")
    if sum(map(len, prompts)) * ask.choices > SUBMITTED_CHARS:
        text = f"so long a prompt may not be answered {ask.choices} times at once"
        raise LlamboError(Code.BAD_REQUEST, text)
    seed = ask.options.get("seed")
    streams = []
    for prompt in prompts:
        for choice in range(ask.choices):
            options = ask.options.copy()
            if seed is not None:
                options["seed"] = (seed + choice) % 2**63
            streams.append(client.stream(prompt, **options))
    return streams


#: Streams on their way out.
_CLOSING: set[asyncio.Task[None]] = set()
