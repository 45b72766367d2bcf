"""Writing an answer to stdout as it comes, without ever blocking the event loop.

A pager that is not scrolled stops reading. A client that waited for it would miss its heartbeats, and the
broker would cancel its request. So what stdout does not take now is kept, and `room` waits for it; meanwhile the
client goes on, and the broker keeps what it has no room for.
"""

from __future__ import annotations

import asyncio
import os
import select

from llambo.mesh.wire.errors import printable

#: A pipe that is writable takes as much as this at once (PIPE_BUF), so that a write does not block.
WRITE_BYTES = 4_096
#: What may be kept here before the reader has to wait.
BACKLOG_BYTES = 64 * 1024


class StdoutWriter:
    """Belongs to one event loop. After its reader has left, `room` and `flush` raise BrokenPipeError."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._terminal = os.isatty(descriptor)
        self._loop = asyncio.get_running_loop()
        self._pending = bytearray()
        self._watching = False
        self._error: OSError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, text: str) -> None:
        # A file gets what the model said. On a terminal it is to be read, and not obeyed.
        self.paint(printable(text) if self._terminal else text)

    def paint(self, drawn: str) -> None:
        """What was made here for a terminal to obey."""
        self._pending += drawn.encode("utf-8", "replace")
        if not self._watching:
            self._push()

    async def room(self) -> None:
        await self._below(BACKLOG_BYTES)

    async def flush(self) -> None:
        await self._below(0)

    def close(self) -> None:
        """Whatever was not taken is lost."""
        self._watch(False)

    async def _below(self, level: int) -> None:
        while self._error is None and len(self._pending) > level:
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._error is not None:
            raise self._error

    def _push(self) -> None:
        try:
            while self._pending and self._error is None:
                if not select.select([], [self._descriptor], [], 0)[1]:
                    self._watch(True)
                    return
                written = os.write(self._descriptor, self._pending[:WRITE_BYTES])
                del self._pending[:written]
        except OSError as error:
            self._error = error
        self._watch(False)
        self._wake()

    def _watch(self, wanted: bool) -> None:
        if wanted and not self._watching:
            self._loop.add_writer(self._descriptor, self._push_some)
        elif self._watching and not wanted:
            self._loop.remove_writer(self._descriptor)
        self._watching = wanted

    def _push_some(self) -> None:
        self._push()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
