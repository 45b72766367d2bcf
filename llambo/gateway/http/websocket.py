"""The WebSocket door: many requests over one connection, each message a JSON object.

    -> {"type": "ask", "id": "1", "api": "chat", "body": {"messages": [...]}, "last_event_id": ""}
    -> {"type": "cancel", "id": "1"}
    <- {"type": "waiting", "id": "1", "ahead": 3}
    <- {"type": "event", "id": "1", "event_id": "...", "name": "", "data": {...}}
    <- {"type": "end", "id": "1"}
    <- {"type": "error", "id": "1", "error": {...}}

An id is the caller's own. The events are those of the stream over HTTP, and are resumed in the same way. A browser,
which cannot set headers here, gives its API token as a second subprotocol beside `llambo`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal

import msgspec
from litestar.connection import ASGIConnection, WebSocket
from litestar.exceptions import WebSocketDisconnect
from msgspec import Meta

from llambo.gateway.access import Caller
from llambo.gateway.answers.asking import Prepared, encode
from llambo.gateway.answers.feed import Feed, Feeds
from llambo.gateway.answers.problems import body, of_exception
from llambo.gateway.answers.rendering import Rendering, place_of
from llambo.mesh.wire.errors import Code, LlamboError

#: Requests of one connection at a time.
OPEN = 64
PROTOCOL = "llambo"


class Said(msgspec.Struct):
    type: Literal["ask", "cancel"]
    id: Annotated[str, Meta(max_length=64)] = ""
    api: str = "chat"
    body: msgspec.Raw = msgspec.Raw(b"{}")
    last_event_id: Annotated[str, Meta(max_length=128)] = ""


_decode = msgspec.json.Decoder(Said).decode
#: What makes a request of a body, by the name of its API.
Apis = dict[str, Callable[[bytes], Prepared]]


def offered_token(socket: ASGIConnection[Any, Any, Any, Any]) -> str:
    """The subprotocol that is a token."""
    offered = [each.strip() for each in socket.headers.get("sec-websocket-protocol", "").split(",")]
    return next((each for each in offered if each and each != PROTOCOL), "")


class Conversation:
    """One connection."""

    def __init__(self, socket: WebSocket[Any, Any, Any], who: Callable[[], Caller], feeds: Feeds, apis: Apis) -> None:
        """`who`: asked for each request. Raises LlamboError if he is no longer known."""
        self._socket, self._who, self._feeds, self._apis = socket, who, feeds, apis
        self._open: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        try:
            while True:
                await self._heard(await self._socket.receive_data(mode="text"))
        except WebSocketDisconnect:
            pass
        finally:
            for task in self._open.values():
                task.cancel()
            await asyncio.gather(*self._open.values(), return_exceptions=True)

    async def _heard(self, text: str | bytes) -> None:
        id = ""
        try:
            said = _decode(text)
            id = said.id
            if said.type == "cancel":
                task = self._open.get(id)
                if task is not None:
                    task.cancel("cancelled")
                return
            if id in self._open:
                raise LlamboError(Code.BAD_REQUEST, f"request {id!r} of this connection is not over yet")
            if len(self._open) >= OPEN:
                raise LlamboError(Code.BUSY, f"{OPEN} requests of this connection are open", 1_000)
            api = self._apis.get(said.api)
            if api is None:
                raise LlamboError(Code.BAD_REQUEST, f"api: {said.api[:40]!r} is none of {', '.join(self._apis)}")
            task = self._open[id] = asyncio.create_task(self._answer(said, api))
            task.add_done_callback(lambda _: self._open.pop(id, None))
        except (LlamboError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            await self._problem(id, of_exception(error))

    async def _answer(self, said: Said, api: Callable[[bytes], Prepared]) -> None:
        try:
            caller, prepared = self._who(), api(bytes(said.body))
            assert prepared.renderer is not None, "the apis here make streams"
            digest = hashlib.blake2b(said.api.encode() + b"\n" + bytes(said.body), digest_size=16).digest()
            skip = 0
            if said.last_event_id:
                id, created, skip = place_of(said.last_event_id)
                feed = await self._feeds.resume(caller, id, created, digest)
            else:
                feed = await self._feeds.begin(caller, prepared.ask, digest)
                self._feeds.trace(feed, f"WebSocket {said.api}", self._socket.headers, "/v1/stream")
            await self._tell(said.id, feed, Rendering(feed, prepared.renderer, skip))
        except (LlamboError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            await self._problem(said.id, of_exception(error))

    async def _tell(self, id: str, feed: Feed, rendering: Rendering) -> None:
        news = asyncio.Event()
        told: int | None = 0  # who is next need not know
        feed.watch(self._open[id], news.set)
        try:
            while not rendering.finished:
                news.clear()
                if feed.error is not None and not feed.pieces:
                    raise feed.error
                if not feed.begun and feed.ahead not in (None, told):
                    told = feed.ahead
                    await self._send({"type": "waiting", "id": id, "ahead": told})
                for event_id, event in rendering.events():
                    data = msgspec.Raw(event.data) if event.data.startswith(b"{") else event.data.decode()
                    await self._send(
                        {"type": "event", "id": id, "event_id": event_id, "name": event.name, "data": data}
                    )
                if rendering.behind:
                    await asyncio.sleep(0)  # others want to be told, too
                elif not rendering.finished:
                    await news.wait()
            await self._send({"type": "end", "id": id})
        except asyncio.CancelledError as error:
            if error.args:  # its caller wants no more; without a reason the connection is gone, and he may come back
                self._feeds.drop(feed, "the client cancelled it")
                await self._send({"type": "end", "id": id})
                return
            raise
        finally:
            feed.unwatch(self._open[id])
            self._feeds.left(feed, finished=rendering.finished)

    async def _problem(self, id: str, error: LlamboError) -> None:
        await self._send({"type": "error", "id": id, **body(error, "openai")})

    async def _send(self, message: dict[str, Any]) -> None:
        with suppress(WebSocketDisconnect):
            await self._socket.send_data(encode(message).decode(), mode="text")
