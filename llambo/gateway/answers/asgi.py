"""ASGI applications that send an answer: as a stream of events, or whole.

Both notice when their client closes the connection. A stream then goes on for a moment (see `feed`); a whole answer is
cancelled at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.types import Receive, Scope, Send

from llambo.gateway.answers.api import Renderer, WholeBody, encode
from llambo.gateway.answers.api_errors import error_reply, shape_of
from llambo.gateway.answers.feed import Feed, Feeds, Place
from llambo.gateway.answers.rendering import Rendering, comment
from llambo.mesh.wire.errors import LlamboError

T = TypeVar("T")
Connection = ASGIConnection[Any, Any, Any, Any]
HttpRequest = Request[Any, Any, Any]

#: An answer that begins or fails within this time has a status of its own; after it the stream begins with comments.
HOLD_S = 1.0
#: A comment is sent after this silence, so that proxies do not close the connection.
QUIET_S = 15.0
#: What a client waits for is not sent more often.
SAY_S = 1.0
#: The key of the ASGI scope for the code of the error that a request was answered with.
CODE_KEY = "llambo.code"
#: Of an answer that no model made.
FAKE_HEADER = (b"x-llambo-engine", b"fake")
_FAKE = {name.decode(): value.decode() for name, value in [FAKE_HEADER]}
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]


class Disconnected(Exception):
    """The client has closed its connection."""


class _Reader:
    """A connection that reads a feed to its end."""

    def __init__(self, feeds: Feeds, feed: Feed, renderer: Renderer, place: Place | None = None) -> None:
        self._feeds, self._feed = feeds, feed
        self._rendering = Rendering(feed, renderer, place)
        self._news = asyncio.Event()
        self._disconnected = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        feed = self._feed
        feed.watch(self, self._news.set)
        listener = asyncio.create_task(self._listen(receive))
        try:
            await self._serve(scope, send)
        except (Disconnected, OSError):  # uvicorn raises an OSError when the other end is gone
            self._feeds.disconnected()
        finally:
            listener.cancel()
            feed.unwatch(self)
            self._leave(scope)

    async def _serve(self, scope: Scope, send: Send) -> None:
        raise NotImplementedError

    def _leave(self, scope: Scope) -> None:
        raise NotImplementedError

    async def _listen(self, receive: Receive) -> None:
        await disconnect(receive)
        self._disconnected = True
        self._news.set()

    async def _wait(self) -> None:
        await self._news.wait()
        self._news.clear()
        self._check_connection()

    async def _give_way(self) -> None:
        """Between two parts of a long answer: others have to be served, too."""
        await asyncio.sleep(0)
        self._check_connection()

    def _check_connection(self) -> None:
        if self._disconnected:
            raise Disconnected


class Streaming(_Reader):
    """A feed as events. Errors before the first token have a status of their own; later ones are events."""

    def __init__(self, feeds: Feeds, feed: Feed, renderer: Renderer, place: Place | None = None) -> None:
        super().__init__(feeds, feed, renderer, place)
        self._resumed = place is not None
        #: What its client has been sent last about what it waits for, and when it is sent more.
        self._said, self._say_at = "", 0.0

    async def _serve(self, scope: Scope, send: Send) -> None:
        await self._hold()
        if (error := self._feed.failed_before_begin) is not None:
            await reply_error(send, error, scope)
        else:
            await self._stream(send)

    def _leave(self, scope: Scope) -> None:
        finished = self._rendering.finished
        if (error := self._rendering.error) is not None and finished:
            scope[CODE_KEY] = error.code.value  # type: ignore[literal-required]
        self._feeds.reader_left(self._feed, finished=finished and not self._disconnected)

    async def _hold(self) -> None:
        """Until there is something to send, or for a moment. A resumed stream has no comments about its place."""
        with suppress(TimeoutError):
            async with asyncio.timeout(None if self._resumed else HOLD_S):
                while not self._feed.begun:
                    await self._wait()

    async def _stream(self, send: Send) -> None:
        headers = [*_STREAM_HEADERS, *([FAKE_HEADER] if self._feed.fake else [])]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        rendering = self._rendering
        while True:
            # Cleared before looking: what comes while we send wakes us again.
            self._news.clear()
            body = rendering.server_sent_events() or self._waits()
            if body or rendering.finished:
                await send({"type": "http.response.body", "body": body, "more_body": not rendering.finished})
            if rendering.finished:
                return
            if rendering.behind:
                await self._give_way()
                continue
            try:
                async with asyncio.timeout(self._quiet_s()):
                    await self._news.wait()
            except TimeoutError:
                body = self._waits() or comment("still here")
                await send({"type": "http.response.body", "body": body, "more_body": True})
            self._check_connection()

    def _waits(self) -> bytes:
        """A comment each time that what it waits for has changed, but not more often than every `SAY_S`."""
        waits, now = self._feed.waits, asyncio.get_running_loop().time()
        if waits in ("", self._said) or now < self._say_at:
            return b""
        self._said, self._say_at = waits, now + SAY_S
        return comment(waits)

    def _quiet_s(self) -> float:
        """How long it may be silent."""
        if self._feed.waits in ("", self._said):
            return QUIET_S
        return max(0.0, self._say_at - asyncio.get_running_loop().time())


class Whole(_Reader):
    """A feed as one body, once it is complete."""

    async def _serve(self, scope: Scope, send: Send) -> None:
        while not self._rendering.finished:
            self._rendering.events()  # not sent: the renderer remembers what they add up to
            if self._rendering.behind:
                await self._give_way()
            elif not self._rendering.finished:
                await self._wait()
        if self._feed.error is not None:
            await reply_error(send, self._feed.error, scope)
        else:
            await reply(send, 200, encode(self._rendering.body()), _FAKE if self._feed.fake else None)

    def _leave(self, scope: Scope) -> None:
        self._feeds.drop(self._feed, "the client closed its connection")


class Later:
    """Work whose result is the body: embeddings, scores, counts. Cancelled when the client closes its connection."""

    def __init__(self, work: Coroutine[Any, Any, WholeBody]) -> None:
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            content, fake = await unless_disconnected(self._work, receive)
            body = encode(content)
        except Disconnected:
            return
        except LlamboError as error:
            await reply_error(send, error, scope)
            return
        await reply(send, 200, body, _FAKE if fake else None)


async def unless_disconnected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of the work. Raises Disconnected, and cancels the work, when the client closes its connection."""
    task, listener = asyncio.ensure_future(work), asyncio.ensure_future(disconnect(receive))
    try:
        await asyncio.wait([task, listener], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected
    finally:
        listener.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, LlamboError):
                await task


async def disconnect(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def reply(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    lines = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), value.encode()) for name, value in (headers or {}).items()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def reply_error(send: Send, error: LlamboError, scope: Scope) -> None:
    """In the shape of the API that was used; the code is left in the scope for the log and the metrics."""
    found = error_reply(error, shape_of(scope["path"]))
    scope[CODE_KEY] = error.code.value  # type: ignore[literal-required]
    await reply(send, found.status, found.body, found.headers)
