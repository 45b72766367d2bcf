"""Replies as ASGI applications: an answer as a stream of events, or whole.

Both notice when their client hangs up. A stream then goes on for a moment (see `answers`), a whole answer is
cancelled at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from litestar.types import Receive, Scope, Send

from llambo.gateway.answers.asking import About, Renderer, encode
from llambo.gateway.answers.feed import Feed, Feeds
from llambo.gateway.answers.problems import shape_of, told
from llambo.gateway.answers.rendering import Rendering, comment, waiting
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.wire.errors import LlamboError

T = TypeVar("T")

#: An answer that begins, or fails, within this time is told by a status; one that waits longer is told it is waiting.
HOLD_S = 1.0
#: A comment goes out when nothing else has for so long, so that proxies keep the connection.
QUIET_S = 15.0
#: Where the code of the error is kept that a request was answered with.
CODE_KEY = "llambo.code"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]


class Gone(Exception):
    """The client has hung up."""


class Streaming:
    """A feed, as events. Errors before the first token have a status of their own; later ones are events."""

    def __init__(self, feeds: Feeds, feed: Feed, renderer: Renderer, skip: int = 0) -> None:
        self._feeds, self._feed = feeds, feed
        self._rendering = Rendering(feed, renderer, skip)
        self._skip = skip
        self._news = asyncio.Event()
        self._gone = False
        self._told_ahead: int | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        feed = self._feed
        feed.watch(self, self._news.set)
        listener = asyncio.create_task(self._listen(receive))
        try:
            await self._hold()
            if feed.error is not None and not feed.pieces:
                await reply(send, *_problem(feed.error, scope))
            else:
                await self._stream(send)
        except (Gone, OSError):  # uvicorn raises an OSError when the other end is gone
            self._feeds.telemetry.hung_up()
        finally:
            listener.cancel()
            feed.unwatch(self)
            if feed.error is not None and self._rendering.finished:
                scope[CODE_KEY] = feed.error.code.value  # type: ignore[literal-required]
            self._feeds.left(feed, finished=self._rendering.finished and not self._gone)

    async def _hold(self) -> None:
        """Until there is something to tell, or for a moment. Who comes back is not told that he waits: he did."""
        with suppress(TimeoutError):
            async with asyncio.timeout(None if self._skip else HOLD_S):
                while not self._feed.begun:
                    await self._wait()

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        rendering = self._rendering
        while True:
            # Cleared before the look: what comes while it is sent wakes us again.
            self._news.clear()
            body = rendering.pull() or self._place()
            if body or rendering.finished:
                await send({"type": "http.response.body", "body": body, "more_body": not rendering.finished})
            if rendering.finished:
                return
            if rendering.behind:
                await asyncio.sleep(0)  # others want to be told, too
                if self._hung_up():
                    raise Gone
                continue
            try:
                async with asyncio.timeout(QUIET_S):
                    await self._news.wait()
            except TimeoutError:
                await send({"type": "http.response.body", "body": comment("still here"), "more_body": True})
            if self._hung_up():
                raise Gone

    def _place(self) -> bytes:
        ahead = self._feed.ahead
        if self._feed.begun or ahead is None or ahead == self._told_ahead:
            return b""
        self._told_ahead = ahead
        return waiting(ahead)

    async def _wait(self) -> None:
        await self._news.wait()
        self._news.clear()
        if self._hung_up():
            raise Gone

    def _hung_up(self) -> bool:
        return self._gone

    async def _listen(self, receive: Receive) -> None:
        await hung_up(receive)
        self._gone = True
        self._news.set()


class Whole:
    """A feed, as one body when it is complete."""

    def __init__(self, feeds: Feeds, feed: Feed, whole: Callable[[About, list[Answer]], Any]) -> None:
        self._feeds, self._feed, self._whole = feeds, feed, whole
        self._over = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        feed = self._feed
        feed.watch(self, self._look)
        self._look()
        try:
            await unless_gone(self._over.wait(), receive)
            if feed.error is not None:
                await reply(send, *_problem(feed.error, scope))
            else:
                await reply(send, 200, encode(self._whole(feed.about, feed.all_answers())))
        except Gone:
            self._feeds.telemetry.hung_up()
        finally:
            feed.unwatch(self)
            self._feeds.drop(feed, "the client hung up")

    def _look(self) -> None:
        if self._feed.over:
            self._over.set()


class Later:
    """Whatever takes time and then has a body: embeddings, counts. Given up when the client hangs up."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = encode(await unless_gone(self._work, receive))
        except Gone:
            return
        except LlamboError as error:
            await reply(send, *_problem(error, scope))
            return
        await reply(send, 200, body)


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """What it comes to; it is cancelled, and `Gone` raised, when the client hangs up before."""
    task, listener = asyncio.ensure_future(work), asyncio.ensure_future(hung_up(receive))
    try:
        await asyncio.wait([task, listener], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        listener.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, LlamboError):
                await task


async def hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def reply(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    told = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), value.encode()) for name, value in (headers or {}).items()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": told})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _problem(error: LlamboError, scope: Scope) -> tuple[int, bytes, dict[str, str]]:
    said = told(error, shape_of(scope["path"]))
    scope[CODE_KEY] = error.code.value  # type: ignore[literal-required]
    return said.status, said.body, said.headers
