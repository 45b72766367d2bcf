"""ZeroMQ's question whether to let a connection in (ZAP), and the answer to it."""

from __future__ import annotations

from collections.abc import Sequence

from zmq.utils import z85

VERSION = b"1.0"
#: version, request id, domain, address, identity, mechanism, and the credentials: for CURVE the public key.
FRAMES = 7
_YES, _NO = b"200", b"400"
_CURVE_BYTES = 32


def public_key(question: Sequence[bytes]) -> str:
    """The key that the connection has; empty: it has none."""
    credentials = question[-1]
    return z85.encode(credentials).decode() if len(credentials) == _CURVE_BYTES else ""


def is_curve(question: Sequence[bytes]) -> bool:
    return len(question) == FRAMES and question[0] == VERSION and question[5] == b"CURVE"


def reply(question: Sequence[bytes], public: str, why_not: str) -> list[bytes]:
    """The frames of the answer. `why_not`: empty to let it in; its messages then come with this key."""
    number = question[1] if len(question) > 1 else b""
    status, user = (_NO, b"") if why_not else (_YES, public.encode())
    return [VERSION, number, status, why_not.encode(), user, b""]
