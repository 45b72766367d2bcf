"""One connection for all commands of a shell, and the event loop it lives on.

The loop runs in a thread of its own, all the time: a broker gives up a client that it does not hear from. The commands
run in the main thread and are the same functions that `llambo` calls; instead of a loop and a connection of their own
(`cli/kit/ask.py`) they get these. Ctrl-C stops what a command waits for, not the shell.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from llambo.cli.kit.common import Common, connect, where

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client

T = TypeVar("T")

#: This many requests of the shell are offered for completion after their end.
REMEMBERED = 50


class ShellSession:
    def __init__(self, common: Common) -> None:
        self._common = common
        #: None until the first command that needs it.
        self.client: Client | None = None
        #: A command waits for the mesh.
        self.waiting = False
        #: There was a Ctrl-C since the command began.
        self.interrupted = False
        #: Called at a signal while a stream is followed: it is cancelled, and its end awaited.
        self.on_signal: Callable[[int], None] | None = None
        #: Called with the reason when the broker is lost, and with "" when one is back. On the thread of the loop.
        self.on_link: Callable[[str], None] | None = None
        #: The ids of the requests that were sent here, the latest last.
        self.sent: deque[str] = deque(maxlen=REMEMBERED)
        self._work: asyncio.Task[Any] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llambo-shell", daemon=True)
        self._thread.start()

    # --- in the main thread ----------------------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which runs on the loop; raises KeyboardInterrupt after a Ctrl-C."""
        self.waiting = True
        try:
            return self.submit(self._interruptible(work)).result()
        except concurrent.futures.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            self.waiting = False

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Stop what the command waits for, now or next."""
        self.interrupted = True
        self._loop.call_soon_threadsafe(self._interrupt, number)

    def connect(self) -> Client:
        return self.run(self._connected())

    def close(self) -> None:
        self.submit(self._wind_up()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- on the loop -----------------------------------------------------------------------------------------------

    async def _interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        if self.interrupted:
            work.close()
            raise asyncio.CancelledError
        self._work = asyncio.current_task()
        try:
            return await work
        finally:
            self._work = None

    def _interrupt(self, number: int) -> None:
        if self.on_signal is not None:
            self.on_signal(number)
        elif self._work is not None:
            self._work.cancel()

    @asynccontextmanager
    async def connected(self, common: Common) -> AsyncIterator[Client]:
        """The connection of this session; a command with another broker or key gets one of its own."""
        if where(common) == where(self._common):
            yield await self._connected()
        else:
            async with connect(common) as other:
                yield other

    async def _connected(self) -> Client:
        if self.client is None:
            client = connect(self._common)
            client.on_link = self._on_link
            await client.connect()
            self.client = client
        return self.client

    async def _wind_up(self) -> None:
        if self.client is not None:
            await self.client.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _on_link(self, lost: str) -> None:
        if self.on_link is not None:
            self.on_link(lost)
