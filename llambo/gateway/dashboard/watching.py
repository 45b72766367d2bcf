"""Those who watch the mesh, and the one who asks for all of them.

A `Watch` asks a broker some times a second, but only while somebody looks; viewers of one identity share it. Nothing is
queued for a viewer: he is told what has changed since what he saw last, and who was too slow to see every change is
given the whole picture when he is ready for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from llambo.gateway.dashboard import watch_core
from llambo.gateway.dashboard.watch_core import Answers, Picture
from llambo.mesh.client.client import Client
from llambo.mesh.service import clock
from llambo.mesh.wire.errors import Code, LlamboError

log = logging.getLogger(__name__)

#: Rounds of questions begin so far from each other, and in a mesh whose answers take long no further than this.
ROUND_S, LONGEST_ROUND_S = 0.2, 0.8
#: No more than this part of the time is spent on questions, as long as that holds.
SHARE = 0.2
#: What has not been answered by then is said to be unknown.
PATIENCE_S = 2.0
#: Something is sent after so long a silence: a connection that is dead is noticed by who writes to it.
QUIET_S = 10.0
#: Viewers of one gateway.
VIEWERS = 64

_encode = msgspec.json.Encoder().encode


class Watch:
    """One identity's view. `connect` gives its client; `stopping`: nobody shall be kept waiting any more."""

    def __init__(self, connect: Callable[[], Awaitable[Client]], stopping: Callable[[], bool]) -> None:
        self._connect, self._stopping = connect, stopping
        self._picture = watch_core.EMPTY
        #: How many pictures there have been; the last change leads from the one before to this one.
        self._version = 0
        self._change = b""
        self._whole = b""
        self._news = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._error: LlamboError | None = None
        self.viewers = 0

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events for one viewer, until he is gone."""
        seen = 0
        while True:
            if self._error is not None:
                raise self._error
            if self._version == seen:
                try:
                    async with asyncio.timeout(QUIET_S):
                        await self._later(seen)
                except TimeoutError:
                    yield b": still here\n\n"
                continue
            event = self._change if seen and self._version == seen + 1 else self._all()
            seen = self._version
            yield event

    @property
    def failed(self) -> bool:
        return self._error is not None

    async def _later(self, seen: int) -> None:
        async with self._news:
            await self._news.wait_for(lambda: self._version != seen or self._error is not None)

    def _all(self) -> bytes:
        if not self._whole:
            self._whole = _event(watch_core.whole(self._picture, clock.wall_ms()))
        return self._whole

    # --- asking --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self.viewers += 1
        if self._task is None:
            self._task = asyncio.create_task(self._ask_on())

    async def end(self) -> None:
        self.viewers -= 1
        if not self.viewers and self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.wait([task])

    async def _ask_on(self) -> None:
        try:
            while not self._stopping():
                began = time.monotonic()
                await self._show(await self._look())
                spent = time.monotonic() - began
                await asyncio.sleep(max(0.0, min(LONGEST_ROUND_S, max(ROUND_S, spent / SHARE)) - spent))
            await self._fail(LlamboError(Code.NO_BROKER, "the gateway stops"))
        except asyncio.CancelledError:
            raise
        except LlamboError as error:
            await self._fail(error)
        except Exception as error:
            log.exception("the dashboard's questions failed")
            await self._fail(LlamboError(Code.INTERNAL, f"the gateway failed: {error!r}"))

    async def _look(self) -> Picture:
        """What is known now. What is no answer at all, but a refusal, is raised."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                client = await self._connect()
                return await self._asked(client)
        except TimeoutError:
            return watch_core.troubled(self._picture, f"no broker has answered for {PATIENCE_S:.0f} s")
        except LlamboError as error:
            if not error.retryable:
                raise
            return watch_core.troubled(self._picture, error.text)

    async def _asked(self, client: Client) -> Picture:
        before = self._picture
        told = await _answers(client, before)
        if watch_core.is_another(before, told.status, clock.wall_ms()):
            before = watch_core.EMPTY
            told = await _answers(client, before)
            self._version += 1  # nobody can follow from the picture before
        return watch_core.picture(before, told, clock.wall_ms())

    async def _show(self, now: Picture) -> None:
        said = watch_core.changes(self._picture, now, clock.wall_ms())
        self._picture = now
        if said is None:
            return
        async with self._news:
            self._version += 1
            self._change, self._whole = _event(said), b""
            self._news.notify_all()

    async def _fail(self, error: LlamboError) -> None:
        async with self._news:
            self._error = error
            self._task = None
            self._news.notify_all()


class Watches:
    """All of them, by the name of who looks."""

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self._stopping = stopping
        self._by_name: dict[str, Watch] = {}
        self.viewers = 0

    @asynccontextmanager
    async def viewing(self, name: str, connect: Callable[[], Awaitable[Client]]) -> AsyncIterator[Watch]:
        if self.viewers >= VIEWERS:
            raise LlamboError(Code.BUSY, f"{VIEWERS} are watching already", 5_000)
        watch = self._by_name.get(name)
        if watch is None or watch.failed:
            watch = self._by_name[name] = Watch(connect, self._stopping)
        self.viewers += 1
        watch.begin()
        try:
            yield watch
        finally:
            self.viewers -= 1
            await watch.end()
            if not watch.viewers and self._by_name.get(name) is watch:
                del self._by_name[name]


async def _answers(client: Client, before: Picture) -> Answers:
    return Answers(
        *await asyncio.gather(
            client.query("status"),
            client.query("workers"),
            client.query("requests"),
            client.query("events", str(before.last_event)),
            client.query("recent", str(before.last_sample)),
        )
    )


def _event(said: dict[str, Any]) -> bytes:
    """One line: in JSON no line break stands as itself."""
    return b"data: %s\n\n" % _encode(said)
