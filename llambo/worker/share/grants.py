"""What a host may give to others: only what a broker has granted, and only while it goes on to say so. Pure."""

from __future__ import annotations

import hmac

from llambo.mesh.wire.messages import FileGrant


class Grants:
    def __init__(self) -> None:
        self._granted: tuple[FileGrant, ...] = ()

    def replace(self, granted: tuple[FileGrant, ...]) -> None:
        """All of them, of all brokers."""
        self._granted = granted

    def admits(self, key: str) -> bool:
        """True if a connection that has proved this key may be opened. Without keys none is asked about."""
        return any(each.key == key for each in self._granted)

    def ref_for(self, ticket: bytes, key: str) -> str | None:
        """The model whose files the holder of this ticket may fetch, over a connection with this key."""
        for each in self._granted:
            if hmac.compare_digest(each.ticket, ticket) and each.key == key:
                return each.ref
        return None
