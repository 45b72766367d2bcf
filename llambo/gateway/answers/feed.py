"""Answers on their way, apart from the connections that read them.

A feed reads the streams of one HTTP request and stores their tokens; connections read from the feed. When a connection
breaks, the feed goes on for `resume_ms`, so that its reader can come back with `Last-Event-ID` and miss nothing; after
that it is cancelled. A feed stores tokens, not events. Each reader makes events of them, from the first token on: the
same tokens make the same events, so a reader that comes back is given those after the last one it has seen.

What readers have not taken yet is bounded over all feeds. Beyond that a feed whose readers are behind leaves its tokens
in the mesh, until they have caught up (`unread`).

Rendering (rendering.py) makes events of the tokens, and gives each an id, which `Last-Event-ID` brings back.

Another gateway takes a feed over. It has the body of the request again and makes the same requests of it: their ids
follow from that of the feed, their seeds from the ids. It submits them as a client does that comes from another broker,
but without the tokens, which only the first gateway had. It gets them from the broker that has the request, or from the
worker; or they are made again. In the last case, and if the answer had moved meanwhile, they may differ from those that
the reader was given. So the checksum is compared before the reader is given more.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llambo.gateway.access import Caller
from llambo.gateway.answers.api import AnswerHead, Submission
from llambo.gateway.answers.api_errors import FieldError, as_llambo_error
from llambo.gateway.answers.unread import Lead, Unread
from llambo.mesh.client.answer_stream import Answer, Piece, Stream, limit_buffer
from llambo.mesh.client.request_options import Options
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.reports import waiting
from llambo.mesh.wire.tokens import Logprob

log = logging.getLogger(__name__)

#: How long a finished feed is stored for a reader whose connection broke at the very end, and how many of them.
FINISHED_S = 30.0
FINISHED_FEEDS = 1_000
#: Approximate bytes that finished feeds may hold together, and that one feed may hold before it is ended.
FINISHED_BYTES, FEED_BYTES = 64 * 1024 * 1024, 128 * 1024 * 1024
#: What is counted for a token beside its bytes, here and in the client, and for each log probability.
_TOKEN_BYTES, _LOGPROB_BYTES = 300, 160
#: How far its streams are ahead of a feed that waits for its readers.
STREAM_TOKENS, STREAM_BYTES = 256, 256 * 1024
#: Characters of the prompts of one HTTP request, each counted as often as it is submitted.
SUBMITTED_CHARS = 32 * 1024 * 1024
#: Choices of one HTTP request, over all of its prompts.
CHOICES = 128
#: Tasks that close streams; asyncio itself references tasks only weakly.
_CLOSING: set[asyncio.Task[None]] = set()
_ID = re.compile(r"([0-9a-f]{32})-([0-9a-f]{1,10})-(\d{1,9}(?:\.\d{1,9}){0,128})(?:-([0-9a-f]{8}))?")
INTERRUPTED = "the answer was interrupted and cannot be continued; send the request again without Last-Event-ID"
#: Codes of the mesh that mean this. To a caller over HTTP another try is a new request, which may succeed.
_LOST = (Code.EXPIRED, Code.UNKNOWN_REQUEST)


@dataclass(frozen=True, slots=True)
class Arrival:
    """How a request came in, for its trace."""

    name: str
    route: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Place:
    """How far a reader has come, as an event id says it.

    `seen` is the number of events. If there are several choices, it is first the number of those that belong to no
    choice, and then that of each choice, because choices overtake each other. `checksum`: None in an id of an older
    gateway.
    """

    feed: str
    created: int
    seen: tuple[int, ...] = ()
    checksum: int | None = None


def parse_event_id(last_event_id: str) -> Place:
    found = _ID.fullmatch(last_event_id.strip())
    if found is None:
        raise FieldError("Last-Event-ID", f"{last_event_id[:80]!r} is not an event id of this gateway")
    checksum = int(found[4], 16) if found[4] else None
    return Place(found[1], int(found[2], 16), tuple(map(int, found[3].split("."))), checksum)


class Observer:
    """Is called at the steps of a feed's life. Metrics and traces derive from it."""

    def began(self, feed: Feed, arrival: Arrival | None) -> None:
        """`arrival` is None for a feed that attaches to a request begun elsewhere."""

    def first_token(self, feed: Feed) -> None:
        pass

    def ended(self, feed: Feed) -> None:
        pass

    def resumed(self) -> None:
        pass

    def disconnected(self) -> None:
        """A client closed its connection before its answer was complete."""


@dataclass(slots=True)
class FeedTokens:
    """The tokens of all choices in the order in which they came."""

    #: None: the choice is complete.
    pieces: list[bytes | None] = field(default_factory=list)
    ids: array[int] = field(default_factory=lambda: array("q"))
    choices: array[int] = field(default_factory=lambda: array("B"))
    #: By position.
    logprobs: dict[int, Logprob] = field(default_factory=dict)
    #: Approximate size of all of this.
    bytes: int = 0

    def extend(self, choice: int, piece: Piece) -> None:
        for at, logprob in enumerate(piece.logprobs, len(self.pieces)):
            if logprob is not None:
                self.logprobs[at] = logprob
                self.bytes += _LOGPROB_BYTES * (1 + len(logprob.top))
        self.bytes += sum(map(len, piece.pieces)) + _TOKEN_BYTES * len(piece.ids)
        self.pieces += piece.pieces
        self.ids.extend(piece.ids)
        self.choices.extend([choice] * len(piece.ids))

    def complete(self, choice: int) -> None:
        self.pieces.append(None)
        self.ids.append(-1)
        self.choices.append(choice)


class Feed:
    """One HTTP request of one caller: an answer, or several choices of it."""

    def __init__(
        self, caller: Caller, streams: list[Stream], observers: Sequence[Observer], unread: Unread, *, model: str,
        digest: bytes, created: int,
    ) -> None:  # fmt: skip
        """`streams` were just submitted: the loop has not run since."""
        self.caller, self.digest, self.created = caller, digest, created
        self.tokens = FeedTokens()
        self.answers: dict[int, Answer] = {}
        self.error: LlamboError | None = None
        self.over = False
        self._requested_model = model
        self._streams, self._observers = streams, observers
        self._wakers: dict[object, Callable[[], None]] = {}
        self.lead = Lead(unread)
        caller.open += 1
        for stream in streams:
            stream.on_place = self._wake
            limit_buffer(stream, STREAM_TOKENS, STREAM_BYTES)
        self._tasks = [asyncio.create_task(self._read(choice, stream)) for choice, stream in enumerate(streams)]

    @property
    def id(self) -> str:
        return self._streams[0].id

    @property
    def accepted_model(self) -> str:
        """The name in the mesh, once the mesh has accepted the request; else empty."""
        return self._streams[0].model

    @property
    def requests(self) -> list[str]:
        """Their ids in the mesh, by choice."""
        return [stream.id for stream in self._streams]

    @property
    def head(self) -> AnswerHead:
        return AnswerHead(self.id, self.created, self.accepted_model or self._requested_model)

    @property
    def ahead(self) -> int | None:
        """How many requests wait before it; None: the mesh has not accepted it yet."""
        places = [stream.ahead for stream in self._streams]
        return None if None in places else max([place for place in places if place is not None], default=0)

    @property
    def note(self) -> str:
        """What it waits for, if there is more to say than its place."""
        note = next((stream.note for stream in self._streams if stream.note), "")
        return waiting(note) if note else ""

    @property
    def waits(self) -> str:
        """What it waits for, as a sentence; empty: it has begun, or the mesh has not accepted it yet."""
        ahead = self.ahead
        if self.begun or ahead is None:
            return ""
        return self.note or (f"waiting, {ahead} before you" if ahead else "waiting, you are next")

    @property
    def fake(self) -> bool:
        """A fake engine makes it up. Known when it has begun."""
        return any(stream.fake for stream in self._streams)

    @property
    def begun(self) -> bool:
        return bool(self.tokens.pieces) or self.over

    @property
    def failed_for_now(self) -> bool:
        """Another try may give the rest, and no connection waits for the error."""
        return self.error is not None and self.error.retryable and not self._wakers

    @property
    def failed_before_begin(self) -> LlamboError | None:
        return self.error if not self.tokens.pieces else None

    def all_answers(self) -> list[Answer]:
        return [self.answers[choice] for choice in sorted(self.answers)]

    # Reading from the mesh.

    async def _read(self, choice: int, stream: Stream) -> None:
        try:
            while (piece := await stream.next_piece()) is not None:
                if not self.tokens.pieces:
                    for observer in self._observers:
                        observer.first_token(self)
                self.tokens.extend(choice, piece)
                if self.tokens.bytes > FEED_BYTES:
                    raise LlamboError(Code.OVER_LIMIT, "the answer is larger than a gateway stores; ask for less")
                self._wake()
                self.lead.grew(len(self.tokens.pieces), self.tokens.bytes)
                await self.lead.wait()
            assert stream.answer is not None, "it was read to its end"
            if stream.answer.reason == "cancelled":
                # No API has a reason for this; "length" would make it look whole.
                raise LlamboError(Code.CANCELLED, f"request {stream.id} was cancelled")
            self.answers[choice] = stream.answer
            self.tokens.complete(choice)
            if len(self.answers) == len(self._streams):
                self._finish(None)
            else:
                self._wake()
        except LlamboError as error:
            if error.code in _LOST:
                log.info("request %s cannot be continued: %s", stream.id, error.text)
                error = LlamboError(Code.CANCELLED, INTERRUPTED)
            self._finish(error)
        except Exception as error:
            log.exception("request %s failed in the gateway", stream.id)
            self._finish(as_llambo_error(error))

    def _finish(self, error: LlamboError | None) -> None:
        if self.over:
            return
        self.over, self.error = True, error
        self.caller.open -= 1
        for observer in self._observers:
            observer.ended(self)
        if error is not None:
            self._close_streams()
        self._wake()

    def _close_streams(self) -> None:
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        for stream in self._streams:
            # Not cancelled: another gateway may have taken it over. Without a follower the broker cancels it.
            closing = asyncio.get_running_loop().create_task(stream.detach())
            _CLOSING.add(closing)
            closing.add_done_callback(_CLOSING.discard)

    def cancel(self, why: str) -> None:
        if not self.over:
            self._finish(LlamboError(Code.CANCELLED, why))

    # Connections that read it.

    @property
    def readers(self) -> int:
        return len(self._wakers)

    def watch(self, reader: object, wake: Callable[[], None]) -> None:
        self._wakers[reader] = wake

    def unwatch(self, reader: object) -> None:
        del self._wakers[reader]

    def _wake(self) -> None:
        for wake in list(self._wakers.values()):
            wake()


class Feeds:
    """All feeds: those that run, and for a while those that have ended."""

    def __init__(self, resume_ms: int, observers: Sequence[Observer], unread: Unread) -> None:
        self.unread = unread
        #: Traces are added when the process starts.
        self.observers = list(observers)
        self._resume_s = resume_ms / 1_000
        self._by_id: dict[str, Feed] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return sum(not feed.over for feed in self._by_id.values())

    async def begin(self, caller: Caller, submission: Submission, arrival: Arrival, digest: bytes = b"") -> Feed:
        """Submit it. Whether the mesh accepts it is learned from the feed."""
        client, prompts = await caller.client(), prompts_of(submission, secrets.token_hex(limits.REQUEST_ID_BYTES))
        streams = [client.stream(prompt, **options) for prompt, options in prompts]
        model = str(submission.options.get("model") or "")
        return self._add(caller, streams, arrival, model=model, digest=digest, created=int(time.time()))

    def _add(
        self, caller: Caller, streams: list[Stream], arrival: Arrival | None, *, model: str, digest: bytes, created: int
    ) -> Feed:
        feed = Feed(caller, streams, self.observers, self.unread, model=model, digest=digest, created=created)
        self._by_id[feed.id] = feed
        for observer in self.observers:
            observer.began(feed, arrival)
        return feed

    async def resume(self, caller: Caller, place: Place, submission: Submission, digest: bytes) -> Feed:
        """The feed that was begun earlier: here, at another gateway, or at this one before it was restarted."""
        id = place.feed
        feed = self._by_id.get(id)
        count = submission.choices * (1 + len(submission.more))
        if len(place.seen) != (1 + count if count > 1 else 1):
            raise FieldError("Last-Event-ID", "belongs to a stream with another number of answers")
        if feed is not None and feed.caller.name == caller.name and feed.failed_for_now:
            self._forget(feed)
            feed = None
        if feed is None:
            prompts = prompts_of(submission, id, place.created)
            client = await caller.client_with([str(options.get("id")) for _, options in prompts])
            if id in self._by_id:  # two readers came back at once, and this is the second
                return await self.resume(caller, place, submission, digest)
            if place.checksum is None:
                raise LlamboError(Code.CANCELLED, INTERRUPTED)
            streams = [client.resume(prompt, **options) for prompt, options in prompts]
            model = str(submission.options.get("model") or "")
            feed = self._add(caller, streams, None, model=model, digest=digest, created=place.created)
        elif feed.caller.name != caller.name:
            raise LlamboError(Code.UNKNOWN_REQUEST, f"no request {id} is known here")
        elif feed.digest != digest:
            raise LlamboError(Code.BAD_REQUEST, "Last-Event-ID belongs to a stream of another request body")
        self._stop_timer(feed)
        for observer in self.observers:
            observer.resumed()
        return feed

    def disconnected(self) -> None:
        for observer in self.observers:
            observer.disconnected()

    def reader_left(self, feed: Feed, *, finished: bool) -> None:
        """A connection no longer reads it. `finished`: the connection was given all of it."""
        if feed.readers or feed.id not in self._by_id:
            return
        loop = asyncio.get_running_loop()
        if finished or feed.over:
            self._timers[feed.id] = loop.call_later(FINISHED_S, self._forget, feed)
            over = [each for each in self._by_id.values() if each.over and not each.readers]
            left, stored = len(over), sum(each.tokens.bytes for each in over)
            for each in over:
                if left <= FINISHED_FEEDS and stored <= FINISHED_BYTES:
                    break
                self._forget(each)
                left, stored = left - 1, stored - each.tokens.bytes
        else:
            self._timers[feed.id] = loop.call_later(self._resume_s, self.drop, feed, "the client did not come back")

    def drop(self, feed: Feed, why: str) -> None:
        feed.cancel(why)
        self._forget(feed)

    def close(self) -> None:
        for feed in list(self._by_id.values()):
            self.drop(feed, "the gateway is stopping")

    def _stop_timer(self, feed: Feed) -> None:
        timer = self._timers.pop(feed.id, None)
        if timer is not None:
            timer.cancel()

    def _forget(self, feed: Feed) -> None:
        self._stop_timer(feed)
        self._by_id.pop(feed.id, None)
        feed.lead.end()


def prompts_of(submission: Submission, id: str, created: int = 0) -> list[tuple[str, Options]]:
    """Each choice of each prompt, as it is submitted. A seed is counted up, so that choices differ and are repeatable.

    The id of the first request is that of the feed. `created`: when it was, if it was not just now.
    """
    prompts = (submission.prompt, *submission.more)
    choices = submission.choices
    if len(prompts) * choices > CHOICES:
        text = f"{len(prompts) * choices} answers were requested; at most {CHOICES} are allowed"
        raise LlamboError(Code.BAD_REQUEST, text)
    if sum(map(len, prompts)) * choices > SUBMITTED_CHARS:
        raise LlamboError(Code.BAD_REQUEST, f"the prompt is too long for {choices} answers at once")
    seed, deadline_ms = submission.options.get("seed"), submission.options.get("deadline_ms")
    found = []
    for number in range(len(prompts) * choices):
        options = submission.options.copy()
        options["id"] = id if not number else _digest(b"%s %d" % (id.encode(), number), limits.REQUEST_ID_BYTES).hex()
        if seed is not None:
            options["seed"] = (seed + number % choices) % 2**63
        if deadline_ms and created:
            options["deadline_ms"] = max(1, deadline_ms - max(0, int(time.time()) - created) * 1_000)
        found.append((prompts[number // choices], options))
    return found


def _digest(data: bytes, size: int) -> bytes:
    return hashlib.blake2b(data, digest_size=size).digest()
