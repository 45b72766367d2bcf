"""One HTTP request and its answer, as far as Prometheus and probes of health need it.

Two paths, one method, and every connection is closed after its answer. The page costs something to make, so it is
asked for only when it will be sent.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable

from llambo.mesh.metrics import CONTENT_TYPE

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
