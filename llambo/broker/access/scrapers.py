"""Who may read the metrics over HTTP: with a token, its holder; without one, programs of this machine."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import stat
from pathlib import Path

from llambo.mesh.wire.errors import Code, LlamboError

log = logging.getLogger(__name__)

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
