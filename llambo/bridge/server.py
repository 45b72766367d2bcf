"""The bridge: takes connections, counts them, and leaves in good order. One mesh client serves them all."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from dataclasses import dataclass

from llambo.bridge import facts as f
from llambo.bridge import saying
from llambo.bridge.connection import Connection
from llambo.bridge.connection_core import Terms
from llambo.bridge.door import BACKLOG, Door
from llambo.mesh.client.client import Client
from llambo.mesh.wire.errors import Code, ErrorInfo

#: At the end a peer has so long to read what it was told.
LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    connections: int = 256
    #: How long answers under way get to finish when the bridge stops.
    leave_ms: int = 10_000


class Bridge:
    def __init__(self, client: Client, door: Door, terms: Terms, limits: Limits) -> None:
        self.client = client
        self.terms = terms
        self._door = door
        self._limits = limits
        self._connections: set[Connection] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self._hang_ups = HangUps()

    async def run(self, announce: Callable[[], None]) -> None:
        """Until `stop`. What is under way then gets its time to finish, and a second `stop` cuts that short."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._accept, sock=self._door.socket, backlog=BACKLOG)
        try:
            announce()
            await self._stop.wait()
        finally:
            # First its name: as long as somebody listens there, nobody else takes it.
            self._door.vanish()
            server.close()
            await self._leave()
            self._hang_ups.close()

    def stop(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def numbers(self) -> dict[str, int]:
        answers = sum(connection.answers for connection in self._connections)
        return {"connections": len(self._connections), "answers": answers}

    # --- connections -----------------------------------------------------------------------------------------

    def joined(self, connection: Connection, transport: asyncio.Transport) -> None:
        self._connections.add(connection)
        self._empty.clear()
        self._hang_ups.watch(_descriptor(transport), lambda: connection.handle(f.PeerHungUp()))
        if self._stop.is_set():
            connection.handle(f.Stopping())

    def left(self, connection: Connection, transport: asyncio.Transport) -> None:
        self._connections.discard(connection)
        self._hang_ups.forget(_descriptor(transport))
        if not self._connections:
            self._empty.set()

    def _accept(self) -> asyncio.Protocol:
        if len(self._connections) >= self._limits.connections:
            return Refusal(self._limits.connections)
        return Connection(self)

    # --- the end ---------------------------------------------------------------------------------------------

    async def _leave(self) -> None:
        self._tell(f.Stopping())
        await self._until_empty(self._limits.leave_ms / 1_000)
        self._tell(f.TimeIsUp())
        await self._until_empty(LAST_WORDS_S)
        for connection in list(self._connections):
            connection.abort()
        await self._empty.wait()

    def _tell(self, fact: f.Fact) -> None:
        for connection in list(self._connections):
            connection.handle(fact)

    async def _until_empty(self, timeout_s: float) -> None:
        waiting = [asyncio.ensure_future(event.wait()) for event in (self._empty, self._hurry)]
        await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for each in waiting:
            each.cancel()


class Refusal(asyncio.Protocol):
    """Of a connection that is one too many."""

    def __init__(self, connections: int) -> None:
        self._connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        text = f"{self._connections} connections are open, and no more may be"
        transport.write(saying.as_line(saying.error(ErrorInfo(Code.OVER_LIMIT, text))))
        transport.close()


class HangUps:
    """Tells when a peer has closed its end for good, which reading does not show while nothing is read.

    To an epoll that asks for nothing the kernel still says this. On TCP it says so only after a reset: there a peer
    that has gone looks like one that has said all it had to say, until something is written.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._told: dict[int, Callable[[], None]] = {}
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._look)

    def watch(self, descriptor: int, told: Callable[[], None]) -> None:
        self._told[descriptor] = told
        self._epoll.register(descriptor, 0)

    def forget(self, descriptor: int) -> None:
        if self._told.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _look(self) -> None:
        for descriptor, _ in self._epoll.poll(0):
            # Once is enough, and it would be said again and again.
            told = self._told[descriptor]
            self.forget(descriptor)
            told()


def _descriptor(transport: asyncio.Transport) -> int:
    number: int = transport.get_extra_info("socket").fileno()
    return number
