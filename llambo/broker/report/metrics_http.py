"""The window: where Prometheus looks in. Part of the broker's shell and of its one loop.

Whoever stands before it can do no harm. There are few connections, with little to read from each and little time for
all of it. The others wait outside; when somebody does, who has been in for a moment without being served has to go, so
that those who only hold on keep nobody out. A turn takes in a bounded number, and to make the page takes a twentieth of
the time at most, however many ask.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import logging
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from llambo.mesh.link import sockets
from llambo.mesh.service.prometheus import CONTENT_TYPE
from llambo.mesh.wire.errors import Code, LlamboError

# --- One HTTP request and its answer, as far as Prometheus and probes of health need it. ---
#
# Two paths, one method, and every connection is closed after its answer. The page costs something to make, so it is
# asked for only when it will be sent.

#: A request's first line and its headers.
HEAD_BYTES = 8 * 1024
_END = b"\r\n\r\n"
_PLAIN = "text/plain; charset=utf-8"
_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
}


def whole(head: bytes | bytearray) -> bool:
    """Whether there is enough of it to be answered."""
    return _END in head or len(head) > HEAD_BYTES


def answer(head: bytes, token: str, page: Callable[[], str]) -> bytes:
    """`token`: what a scraper has to show; empty: nothing."""
    end = head.find(_END)
    if end < 0 or end > HEAD_BYTES:
        return _reply(431, f"a request may have {HEAD_BYTES} bytes of headers\n")
    first, *lines = head[:end].split(b"\r\n")
    parts = first.split(b" ")
    if len(parts) != 3 or not parts[2].startswith(b"HTTP/1.") or not parts[1].startswith(b"/"):
        return _reply(400, "this is no HTTP request\n")
    path = parts[1].partition(b"?")[0]
    if path not in (b"/metrics", b"/healthz"):
        return _reply(404, "there are /metrics and /healthz\n")
    if parts[0] != b"GET":
        return _reply(405, "only GET is answered\n", "Allow: GET")
    if path == b"/healthz":
        return _reply(200, "ok\n")
    if not token and not _meant(lines):
        return _reply(403, "ask for this machine by its address, or as localhost\n")
    if token and not _shown(lines, token):
        return _reply(401, "a token is needed: Authorization: Bearer ...\n", "WWW-Authenticate: Bearer")
    return _reply(200, page(), kind=CONTENT_TYPE)


def failed() -> bytes:
    return _reply(500, "the page could not be made; the broker's log says why\n")


def _meant(lines: list[bytes]) -> bool:
    """Without a token a browser is all that keeps a page of somebody else's from reading ours; and a browser asks under
    whatever name that page has come from, even if its owner lets the name lead here."""
    host = _header(lines, b"host").decode("latin-1").lower()
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    try:
        return name in ("", "localhost") or bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False


def _header(lines: list[bytes], name: bytes) -> bytes:
    """The first of this name."""
    for line in lines:
        there, _, value = line.partition(b":")
        if there.strip().lower() == name:
            return value.strip()
    return b""


def _shown(lines: list[bytes], token: str) -> bool:
    scheme, _, given = _header(lines, b"authorization").partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), token.encode())


def _reply(status: int, text: str, *headers: str, kind: str = _PLAIN) -> bytes:
    body = text.encode()
    lines = [
        f"HTTP/1.1 {status} {_REASONS[status]}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join(lines).encode() + _END + body


log = logging.getLogger(__name__)

#: Connections at a time.
CONNECTIONS = 16
#: From a connection's beginning to its end, whatever it does.
PATIENCE_MS = 2_000
#: ... while others wait.
MOMENT_MS = 250
#: Connections taken in at a turn.
DRAIN = 16
#: A page is given out again for so long; a large one for so many times as long as it took to make.
PAGE_MS = 250
PAGE_SHARE = 20
#: Without descriptors nothing is taken in for so long.
PAUSE_MS = 1_000
#: A shorter token could be guessed.
TOKEN_CHARS = 16
NEVER = 2**62
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Window:
    def __init__(self, address: str, token: str = "") -> None:
        """`address` is host:port. Raises LlamboError if it may not, or cannot, be listened on."""
        host, port = _split(address)
        if not token and not sockets.is_loopback(host):
            text = f"metrics on {host} are for whoever gets there; name a file with a token, in metrics_token"
            raise LlamboError(Code.BAD_SETTING, text)
        self._token = token
        self._page, self._page_until = "", 0
        self._guests: dict[int, _Guest] = {}
        self._poller: zmq.Poller | None = None
        self._make: Callable[[], str] = str
        #: The door is not looked at until then; `_full`: or until somebody leaves.
        self._again_at, self._full = NEVER, False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._door = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._door.bind((host, port))
            self._door.listen(128)
        except OSError as error:
            self._door.close()
            text = f"cannot serve metrics at {address}: {error.strerror}"
            raise LlamboError(Code.BAD_SETTING, text) from error
        self._door.setblocking(False)
        self.port: int = self._door.getsockname()[1]

    # --- its part of the loop ------------------------------------------------------------------------------

    def open(self, poller: zmq.Poller, page: Callable[[], str]) -> None:
        """From now on `turn` is called when the poller says so, or at `due_ms`."""
        self._poller, self._make = poller, page
        poller.register(self._door.fileno(), zmq.POLLIN)

    @property
    def due_ms(self) -> int:
        first = next(iter(self._guests.values()), None)
        return min(self._again_at, first.until_ms if first is not None else NEVER)

    def turn(self, readable: dict[Any, int], now_ms: int) -> None:
        if self._poller is None:
            return
        for number in [number for number in self._guests if number in readable]:
            self._serve(self._guests[number], now_ms)
        for guest in list(self._guests.values()):
            if now_ms < guest.until_ms:
                break  # they are in the order in which they came
            self._leave(guest)
        if self._again_at < NEVER and (now_ms >= self._again_at or (self._full and len(self._guests) < CONNECTIONS)):
            self._again_at, self._full = NEVER, False
            self._poller.register(self._door.fileno(), zmq.POLLIN)
            self._take_in(now_ms)
        elif self._door.fileno() in readable:
            self._take_in(now_ms)

    @property
    def url(self) -> str:
        host = self._door.getsockname()[0]
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"

    def close(self) -> None:
        for guest in list(self._guests.values()):
            self._leave(guest)
        self._door.close()

    # --- guests --------------------------------------------------------------------------------------------

    def _take_in(self, now_ms: int) -> None:
        assert self._poller is not None
        for _ in range(DRAIN):
            oldest = next(iter(self._guests.values())) if len(self._guests) >= CONNECTIONS else None
            if oldest is not None and now_ms < oldest.since_ms + MOMENT_MS:
                self._look_away(oldest.since_ms + MOMENT_MS, full=True)
                return
            try:
                connection, _ = self._door.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _FULL:
                    continue  # this one has hung up already
                log.warning("metrics: no descriptor for another connection; a pause of %d ms", PAUSE_MS)
                self._look_away(now_ms + PAUSE_MS)
                return
            if oldest is not None:
                self._leave(oldest)
            connection.setblocking(False)
            guest = _Guest(connection, now_ms)
            self._guests[guest.number] = guest
            self._poller.register(guest.number, zmq.POLLIN)
            self._serve(guest, now_ms)  # mostly the request is here already

    def _look_away(self, until_ms: int, *, full: bool = False) -> None:
        """Whoever waits at the door would wake the loop again and again."""
        assert self._poller is not None
        self._poller.unregister(self._door.fileno())
        self._again_at, self._full = until_ms, full

    def _serve(self, guest: _Guest, now_ms: int) -> None:
        assert self._poller is not None
        try:
            if guest.left is None and guest.read():
                guest.left = memoryview(self._answer(bytes(guest.head), now_ms))
            if guest.left is not None:
                guest.left = guest.left[guest.connection.send(guest.left) :]
        except BlockingIOError:
            pass
        except OSError:
            self._leave(guest)
            return
        if guest.left:
            self._poller.register(guest.number, zmq.POLLOUT)
        elif guest.left is not None:
            self._leave(guest)

    def _answer(self, head: bytes, now_ms: int) -> bytes:
        def page() -> str:
            if now_ms >= self._page_until:
                began = time.monotonic()
                self._page = self._make()
                took_ms = (time.monotonic() - began) * 1_000
                self._page_until = now_ms + max(PAGE_MS, int(PAGE_SHARE * took_ms))
            return self._page

        try:
            return answer(head, self._token, page)
        except Exception:
            # A mistake in a number must not take down what it counts.
            log.exception("the page of metrics could not be made")
            return failed()

    def _leave(self, guest: _Guest) -> None:
        assert self._poller is not None
        del self._guests[guest.number]
        self._poller.unregister(guest.number)
        guest.connection.close()


class _Guest:
    """A connection: what it has said, and what is left of its answer; None: it has none yet."""

    __slots__ = ("connection", "head", "left", "number", "since_ms", "until_ms")

    def __init__(self, connection: socket.socket, now_ms: int) -> None:
        self.connection = connection
        self.since_ms, self.until_ms = now_ms, now_ms + PATIENCE_MS
        self.number = connection.fileno()
        self.head = bytearray()
        self.left: memoryview | None = None

    def read(self) -> bool:
        """Whether its request is here. Raises OSError when there will be none."""
        said = self.connection.recv(HEAD_BYTES)
        if not said:
            raise ConnectionResetError
        self.head += said
        return whole(self.head)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise LlamboError(Code.BAD_SETTING, f"metrics is {address!r}, expected host:port, such as 127.0.0.1:9330")
    return host.strip("[]"), int(port)


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
        log.warning("metrics_token: everybody on this machine can read %s", file)
    return token
