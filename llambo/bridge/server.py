"""The bridge: accepts connections, counts them, and shuts down in good order. One mesh client serves them all."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from dataclasses import dataclass

from llambo.bridge import protocol
from llambo.bridge.connection import Connection, ConnectionLimits
from llambo.bridge.listener import BACKLOG, Listener
from llambo.mesh.client.client import Client
from llambo.mesh.wire.errors import Code, ErrorInfo

#: At the end of a shutdown, how long a peer has to read the last replies.
LAST_READ_S = 1.0


@dataclass(frozen=True, slots=True)
class BridgeLimits:
    connections: int = 256
    #: How long answers under way have to finish when the bridge stops.
    leave_ms: int = 10_000


class Bridge:
    def __init__(
        self, client: Client, listener: Listener, connection_limits: ConnectionLimits, limits: BridgeLimits
    ) -> None:
        self.client = client
        self.connection_limits = connection_limits
        self._listener = listener
        self._limits = limits
        self._connections: dict[int, Connection] = {}
        self._empty, self._stopped, self._hurried = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._empty.set()
        # Connections are registered for no events: epoll then still reports, once, that a peer has closed its socket,
        # which reading does not show while nothing is read. On TCP it reports only a reset; there a closed peer looks
        # like one that has ended its output, until something is written.
        self._hang_ups = select.epoll()

    async def run(self, on_listening: Callable[[], None]) -> None:
        """Serve until `stop`. Answers under way may then finish, for a time; a second `stop` ends that time."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._hang_ups.fileno(), self._find_hang_ups)
        server = await loop.create_server(self._accept, sock=self._listener.socket, backlog=BACKLOG)
        try:
            on_listening()
            await self._stopped.wait()
        finally:
            # First the file: while this process listens, another bridge refuses to take the path.
            self._listener.remove_file()
            server.close()
            await self._close_connections()
            loop.remove_reader(self._hang_ups.fileno())
            self._hang_ups.close()

    def stop(self) -> None:
        if self._stopped.is_set():
            self._hurried.set()
        self._stopped.set()

    def numbers(self) -> dict[str, int]:
        answers = sum(connection.answers for connection in self._connections.values())
        return {"connections": len(self._connections), "answers": answers}

    # --- called by connections -----------------------------------------------------------------------------

    def joined(self, connection: Connection, descriptor: int) -> None:
        self._connections[descriptor] = connection
        self._empty.clear()
        self._hang_ups.register(descriptor, select.EPOLLONESHOT)
        if self._stopped.is_set():
            connection.stop()

    def left(self, descriptor: int) -> None:
        del self._connections[descriptor]
        self._hang_ups.unregister(descriptor)
        if not self._connections:
            self._empty.set()

    # --- connections ---------------------------------------------------------------------------------------

    def _accept(self) -> asyncio.Protocol:
        if len(self._connections) >= self._limits.connections:
            return _Refusal(self._limits.connections)
        return Connection(self)

    def _find_hang_ups(self) -> None:
        for descriptor, _ in self._hang_ups.poll(0):
            self._connections[descriptor].hang_up()

    async def _close_connections(self) -> None:
        for connection in list(self._connections.values()):
            connection.stop()
        await self._until_empty(self._limits.leave_ms / 1_000)
        for connection in list(self._connections.values()):
            connection.cut_short()
        await self._until_empty(LAST_READ_S)
        for connection in list(self._connections.values()):
            connection.abort()
        await self._empty.wait()

    async def _until_empty(self, timeout_s: float) -> None:
        waiting = [asyncio.ensure_future(event.wait()) for event in (self._empty, self._hurried)]
        await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for each in waiting:
            each.cancel()


class _Refusal(asyncio.Protocol):
    """Of a connection above the limit."""

    def __init__(self, connections: int) -> None:
        self._connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        text = f"{self._connections} connections are open, which is the limit"
        transport.write(protocol.encode_line(protocol.error_reply(ErrorInfo(Code.OVER_LIMIT, text))))
        transport.close()
