"""The WebSocket at `/v1/stream`: many requests over one connection, each message a JSON object.

    -> {"type": "ask", "id": "1", "api": "chat", "body": {"messages": [...]}, "last_event_id": ""}
    -> {"type": "cancel", "id": "1"}
    <- {"type": "waiting", "id": "1", "ahead": 3, "note": "loading qwen3 on box2, 41 %"}
    <- {"type": "event", "id": "1", "event_id": "...", "name": "", "data": {...}}
    <- {"type": "end", "id": "1"}
    <- {"type": "error", "id": "1", "error": {...}}

An id is chosen by the caller. The events are those of the stream over HTTP, and are resumed in the same way. `end`
means that the answer is whole. A browser cannot set headers here; it sends its API token as a second subprotocol beside
`llambo`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal

import msgspec
from litestar.connection import WebSocket
from litestar.exceptions import WebSocketDisconnect
from msgspec import Meta

from llambo.gateway.access import Caller
from llambo.gateway.answers.api import JsonObject, Parsed, encode
from llambo.gateway.answers.api_errors import FieldError, as_llambo_error, error_body
from llambo.gateway.answers.asgi import Connection
from llambo.gateway.answers.feed import Arrival, Feed, Feeds, parse_event_id
from llambo.gateway.answers.rendering import Rendering
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.tokens import UNDECODABLE

#: Open requests of one connection.
OPEN = 64
PROTOCOL = "llambo"


class SocketMessage(msgspec.Struct):
    type: Literal["ask", "cancel"]
    id: Annotated[str, Meta(max_length=64)] = ""
    api: str = "chat"
    body: msgspec.Raw = msgspec.Raw(b"{}")
    last_event_id: Annotated[str, Meta(max_length=2_048)] = ""


_decode = msgspec.json.Decoder(SocketMessage).decode
#: What parses the body of a request, by the name of its API.
Apis = dict[str, Callable[[bytes], Parsed]]


def offered_protocols(connection: Connection) -> list[str]:
    return [each.strip() for each in connection.headers.get("sec-websocket-protocol", "").split(",")]


def offered_token(connection: Connection) -> str:
    """The subprotocol that is a token."""
    return next((each for each in offered_protocols(connection) if each not in ("", PROTOCOL)), "")


class SocketSession:
    """One connection."""

    def __init__(
        self, socket: WebSocket[Any, Any, Any], caller: Callable[[], Caller], feeds: Feeds, apis: Apis
    ) -> None:
        """`caller` is called for each request. Raises LlamboError if the token is no longer valid."""
        self._socket, self._caller, self._feeds, self._apis = socket, caller, feeds, apis
        self._open: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        try:
            while True:
                await self._received(await self._socket.receive_data(mode="text"))
        except WebSocketDisconnect:
            pass
        finally:
            for task in self._open.values():
                task.cancel()
            await asyncio.gather(*self._open.values(), return_exceptions=True)

    async def _received(self, text: str | bytes) -> None:
        id = ""
        try:
            message = _decode(text)
            id = message.id
            if message.type == "cancel":
                task = self._open.get(id)
                if task is not None:
                    task.cancel("cancelled")
                return
            if id in self._open:
                raise LlamboError(Code.BAD_REQUEST, f"request {id!r} of this connection is still open")
            if len(self._open) >= OPEN:
                raise LlamboError(Code.BUSY, f"{OPEN} requests of this connection are open", 1_000)
            api = self._apis.get(message.api)
            if api is None:
                raise FieldError("api", f"{message.api[:40]!r} is not one of {', '.join(self._apis)}")
            task = self._open[id] = asyncio.create_task(self._answer(message, api))
            task.add_done_callback(lambda _: self._open.pop(id, None))
        except (LlamboError, *UNDECODABLE) as error:
            await self._send_error(id, error)

    async def _answer(self, message: SocketMessage, api: Callable[[bytes], Parsed]) -> None:
        try:
            caller, parsed = self._caller(), api(bytes(message.body))
            digest = hashlib.blake2b(message.api.encode() + b"\n" + bytes(message.body), digest_size=16).digest()
            place = None
            if message.last_event_id:
                place = parse_event_id(message.last_event_id)
                feed = await self._feeds.resume(caller, place, parsed.submission, digest)
            else:
                arrival = Arrival(f"WebSocket {message.api}", "/v1/stream", self._socket.headers)
                feed = await self._feeds.begin(caller, parsed.submission, arrival, digest)
            await self._stream(message.id, feed, Rendering(feed, parsed.renderer, place))
        except (LlamboError, *UNDECODABLE) as error:
            await self._send_error(message.id, error)

    async def _stream(self, id: str, feed: Feed, rendering: Rendering) -> None:
        news = asyncio.Event()
        sent = (0, "")  # a request that is next in its queue gets no message
        feed.watch(self._open[id], news.set)
        try:
            while not rendering.finished:
                news.clear()
                if (error := feed.failed_before_begin) is not None:
                    raise error
                if not feed.begun and feed.ahead is not None and (feed.ahead, feed.note) != sent:
                    sent = feed.ahead, feed.note
                    note = {"note": feed.note} if feed.note else {}
                    await self._send({"type": "waiting", "id": id, "ahead": feed.ahead, **note})
                for event_id, event in rendering.events():
                    about = {"type": "event", "id": id, "event_id": event_id, "name": event.name}
                    await self._send({**about, "data": event.data})
                if rendering.behind:
                    await asyncio.sleep(0)  # others have to be served, too
                elif not rendering.finished:
                    await news.wait()
            if rendering.error is not None:
                await self._send_error(id, rendering.error)
            else:
                await self._send({"type": "end", "id": id})
        except asyncio.CancelledError as error:
            if error.args:  # cancelled by its caller. Without a reason the connection is gone, and may come back
                self._feeds.drop(feed, "the client cancelled it")
                await self._send({"type": "end", "id": id})
                return
            raise
        finally:
            feed.unwatch(self._open[id])
            self._feeds.reader_left(feed, finished=rendering.finished)

    async def _send_error(self, id: str, error: Exception) -> None:
        await self._send({"type": "error", "id": id, **error_body(as_llambo_error(error), "openai")})

    async def _send(self, message: JsonObject) -> None:
        with suppress(WebSocketDisconnect):
            await self._socket.send_data(encode(message).decode(), mode="text")
