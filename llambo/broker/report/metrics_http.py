"""/metrics and /healthz over HTTP: the standard library's server in threads of its own, over a snapshot.

The broker's loop makes the page when one is wanted and the last one is too old, in a twentieth of its time at most. It
shares nothing else with these threads, and what they may take from it is bounded: connections at a time and in a
second, bytes to read from each, and the time until it is closed. The others wait in the listen queue; when one waits,
the oldest connection is closed once it had a moment to be served, so that idle ones keep none out.
"""

from __future__ import annotations

import errno
import hmac
import io
import ipaddress
import logging
import socket
import stat
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from llambo.mesh.link import sockets
from llambo.mesh.service.prometheus import CONTENT_TYPE
from llambo.mesh.wire.errors import Code, LlamboError

log = logging.getLogger(__name__)

#: Bytes of a request's first line and headers.
HEAD_BYTES = 8 * 1024
#: Connections at a time, and the pause between two of them: a crowd gets a tenth of a core at most.
CONNECTIONS, ACCEPT_PAUSE_S = 16, 0.005
#: From a connection's beginning to its end, and the same while others wait.
CONNECTION_S, CROWDED_S = 2.0, 0.25
#: A page is given out again for so long; a large one for so many times as long as it took to make.
PAGE_S, PAGE_SHARE = 0.25, 20
#: A loop that has not turned for so long stands still. It turns at each heartbeat.
STALLED_S = 2.0
#: Without descriptors no connection is accepted for so long.
FULL_PAUSE_S = 1.0
_PLAIN = "text/plain; charset=utf-8"
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Snapshot:
    """The page, between the loop that makes it and the threads that send it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._wanted, self._page, self._fresh_until, self._turned_at = False, "", float("-inf"), float("-inf")

    def turned(self, make: Callable[[], str]) -> None:
        """The loop calls this at each turn."""
        began = self._turned_at = self._clock()
        if not self._wanted:
            return
        try:
            page = make()
        except Exception:
            # An error in a number must not end what it counts.
            log.exception("the page of metrics could not be made")
            page = ""
        now = self._clock()
        with self._changed:
            self._wanted, self._page, self._fresh_until = False, page, now + max(PAGE_S, PAGE_SHARE * (now - began))
            self._changed.notify_all()

    @property
    def alive(self) -> bool:
        return self._clock() - self._turned_at < STALLED_S

    def page(self) -> str | None:
        """Empty: it could not be made. None: the loop stands still."""
        with self._changed:
            if self._clock() < self._fresh_until:
                return self._page
            self._wanted = True
            made = self._changed.wait_for(lambda: not self._wanted, CONNECTION_S / 2)
            return self._page if made else None


class MetricsServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: str, token: str = "") -> None:
        """`address` is host:port. Raises LlamboError if it may not, or cannot, be listened on."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65_535:
            raise LlamboError(Code.BAD_SETTING, f"metrics is {address!r}, expected host:port, such as 127.0.0.1:9330")
        host = host.strip("[]")
        if not token and not sockets.is_loopback(host):
            text = f"without a token every program that reaches {host} could read the metrics; set metrics_token"
            raise LlamboError(Code.BAD_SETTING, text)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.token, self.snapshot = token, Snapshot()
        self._open: dict[socket.socket, float] = {}
        self._started = False
        try:
            super().__init__((host, int(port)), _Handler)
        except OSError as error:
            text = f"cannot serve metrics at {address}: {error.strerror}"
            raise LlamboError(Code.BAD_SETTING, text) from error
        host, self.port = self.socket.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)  # HTTPServer would look up the name of this host, which may take long

    def start(self) -> None:
        self._started = True
        threading.Thread(target=self.serve_forever, args=(0.1,), name="metrics", daemon=True).start()

    def close(self) -> None:
        if self._started:
            self.shutdown()
        self.server_close()

    def get_request(self) -> tuple[socket.socket, Any]:
        while len(self._open) >= CONNECTIONS:
            for oldest, since in list(self._open.items())[:1]:
                if time.monotonic() >= since + CROWDED_S:
                    self._open.pop(oldest, None)
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread closes it
            time.sleep(ACCEPT_PAUSE_S)
        time.sleep(ACCEPT_PAUSE_S)
        try:
            connection, peer = self.socket.accept()
        except OSError as error:
            if error.errno in _FULL:
                log.warning("metrics: no descriptor for another connection; a pause of %g s", FULL_PAUSE_S)
                time.sleep(FULL_PAUSE_S)
            raise
        self._open[connection] = time.monotonic()
        return connection, peer

    def shutdown_request(self, request: Any) -> None:
        self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The connection broke, or took too long: that is for its peer to know."""


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer

    def handle(self) -> None:
        head, until = bytearray(), time.monotonic() + CONNECTION_S
        while b"\r\n\r\n" not in head and len(head) <= HEAD_BYTES:
            self.connection.settimeout(max(0.001, until - time.monotonic()))
            part = self.connection.recv(HEAD_BYTES)
            if not part:
                return
            head += part
        # Of `sendall` this is the time for everything.
        self.connection.settimeout(max(0.001, until - time.monotonic()))
        if head.find(b"\r\n\r\n") not in range(HEAD_BYTES):
            self._reply(431, f"a request may have {HEAD_BYTES} bytes of headers\n")
            return
        self.rfile = io.BytesIO(head)
        self.raw_requestline = self.rfile.readline()
        words = self.raw_requestline.split()
        if len(words) != 3 or not words[1].startswith(b"/") or not words[2].startswith(b"HTTP/1."):
            self._reply(400, "this is no HTTP request\n")
        elif self.parse_request():
            self._answer(self.path.partition("?")[0], self.server.token)

    def _answer(self, path: str, token: str) -> None:
        snapshot = self.server.snapshot
        if path not in ("/metrics", "/healthz"):
            self._reply(404, "there are /metrics and /healthz\n")
        elif self.command != "GET":
            self._reply(405, "only GET is answered\n", ("Allow", "GET"))
        elif path == "/healthz":
            self._reply(200, "ok\n") if snapshot.alive else self._reply(503, "the broker's loop stands still\n")
        elif not token and not is_local_name(self.headers.get("Host", "")):
            self._reply(403, "ask for this machine by its address, or as localhost\n")
        elif token and not has_token(self.headers.get("Authorization", ""), token):
            self._reply(401, "a token is needed: Authorization: Bearer ...\n", ("WWW-Authenticate", "Bearer"))
        elif (page := snapshot.page()) is None:
            self._reply(503, "the broker's loop stands still\n")
        elif not page:
            self._reply(500, "the page could not be made; the broker's log says why\n")
        else:
            self._reply(200, page, kind=CONTENT_TYPE)

    def _reply(
        self, status: int, text: str, *headers: tuple[str, str], kind: str = "text/plain; charset=utf-8"
    ) -> None:
        body = text.encode()
        self.protocol_version = self.request_version = "HTTP/1.1"
        self.send_response_only(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Not for each request."""


# --- who may read the metrics: with a token, its holder; without one, programs of this machine ---

#: A shorter token could be guessed.
TOKEN_CHARS = 16


def has_token(authorization: str, token: str) -> bool:
    """`authorization`: the header of a request."""
    scheme, _, given = authorization.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), token.encode())


def is_local_name(host: str) -> bool:
    """Whether the Host header names this machine by address, or as localhost.

    Without a token only the browser keeps a foreign web page from reading ours, and a browser sends the name that the
    page came from, even if its owner lets that name resolve to this machine (DNS rebinding).
    """
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    try:
        return name.lower() in ("", "localhost") or bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False


def token_in(path: str) -> str:
    """The token in a file, whose only line it is; empty without a file."""
    if not path:
        return ""
    file = Path(path).expanduser()
    try:
        token = file.read_text(encoding="utf-8").strip()
        open_to_all = stat.S_IMODE(file.stat().st_mode) & stat.S_IROTH
    except (OSError, UnicodeDecodeError) as error:
        raise LlamboError(Code.BAD_SETTING, f"metrics_token: {file} cannot be read: {error}") from error
    if len(token) < TOKEN_CHARS or not token.isascii() or any(c.isspace() for c in token):
        text = f"metrics_token: {file} has to hold one word of at least {TOKEN_CHARS} characters"
        raise LlamboError(Code.BAD_SETTING, text)
    if open_to_all:
        log.warning("metrics_token: every user of this machine can read %s", file)
    return token
