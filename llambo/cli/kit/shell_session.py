"""One connection for all that is done in a shell, and the loop it lives on.

The loop runs in the main thread, all the time: a client that is not heard of is given up by its broker. Each command
runs in a thread beside it and is the very function that `llambo` calls; where it would begin a loop and a connection of
its own (`cli/kit/ask.py`) it is lent these. Ctrl-C reaches what the command waits for, not the shell.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from llambo.cli.kit.ask import connect, where
from llambo.cli.kit.common import Common

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client

T = TypeVar("T")

#: So many requests of this shell are offered for completion after they have ended.
REMEMBERED = 50


class Session:
    def __init__(self, common: Common) -> None:
        self._common = common
        self._loop = asyncio.get_running_loop()
        #: None until the first command that needs it.
        self.client: Client | None = None
        self._work: asyncio.Task[Any] | None = None
        self._interrupted = False
        #: Who else wants to know of a Ctrl-C: a stream that is to be cancelled, rather than left.
        self.on_signal: Callable[[int], None] | None = None
        #: Told why the broker was lost, and "" when one is back.
        self.on_link: Callable[[str], None] | None = None
        #: The ids of the requests that were sent here, the latest last.
        self.sent: deque[str] = deque(maxlen=REMEMBERED)

    # --- from the thread of a command ----------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for it; raises KeyboardInterrupt after a Ctrl-C."""
        future = asyncio.run_coroutine_threadsafe(self._guarded(work), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise KeyboardInterrupt from None

    async def _guarded(self, work: Coroutine[Any, Any, T]) -> T:
        if self._interrupted:
            work.close()
            raise asyncio.CancelledError
        self._work = asyncio.current_task()
        try:
            return await work
        finally:
            self._work = None

    # --- on the loop ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Of a command: no Ctrl-C that came before is meant for it."""
        self._interrupted = False

    @property
    def busy(self) -> bool:
        """A command waits for something."""
        return self._work is not None

    @property
    def interrupted(self) -> bool:
        """There was a Ctrl-C since the last command began."""
        return self._interrupted

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Stop what the command waits for, now or next."""
        self._interrupted = True
        if self.on_signal is not None:
            self.on_signal(number)
        elif self._work is not None:
            self._work.cancel()

    @asynccontextmanager
    async def connected(self, common: Common) -> AsyncIterator[Client]:
        """The connection of this session; one of its own for a command that was told of another broker or key."""
        if where(common) != where(self._common):
            async with connect(common) as other:
                yield other
            return
        if self.client is None:
            client = connect(self._common)
            client.on_link = self._tell_link
            await client.connect()
            self.client = client
        yield self.client

    async def connect(self) -> Client:
        async with self.connected(self._common) as client:
            return client

    async def close(self) -> None:
        if self.client is not None:
            await self.client.close()

    def _tell_link(self, lost: str) -> None:
        if self.on_link is not None:
            self.on_link(lost)
