"""The routes of the dashboard: its page, the stream that the page shows, and its actions.

The page consists of the files in `static/` and loads nothing from elsewhere. The policy that `middleware` sends makes
the browser enforce that, so neither runs nor loads anything that was injected. Where there are keys, everything but
the files is for admins.

The queries are made once for all viewers. A `Watch` queries a broker several times a second, but only while it has
viewers; viewers of one identity share it. Nothing is queued for a viewer: it is sent what has changed since what it saw
last, and a viewer that was too slow to see every change is sent the whole picture when it is ready for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.handlers import BaseRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send
from msgspec import Meta

from llambo.gateway.access import Access, Caller
from llambo.gateway.answers.api import encode
from llambo.gateway.answers.api_errors import StatusError, status_of
from llambo.gateway.answers.asgi import Connection, Disconnected, HttpRequest, reply_error, unless_disconnected
from llambo.gateway.dashboard import watch_core
from llambo.gateway.dashboard.watch_core import Answers, Message, Picture
from llambo.gateway.middleware import CALLER_KEY
from llambo.mesh.client.client import Client
from llambo.mesh.service import clock
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError, printable
from llambo.mesh.wire.reports import DrainReply, HoldReply, RequestStory

log = logging.getLogger(__name__)

#: The time between the beginnings of two rounds of queries, and its limit where the answers take long.
ROUND_S, LONGEST_ROUND_S = 0.2, 0.8
#: The share of the time that is spent on queries, within that limit.
SHARE = 0.2
#: A round that takes longer has failed.
ROUND_TIMEOUT_S = 2.0
#: A comment is sent after this silence: a dead connection is noticed only by writing to it.
QUIET_S = 10.0
#: Viewers of one gateway.
VIEWERS = 64
STATIC = Path(__file__).resolve().parent / "static"
PAGE = "index.html"
TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
#: The browser asks each time, and gets a 304 without a body if nothing has changed.
CACHING = "no-cache"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
]
TokenOf = Callable[[Connection], str]
Name = Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]


class Watch:
    """The view of one identity. `connect` returns its client; `stopping()` is true when the gateway shuts down."""

    def __init__(self, connect: Callable[[], Awaitable[Client]], stopping: Callable[[], bool]) -> None:
        self._connect, self._stopping = connect, stopping
        self._picture = watch_core.EMPTY
        #: Counts the pictures; `_change` leads from the previous one to this one.
        self._version = 0
        self._change = b""
        self._whole = b""
        self._news = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._error: LlamboError | None = None
        self.viewers = 0

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events for one viewer."""
        seen = 0
        while True:
            if self._error is not None:
                raise self._error
            if self._version == seen:
                try:
                    async with asyncio.timeout(QUIET_S):
                        await self._wait_for_news(seen)
                except TimeoutError:
                    yield b": still here\n\n"
                continue
            event = self._change if seen and self._version == seen + 1 else self._whole_event()
            seen = self._version
            yield event

    @property
    def failed(self) -> bool:
        return self._error is not None

    async def _wait_for_news(self, seen: int) -> None:
        async with self._news:
            await self._news.wait_for(lambda: self._version != seen or self._error is not None)

    def _whole_event(self) -> bytes:
        if not self._whole:
            self._whole = _event(watch_core.whole(self._picture, clock.wall_ms()))
        return self._whole

    def begin(self) -> None:
        self.viewers += 1
        if self._task is None:
            self._task = asyncio.create_task(self._query_loop())

    async def end(self) -> None:
        self.viewers -= 1
        if not self.viewers and self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.wait([task])

    async def _query_loop(self) -> None:
        try:
            while not self._stopping():
                began = time.monotonic()
                await self._show(await self._next_picture())
                spent = time.monotonic() - began
                await asyncio.sleep(max(0.0, min(LONGEST_ROUND_S, max(ROUND_S, spent / SHARE)) - spent))
            await self._fail(LlamboError(Code.NO_BROKER, "the gateway is stopping"))
        except asyncio.CancelledError:
            raise
        except LlamboError as error:
            await self._fail(error)
        except Exception as error:
            log.exception("the queries of the dashboard failed")
            await self._fail(LlamboError(Code.INTERNAL, f"the gateway failed: {error!r}"))

    async def _next_picture(self) -> Picture:
        """What is known now. Raises LlamboError if the broker refuses, and will refuse again."""
        try:
            async with asyncio.timeout(ROUND_TIMEOUT_S):
                client = await self._connect()
                return await self._query(client)
        except TimeoutError:
            return replace(self._picture, problem=f"no broker has answered for {ROUND_TIMEOUT_S:.0f} s")
        except LlamboError as error:
            if not error.retryable:
                raise
            return replace(self._picture, problem=error.text)

    async def _query(self, client: Client) -> Picture:
        before = self._picture
        answers = await _answers(client, before)
        if watch_core.is_another(before, answers.status, clock.wall_ms()):
            before = watch_core.EMPTY
            answers = await _answers(client, before)
            self._version += 1  # no change leads here from the picture before
        return watch_core.picture(before, answers, clock.wall_ms())

    async def _show(self, now: Picture) -> None:
        message = watch_core.changes(self._picture, now, clock.wall_ms())
        self._picture = now
        if message is None:
            return
        async with self._news:
            self._version += 1
            self._change, self._whole = _event(message), b""
            self._news.notify_all()

    async def _fail(self, error: LlamboError) -> None:
        async with self._news:
            self._error = error
            self._task = None
            self._news.notify_all()


class Watches:
    """All watches, by the name of the identity."""

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self._stopping = stopping
        self._by_name: dict[str, Watch] = {}
        self.viewers = 0

    @asynccontextmanager
    async def viewing(self, name: str, connect: Callable[[], Awaitable[Client]]) -> AsyncIterator[Watch]:
        if self.viewers >= VIEWERS:
            raise LlamboError(Code.BUSY, f"{VIEWERS} viewers are connected already", 5_000)
        watch = self._by_name.get(name)
        if watch is None or watch.failed:
            watch = self._by_name[name] = Watch(connect, self._stopping)
        self.viewers += 1
        watch.begin()
        try:
            yield watch
        finally:
            self.viewers -= 1
            await watch.end()
            if not watch.viewers and self._by_name.get(name) is watch:
                del self._by_name[name]


async def _answers(client: Client, before: Picture) -> Answers:
    found = Answers(
        *await asyncio.gather(
            client.status(),
            client.workers(),
            client.requests(),
            client.events(before.last_event),
            client.recent(before.last_sample),
        )
    )
    # An older broker knows nothing of hosts.
    return replace(found, hosts=await client.hosts()) if any(row.hosts for row in found.status.models) else found


def _event(message: Message) -> bytes:
    """On one line: JSON escapes line breaks."""
    return b"data: %s\n\n" % encode(message)


class DrainBody(msgspec.Struct):
    worker: Name
    undo: bool = False
    move: bool = False


class LoadBody(msgspec.Struct):
    model: Name
    host: Name
    pin: bool = False
    undo: bool = False

    async def carry_out(self, client: Client) -> HoldReply:
        if self.undo:
            return await client.release_model(self.model, host=self.host)
        return await client.hold_model(self.model, host=self.host, pin=self.pin)


class CancelBody(msgspec.Struct):
    id: Annotated[str, Meta(min_length=4, max_length=2 * limits.REQUEST_ID_BYTES)]


@dataclass(frozen=True, slots=True)
class Asset:
    body: bytes
    type: str
    tag: str


def assets() -> dict[str, Asset]:
    """Every file of the page, read once."""
    found = {}
    for path in sorted(STATIC.iterdir()):
        if path.suffix in TYPES:
            body = path.read_bytes()
            found[path.name] = Asset(body, TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:20]}"')
    return found


def routes(access: Access, token_of: TokenOf, watches: Watches) -> list[Router]:
    files = assets()

    def admin(token: str) -> Caller:
        caller = access.caller(token)
        if not caller.identity.may_manage:
            raise LlamboError(Code.FORBIDDEN, "the dashboard requires the API token of an admin")
        return caller

    def admins_only(connection: Connection, handler: BaseRouteHandler) -> None:
        """A guard: runs before a body is read."""
        connection.scope[CALLER_KEY] = admin(token_of(connection))  # type: ignore[literal-required]
        # Without keys, the page of another site could post in its visitor's name, but not with this content type.
        if (
            isinstance(connection, Request)
            and connection.method == "POST"
            and _type_of(connection) != "application/json"
        ):
            raise StatusError(415, "send application/json")

    @get("/")
    async def page(request: HttpRequest) -> Response[bytes]:
        return _file(request, files, PAGE)

    @get("/board/{name:str}")
    async def part(request: HttpRequest, name: str) -> Response[bytes]:
        return _file(request, files, name)

    @get("/board/live")
    async def live(request: HttpRequest) -> ASGIApp:
        token = token_of(request)
        # Checked again at each event: a token that was revoked shows nothing more.
        return Live(watches, lambda: admin(token))

    @get("/board/requests/{id:str}")
    async def story(request: HttpRequest, id: str) -> RequestStory:
        return await (await _client(request)).why(id)

    @post("/board/drain", status_code=200)
    async def drain(request: HttpRequest, data: DrainBody) -> DrainReply:
        return await (await _client(request)).drain(data.worker, data.undo, move=data.move)

    @post("/board/load", status_code=200)
    async def load(request: HttpRequest, data: LoadBody) -> HoldReply:
        return await data.carry_out(await _client(request))

    @post("/board/cancel", status_code=200)
    async def cancel(request: HttpRequest, data: CancelBody) -> dict[str, str]:
        return {"reason": await (await _client(request)).cancel(data.id)}

    return [
        Router("/", route_handlers=[page, part], include_in_schema=False),
        Router("/", route_handlers=[live, story, drain, load, cancel], guards=[admins_only], include_in_schema=False),
    ]


def _file(request: HttpRequest, files: dict[str, Asset], name: str) -> Response[bytes]:
    asset = files.get(name)
    if asset is None:
        raise StatusError(404, f"there is no file {name[:80]!r}")
    headers = {"cache-control": CACHING, "etag": asset.tag}
    if request.headers.get("if-none-match") == asset.tag:
        return Response(b"", status_code=304, headers=headers)
    return Response(asset.body, headers=headers, media_type=asset.type)


async def _client(request: HttpRequest) -> Client:
    caller: Caller = request.scope[CALLER_KEY]  # type: ignore[literal-required]
    return await caller.client()


def _type_of(connection: Connection) -> str:
    return connection.headers.get("content-type", "").partition(";")[0].strip().lower()


class Live:
    """The stream of one viewer."""

    def __init__(self, watches: Watches, admin: Callable[[], Caller]) -> None:
        self._watches, self._admin = watches, admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            caller = self._admin()
            caller.open += 1
            try:
                async with (
                    self._watches.viewing(caller.name, caller.client) as watch,
                    aclosing(watch.events()) as events,
                ):
                    # The status depends on whether there is a first picture.
                    await self._serve(await anext(events), events, receive, send)
            finally:
                caller.open -= 1
        except LlamboError as error:
            await reply_error(send, error, scope)

    async def _serve(self, first: bytes, events: AsyncIterator[bytes], receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        # A viewer that disconnects is no error; uvicorn raises an OSError when we write to it.
        with suppress(Disconnected, OSError):
            await unless_disconnected(self._send(first, events, send), receive)

    async def _send(self, first: bytes, events: AsyncIterator[bytes], send: Send) -> None:
        try:
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for event in events:
                self._admin()
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except LlamboError as error:
            over = {"over": {"status": status_of(error), "text": printable(error.text)}}
            body = b"data: %s\n\n" % encode(over)
            await send({"type": "http.response.body", "body": body, "more_body": False})
