"""What readers of answers have not taken yet: bounded over all feeds.

Below the bound an answer is fetched from the mesh as fast as it comes, whether it is read or not, so that the mesh need
not keep it. Above it each feed waits for its own readers, and the rest of its answer stays in the mesh.
"""

from __future__ import annotations

import asyncio

#: A feed may always be so far ahead of its readers.
AHEAD_BYTES = 32 * 1024


class Unread:
    """Of all feeds together."""

    def __init__(self, limit: int) -> None:
        self.bytes = 0
        self._limit = limit
        self._waiting: set[asyncio.Event] = set()

    @property
    def full(self) -> bool:
        return self.bytes >= self._limit

    def add(self, size: int) -> None:
        """`size` is negative when something was taken."""
        self.bytes += size
        if not self.full:
            for waiting in self._waiting:
                waiting.set()

    async def wait(self, room: asyncio.Event) -> None:
        """Until there may be room: what its own readers take sets `room`, too."""
        room.clear()
        self._waiting.add(room)
        try:
            await room.wait()
        finally:
            self._waiting.discard(room)


class Lead:
    """How far one feed is ahead of its readers."""

    def __init__(self, unread: Unread) -> None:
        self._unread = unread
        self._tokens = self._taken = 0
        #: Of all its tokens, and of those that no reader has taken.
        self._size = self._bytes = 0
        self._ended = False
        self._room = asyncio.Event()

    def grew(self, tokens: int, size: int) -> None:
        """So many tokens are there now, and they have so many bytes."""
        self._tokens, self._size = tokens, size
        self._count()

    def taken(self, tokens: int) -> None:
        """A reader has taken so many."""
        if tokens > self._taken:
            self._taken = tokens
            self._count()
            self._room.set()

    def end(self) -> None:
        """No connection will read it any more."""
        self._ended = True
        self._count()

    async def wait(self) -> None:
        while self._unread.full and self._bytes > AHEAD_BYTES:
            await self._unread.wait(self._room)

    def _count(self) -> None:
        """By the average of its tokens."""
        left = 0 if self._ended else max(0, self._tokens - self._taken)
        before, self._bytes = self._bytes, self._size * left // max(1, self._tokens)
        self._unread.add(self._bytes - before)
