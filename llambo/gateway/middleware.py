"""What happens to every request before and after anything else: its id, its line in the log, the limit on open ones,
and the headers that tell a browser what it may do with the response.

`Origins` decides whether a request may come from the page that a browser names. Without keys, anybody who
reaches the gateway may use it. The page of another site, in a browser on this host, does reach it: by a form or a
script that needs no answer, by a WebSocket, or by a host name of its own that its owner points at this host (DNS
rebinding). A page cannot control what the browser sends about it: `Host` is the name that was used, `Origin` and
`Sec-Fetch-Site` name where the page is from. Programs other than browsers send only the first.

With keys none of this is needed: a browser adds no API token by itself.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from llambo.gateway.answers.asgi import CODE_KEY, reply_error
from llambo.gateway.gateway_metrics import GatewayMetrics
from llambo.mesh.wire.errors import Code, LlamboError, printable

log = logging.getLogger("llambo.gateway.requests")

HEADER = b"x-request-id"
#: The keys of the ASGI scope for the id of a request and for its caller.
ID_KEY, CALLER_KEY = "llambo.request_id", "llambo.caller"
#: An id that the client sends is used, so that its log and ours can be compared.
_CLIENT_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
#: Answered however many requests are open: a supervisor decides by them whether the gateway lives.
_ALWAYS = ("/healthz", "/health", "/readyz", "/metrics")
ANY = "*"
FOREIGN = "pages of other origins are refused; http_cors lists those that are allowed"
#: What a browser may do with a response: load nothing from elsewhere, run nothing inline, make no markup of text, show
#: it in no frame. Every response has it, so no page of this origin can be without.
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    b"form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
#: The gateway's own page, or no page: an address that was typed, or a bookmark.
_OWN = ("", "same-origin", "none")


class Middleware:
    def __init__(self, app: ASGIApp, limit: int, metrics: GatewayMetrics, origins: Origins | None = None) -> None:
        """`limit`: of open requests, and of open WebSockets. `origins`: None where tokens are required."""
        self.app, self._limit, self._metrics, self._origins = app, limit, metrics, origins
        self.open = 0
        metrics.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._other(scope, receive, send)
            return
        began = time.monotonic()
        id = _id_of(scope["headers"])
        scope[ID_KEY] = id.decode()  # type: ignore[literal-required]
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *HEADERS, (HEADER, id)]
            await send(message)

        self._metrics.open = self.open = self.open + 1
        try:
            if (error := self._foreign(scope, scope["method"])) is not None:
                await reply_error(send_with_id, error, scope)
            elif self.open > self._limit and scope["path"] not in _ALWAYS:
                await reply_error(send_with_id, self._full("requests"), scope)
            else:
                await self.app(scope, receive, send_with_id)
        finally:
            self._metrics.open = self.open = self.open - 1
            took_ms = (time.monotonic() - began) * 1_000
            route, code = scope.get("path_template") or "", scope.get(CODE_KEY) or ""
            self._metrics.http_request(str(route), scope["method"], status, took_ms / 1_000, str(code))
            name = getattr(scope.get(CALLER_KEY), "name", "") or "-"
            request = f"{scope['method']} {printable(scope['path'])}"
            log.info("%s %s %d %.1f ms %s", name, request, status, took_ms, id.decode())

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A WebSocket, or the start and stop of the application."""
        is_socket = scope["type"] == ScopeType.WEBSOCKET
        error: LlamboError | None = None
        self._metrics.sockets += is_socket
        try:
            if is_socket:
                full = self._metrics.sockets > self._limit
                error = self._foreign(scope, "GET") or (self._full("WebSockets") if full else None)
            if error is not None:  # before the handshake: the server answers with a 403
                await send({"type": "websocket.close", "code": 1008, "reason": error.text})
            else:
                await self.app(scope, receive, send)
        finally:
            self._metrics.sockets -= is_socket

    def _foreign(self, scope: Scope, method: str) -> LlamboError | None:
        """The page of another origin asks."""
        why = self._origins.why_not(method, scope["headers"]) if self._origins is not None else ""
        return LlamboError(Code.FORBIDDEN, why) if why else None

    def _full(self, what: str) -> LlamboError:
        return LlamboError(Code.BUSY, f"{self._limit} {what} are open on this gateway", 1_000)


def _id_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    for name, value in headers:
        if name == HEADER and _CLIENT_ID.fullmatch(value):
            return value
    return b"req-" + secrets.token_hex(8).encode()


class Origins:
    """`hosts`: names of the gateway besides those of this host. `pages`: origins whose pages may use it."""

    def __init__(self, hosts: Iterable[str], pages: Iterable[str]) -> None:
        self._hosts = frozenset(map(_plain, hosts))
        self._pages = frozenset(page.lower().rstrip("/") for page in pages)

    def why_not(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Why the request is refused; empty: it is not."""
        found: dict[str, str] = {}
        for name, value in headers:
            if name in (b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode"):
                text = value.decode("latin-1").strip().lower()
                if found.setdefault(name.decode(), text) != text:
                    return f"the header {name.decode()} was sent twice, with different values"
        host, origin = found.get("host", ""), found.get("origin")
        if not self._is_own(host):
            return "use the address of this host or localhost, or add the name to http_hosts"
        if ANY in self._pages or origin in self._pages:
            return ""
        if origin is not None:
            # The browser leaves out the default port, in both alike.
            return "" if _place(origin) == host != "" else FOREIGN
        visit = method == "GET" and found.get("sec-fetch-mode") == "navigate"
        return FOREIGN if found.get("sec-fetch-site", "") not in _OWN and not visit else ""

    def _is_own(self, host: str) -> bool:
        """An address cannot be redirected by DNS. A browser always sends a host."""
        name = _name(host)
        if not host or name == "localhost" or name.endswith(".localhost") or name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _name(host: str) -> str:
    """Without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return _plain(host.partition(":")[0])


def _plain(name: str) -> str:
    return name.strip().lower().rstrip(".")


def _place(origin: str) -> str:
    try:
        found = urlsplit(origin)
    except ValueError:
        return ""
    return found.netloc if found.scheme in ("http", "https") else ""
