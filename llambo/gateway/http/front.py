"""What happens to every request before and after anything else: its id, its line in the log, how many are open."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Iterable

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from llambo.gateway.answers.problems import shape_of, told
from llambo.gateway.answers.replies import CODE_KEY, reply
from llambo.gateway.http.origins import Origins
from llambo.gateway.observe.telemetry import Telemetry
from llambo.mesh.wire.errors import Code, LlamboError, printable

log = logging.getLogger("llambo.gateway.requests")

HEADER = b"x-request-id"
#: Where a request's id and its caller's name are kept.
ID_KEY, CALLER_KEY = "llambo.request_id", "llambo.caller"
#: An id that somebody else has given, so that his logs and ours tell of the same.
_GIVEN = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
#: Answered whatever is open: whoever asks these decides whether we live.
_ALWAYS = ("/healthz", "/readyz", "/metrics")


class Front:
    def __init__(self, app: ASGIApp, most: int, telemetry: Telemetry, origins: Origins | None = None) -> None:
        """`origins`: who may ask without a token; None: that is not what is asked."""
        self._app, self._most, self._telemetry, self._origins = app, most, telemetry, origins
        self.open = 0
        telemetry.limit = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._other(scope, receive, send)
            return
        began = time.monotonic()
        id = _id_of(scope["headers"])
        scope[ID_KEY] = id.decode()  # type: ignore[literal-required]
        status = 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (HEADER, id)]
            await send(message)

        self._telemetry.open = self.open = self.open + 1
        try:
            if (error := self._strange(scope, scope["method"])) is not None:
                await self._refuse(scope, tell, error)
            elif self.open > self._most and scope["path"] not in _ALWAYS:
                await self._refuse(scope, tell, self._full("requests"))
            else:
                await self._app(scope, receive, tell)
        finally:
            self._telemetry.open = self.open = self.open - 1
            took_ms = (time.monotonic() - began) * 1_000
            route, code = scope.get("path_template") or "", scope.get(CODE_KEY) or ""
            self._telemetry.answered(str(route), scope["method"], status, took_ms / 1_000, str(code))
            caller = scope.get(CALLER_KEY)
            name = getattr(caller, "name", "") or "-"
            path = printable(scope["path"])
            log.info("%s %s %s %d %.1f ms %s", name, scope["method"], path, status, took_ms, id.decode())

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        here = scope["type"] == ScopeType.WEBSOCKET
        error: LlamboError | None = None
        self._telemetry.sockets += here
        try:
            if here:
                full = self._telemetry.sockets > self._most
                error = self._strange(scope, "GET") or (self._full("WebSockets") if full else None)
            if error is not None:  # before the handshake: it is answered by a 403
                await send({"type": "websocket.close", "code": 1008, "reason": error.text})
            else:
                await self._app(scope, receive, send)
        finally:
            self._telemetry.sockets -= here

    def _strange(self, scope: Scope, method: str) -> LlamboError | None:
        why = self._origins.why_not(method, scope["headers"]) if self._origins is not None else ""
        return LlamboError(Code.FORBIDDEN, why) if why else None

    def _full(self, what: str) -> LlamboError:
        return LlamboError(Code.BUSY, f"{self._most} {what} are open here", 1_000)

    async def _refuse(self, scope: Scope, send: Send, error: LlamboError) -> None:
        said = told(error, shape_of(scope["path"]))
        scope[CODE_KEY] = error.code.value  # type: ignore[literal-required]
        await reply(send, said.status, said.body, said.headers)


def _id_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    for name, value in headers:
        if name == HEADER and _GIVEN.fullmatch(value):
            return value
    return b"req-" + secrets.token_hex(8).encode()
