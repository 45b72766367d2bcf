"""Whether a request may come from where a browser says it comes from.

Without keys whoever reaches the gateway may ask. A page of somebody else's, in the browser of a person at this machine,
does reach it: by a form or a script that needs no answer, by a WebSocket, or under a name of its own that its owner
lets lead here (DNS rebinding). It cannot choose what the browser says of it: `Host` is the name that was asked,
`Origin` and `Sec-Fetch-Site` where the page is from. Programs that are no browsers send only the first.

With keys none of this is needed: a browser adds no API token by itself.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

ANY = "*"
#: A page of its own, or none at all: typed, or a bookmark.
_OURS = ("", "same-origin", "none")


class Origins:
    """`hosts`: names it is asked by besides those of this machine. `pages`: origins whose pages may ask."""

    def __init__(self, hosts: Iterable[str], pages: Iterable[str]) -> None:
        self._hosts = frozenset(map(_plain, hosts))
        self._pages = frozenset(page.lower().rstrip("/") for page in pages)

    def why_not(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Why such a request is refused; empty: it is not."""
        told: dict[str, str] = {}
        for name, value in headers:
            if name in (b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode"):
                text = value.decode("latin-1").strip().lower()
                if told.setdefault(name.decode(), text) != text:
                    return f"{name.decode()} was said twice, and differently"
        host, origin = told.get("host", ""), told.get("origin")
        if not self._is_own(host):
            return "ask for this machine by its address or as localhost, or name the host in http_hosts"
        if ANY in self._pages or origin in self._pages:
            return ""
        if origin is not None:
            # The browser leaves out a port that goes without saying, in both alike.
            return (
                ""
                if _place(origin) == host != ""
                else "pages of other origins may not ask; http_cors names those that may"
            )
        visit = method == "GET" and told.get("sec-fetch-mode") == "navigate"
        if told.get("sec-fetch-site", "") not in _OURS and not visit:
            return "pages of other origins may not ask; http_cors names those that may"
        return ""

    def _is_own(self, host: str) -> bool:
        """An address cannot be made to lead elsewhere. A browser always names a host."""
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
