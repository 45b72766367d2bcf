"""Whether a request may come from the page that a browser says it comes from.

Without keys, anybody who reaches the gateway may use it. The page of another site, in a browser on this host, does
reach it: by a form or a script that needs no answer, by a WebSocket, or by a host name of its own that its owner points
at this host (DNS rebinding). A page cannot control what the browser says about it: `Host` is the name that was used,
`Origin` and `Sec-Fetch-Site` say where the page is from. Programs other than browsers send only the first.

With keys none of this is needed: a browser adds no API token by itself.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

ANY = "*"
FOREIGN = "pages of other origins are refused; http_cors lists those that are allowed"
#: The gateway's own page, or no page: an address that was typed, or a bookmark.
_OWN = ("", "same-origin", "none")


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
