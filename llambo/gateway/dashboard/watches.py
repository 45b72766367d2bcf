"""Viewers of the mesh, and the queries that are made once for all of them.

A `Watch` queries a broker several times a second, but only while it has viewers; viewers of one identity share it.
Nothing is queued for a viewer: it is sent what has changed since what it saw last, and a viewer that was too slow to
see every change is sent the whole picture when it is ready for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec

from llambo.gateway.dashboard import watch_core
from llambo.gateway.dashboard.watch_core import Answers, Message, Picture
from llambo.mesh.client.client import Client
from llambo.mesh.service import clock
from llambo.mesh.wire.errors import Code, LlamboError

log = logging.getLogger(__name__)

#: The time between the beginnings of two rounds of queries, and its limit where the answers take long.
ROUND_S, LONGEST_ROUND_S = 0.2, 0.8
#: The share of the time that is spent on queries, within that limit.
SHARE = 0.2
#: A round that takes longer has failed.
ROUND_TIMEOUT_S = 2.0
#: A comment is sent after this silence: a dead connection is noticed only by writing to it.
QUIET_S = 10.0
#: Viewers of one gateway.
VIEWERS = 64

_encode = msgspec.json.Encoder().encode


class Watch:
    """The view of one identity. `connect` returns its client; `stopping()` is true when the gateway shuts down."""

    def __init__(self, connect: Callable[[], Awaitable[Client]], stopping: Callable[[], bool]) -> None:
        self._connect, self._stopping = connect, stopping
        self._picture = watch_core.EMPTY
        #: Counts the pictures; `_change` leads from the previous one to this one.
        self._version = 0
        self._change = b""
        self._whole = b""
        self._news = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._error: LlamboError | None = None
        self.viewers = 0

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events for one viewer."""
        seen = 0
        while True:
            if self._error is not None:
                raise self._error
            if self._version == seen:
                try:
                    async with asyncio.timeout(QUIET_S):
                        await self._wait_for_news(seen)
                except TimeoutError:
                    yield b": still here\n\n"
                continue
            event = self._change if seen and self._version == seen + 1 else self._whole_event()
            seen = self._version
            yield event

    @property
    def failed(self) -> bool:
        return self._error is not None

    async def _wait_for_news(self, seen: int) -> None:
        async with self._news:
            await self._news.wait_for(lambda: self._version != seen or self._error is not None)

    def _whole_event(self) -> bytes:
        if not self._whole:
            self._whole = _event(watch_core.whole(self._picture, clock.wall_ms()))
        return self._whole

    def begin(self) -> None:
        self.viewers += 1
        if self._task is None:
            self._task = asyncio.create_task(self._query_loop())

    async def end(self) -> None:
        self.viewers -= 1
        if not self.viewers and self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.wait([task])

    async def _query_loop(self) -> None:
        try:
            while not self._stopping():
                began = time.monotonic()
                await self._show(await self._next_picture())
                spent = time.monotonic() - began
                await asyncio.sleep(max(0.0, min(LONGEST_ROUND_S, max(ROUND_S, spent / SHARE)) - spent))
            await self._fail(LlamboError(Code.NO_BROKER, "the gateway is stopping"))
        except asyncio.CancelledError:
            raise
        except LlamboError as error:
            await self._fail(error)
        except Exception as error:
            log.exception("the queries of the dashboard failed")
            await self._fail(LlamboError(Code.INTERNAL, f"the gateway failed: {error!r}"))

    async def _next_picture(self) -> Picture:
        """What is known now. Raises LlamboError if the broker refuses, and will refuse again."""
        try:
            async with asyncio.timeout(ROUND_TIMEOUT_S):
                client = await self._connect()
                return await self._query(client)
        except TimeoutError:
            return replace(self._picture, problem=f"no broker has answered for {ROUND_TIMEOUT_S:.0f} s")
        except LlamboError as error:
            if not error.retryable:
                raise
            return replace(self._picture, problem=error.text)

    async def _query(self, client: Client) -> Picture:
        before = self._picture
        answers = await _answers(client, before)
        if watch_core.is_another(before, answers.status, clock.wall_ms()):
            before = watch_core.EMPTY
            answers = await _answers(client, before)
            self._version += 1  # no change leads here from the picture before
        return watch_core.picture(before, answers, clock.wall_ms())

    async def _show(self, now: Picture) -> None:
        message = watch_core.changes(self._picture, now, clock.wall_ms())
        self._picture = now
        if message is None:
            return
        async with self._news:
            self._version += 1
            self._change, self._whole = _event(message), b""
            self._news.notify_all()

    async def _fail(self, error: LlamboError) -> None:
        async with self._news:
            self._error = error
            self._task = None
            self._news.notify_all()


class Watches:
    """All watches, by the name of the identity."""

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self._stopping = stopping
        self._by_name: dict[str, Watch] = {}
        self.viewers = 0

    @asynccontextmanager
    async def viewing(self, name: str, connect: Callable[[], Awaitable[Client]]) -> AsyncIterator[Watch]:
        if self.viewers >= VIEWERS:
            raise LlamboError(Code.BUSY, f"{VIEWERS} viewers are connected already", 5_000)
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
            client.status(),
            client.workers(),
            client.requests(),
            client.events(before.last_event),
            client.recent(before.last_sample),
        )
    )


def _event(message: Message) -> bytes:
    """On one line: JSON escapes line breaks."""
    return b"data: %s\n\n" % _encode(message)
