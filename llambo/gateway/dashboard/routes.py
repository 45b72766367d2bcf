"""The routes of the dashboard: its page, the stream that the page shows, and its actions.

The page consists of the files in `static/` and loads nothing from elsewhere. A content security policy makes the
browser enforce that, so neither runs nor loads anything that was injected. Where there are keys, everything but the
files is for admins.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send
from msgspec import Meta

from llambo.gateway.access import Access, Caller
from llambo.gateway.answers.api import encode
from llambo.gateway.answers.api_errors import StatusError, status_of
from llambo.gateway.answers.asgi import disconnect, reply_error
from llambo.gateway.dashboard.watches import Watches
from llambo.gateway.http.middleware import CALLER_KEY
from llambo.mesh.client.client import Client
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError, printable
from llambo.mesh.wire.reports import DrainReply, RequestStory

STATIC = Path(__file__).resolve().parent / "static"
PAGE = "index.html"
TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
#: Nothing from elsewhere, nothing inline, no markup made of text, no frame of another page.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # The browser asks each time, and gets a 304 without a body if nothing has changed.
    "cache-control": "no-cache",
}
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
]

Connection = ASGIConnection[Any, Any, Any, Any]
BoardRequest = Request[Any, Any, Any]
TokenOf = Callable[[Connection], str]
Name = Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]


class DrainBody(msgspec.Struct):
    worker: Name
    undo: bool = False
    move: bool = False


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

    def file(request: BoardRequest, name: str) -> Response[bytes]:
        asset = files.get(name)
        if asset is None:
            raise StatusError(404, f"there is no file {name[:80]!r}")
        headers = {**HEADERS, "etag": asset.tag}
        if request.headers.get("if-none-match") == asset.tag:
            return Response(b"", status_code=304, headers=headers)
        return Response(asset.body, headers=headers, media_type=asset.type)

    @get("/")
    async def page(request: BoardRequest) -> Response[bytes]:
        return file(request, PAGE)

    @get("/board/{name:str}")
    async def part(request: BoardRequest, name: str) -> Response[bytes]:
        return file(request, name)

    @get("/board/live")
    async def live(request: BoardRequest) -> ASGIApp:
        token = token_of(request)
        # Checked again at each event: a token that was revoked shows nothing more.
        return Live(watches, lambda: admin(token))

    @get("/board/requests/{id:str}")
    async def story(request: BoardRequest, id: str) -> RequestStory:
        return await (await _client(request)).why(id)

    @post("/board/drain", status_code=200)
    async def drain(request: BoardRequest, data: DrainBody) -> DrainReply:
        return await (await _client(request)).drain(data.worker, data.undo, move=data.move)

    @post("/board/cancel", status_code=200)
    async def cancel(request: BoardRequest, data: CancelBody) -> dict[str, str]:
        return {"reason": await (await _client(request)).cancel(data.id)}

    return [
        Router("/", route_handlers=[page, part], include_in_schema=False),
        Router("/", route_handlers=[live, story, drain, cancel], guards=[admins_only], include_in_schema=False),
    ]


async def _client(request: BoardRequest) -> Client:
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
        sending = asyncio.create_task(self._send(first, events, send))
        listening = asyncio.create_task(disconnect(receive))
        try:
            await asyncio.wait([sending, listening], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, listening):
                task.cancel()
            # A viewer that disconnects is no error; uvicorn raises an OSError when we write to it.
            with suppress(asyncio.CancelledError, OSError):
                await sending

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
