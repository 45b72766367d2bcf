"""A TCP proxy before the four sockets of a broker that can spoil each of them alone.

It listens on another loopback address at the broker's own ports: a peer joins the ports of a welcome to the host
that it reached, so everything it does goes through here.

    cut      reset every connection; new ones are welcome
    hold     keep connections, pass nothing on: a cable that was pulled
    refuse   reset every connection, and each new one
    heal     as if nothing had been
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Literal, TypeVar

from llambo.mesh.link import sockets

Plane = Literal["client control", "worker control", "worker tokens", "client tokens"]
Fault = Literal["cut", "hold", "refuse", "heal"]
OFFSETS: dict[Plane, int] = {
    "client control": 0,
    "worker control": sockets.WORKER_OFFSET,
    "worker tokens": sockets.TOKENS_IN_OFFSET,
    "client tokens": sockets.TOKENS_OUT_OFFSET,
}
#: Any address of 127/8 is this machine.
PROXY_HOST, BROKER_HOST = "127.0.0.2", "127.0.0.1"
ANSWER_S = 10.0

T = TypeVar("T")


class End(asyncio.Protocol):
    """One end of a connection; what it hears the other end says."""

    def __init__(self, gate: Gate) -> None:
        self.other: End | None = None
        self.transport: asyncio.Transport | None = None
        self._gate = gate
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._gate.enter(self)
        for data in self._early:
            transport.write(data)

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self.other.say(data)

    def say(self, data: bytes) -> None:
        if self.transport is None:
            self._early.append(data)
        else:
            self.transport.write(data)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None and not self._gate.held:
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._gate.ends.discard(self)
        if self.other is not None:
            self.other.abort()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Gate:
    """One plane."""

    def __init__(self, port: int) -> None:
        self.ends: set[End] = set()
        self.held = self.refusing = False
        self.connections = 0
        self._port = port
        self._dialling: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, PROXY_HOST, self._port)

    def _accept(self) -> End:
        near, far = End(self), End(self)
        near.other, far.other = far, near
        self.connections += 1
        dial = asyncio.get_running_loop().create_task(self._dial(near, far))
        self._dialling.add(dial)
        dial.add_done_callback(self._dialling.discard)
        return near

    async def _dial(self, near: End, far: End) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: far, BROKER_HOST, self._port)
        except OSError:
            near.abort()

    def enter(self, end: End) -> None:
        self.ends.add(end)
        if self.refusing:
            end.abort()
        elif self.held and end.transport is not None:
            end.transport.pause_reading()

    async def suffer(self, fault: Fault) -> None:
        self.held, self.refusing = fault == "hold", fault == "refuse"
        for end in list(self.ends):
            if fault in ("cut", "refuse"):
                end.abort()
            elif end.transport is not None:
                (end.transport.pause_reading if self.held else end.transport.resume_reading)()

    async def close(self) -> None:
        for dial in self._dialling:
            dial.cancel()
        await self.suffer("refuse")
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()


class Proxy:
    """Runs in a thread of its own; a fault is in force when its call returns."""

    def __init__(self, port: int) -> None:
        self.address = sockets.endpoint(PROXY_HOST, port)
        self._gates = {plane: Gate(port + offset) for plane, offset in OFFSETS.items()}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        for gate in self._gates.values():
            self._do(gate.open)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for gate in self._gates.values():
            self._do(gate.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(ANSWER_S)
        self._loop.close()

    def suffer(self, plane: Plane, fault: Fault) -> None:
        self._do(lambda: self._gates[plane].suffer(fault))

    def connections(self, plane: Plane) -> int:
        """How many were made through it so far."""
        return self._gates[plane].connections

    def _do(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(ANSWER_S)
