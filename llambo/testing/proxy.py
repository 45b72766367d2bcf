"""A TCP proxy in front of the sockets of brokers that can disturb each plane of a link alone.

It listens on a loopback address of its own, at the ports of the brokers: a peer joins the ports of a welcome to the
host that it reached, so everything it does goes through here. `Proxy` runs on the event loop of its user,
`ThreadedProxy` on a thread.

    cut         connections are reset; new ones are accepted
    refuse      connections are reset, and so is each new one
    hold        nothing passes in either direction, and connections stay open: a pulled cable
    halfopen    nothing passes towards the broker
    delay       all data is delayed by so many milliseconds
    throttle    so many bytes a second
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable
from typing import Any, Literal, TypeVar

from llambo.mesh.link import sockets

Plane = Literal["client control", "worker control", "worker tokens", "client tokens"]
OFFSETS: dict[Plane, int] = {
    "client control": 0,
    "worker control": sockets.WORKER_OFFSET,
    "worker tokens": sockets.TOKENS_IN_OFFSET,
    "client tokens": sockets.TOKENS_OUT_OFFSET,
}
#: Any address of 127/8 is this machine.
PROXY_HOST, BROKER_HOST = "127.0.0.2", "127.0.0.1"
READ_BYTES = 16 * 1024
#: Reads that are queued for one direction of one connection. Beyond that TCP applies backpressure, as a network does.
QUEUED_READS = 64
ANSWER_S = 10.0

T = TypeVar("T")


class Gate:
    """One plane, to all brokers."""

    def __init__(self) -> None:
        self.open = {"up": asyncio.Event(), "down": asyncio.Event()}
        self.refusing = False
        self.delay_ms = 0
        self.bytes_per_s = 0
        #: How many connections were made so far, and those that are open.
        self.count = 0
        self.connections: set[asyncio.StreamWriter] = set()
        self.heal()

    def inject_fault(self, kind: str, amount: int) -> None:
        match kind:
            case "cut":
                self.cut()
            case "refuse":
                self.refusing = True
                self.cut()
            case "hold":
                self.open["up"].clear()
                self.open["down"].clear()
            case "halfopen":
                self.open["up"].clear()
            case "delay":
                self.delay_ms = amount
            case "throttle":
                self.bytes_per_s = amount
            case _:
                raise ValueError(f"a proxy cannot {kind}")

    def heal(self) -> None:
        self.open["up"].set()
        self.open["down"].set()
        self.refusing = False
        self.delay_ms = self.bytes_per_s = 0

    def cut(self) -> None:
        for writer in list(self.connections):
            writer.transport.abort()


class Proxy:
    """All connections to these planes of the brokers at `host`, whose base ports are `ports`."""

    def __init__(self, listen: str, host: str, ports: Iterable[int], planes: Iterable[Plane] = tuple(OFFSETS)) -> None:
        self.host = listen
        self._broker = host
        self._ports = list(ports)
        self._gates = {plane: Gate() for plane in planes}
        self._servers: list[asyncio.Server] = []
        self._pairs: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        for base in self._ports:
            for plane, gate in self._gates.items():
                await self._listen(gate, base + OFFSETS[plane])

    async def _listen(self, gate: Gate, port: int) -> None:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            pair = asyncio.current_task()
            assert pair is not None
            self._pairs.add(pair)
            pair.add_done_callback(self._pairs.discard)
            await self._connect(gate, port, reader, writer)

        self._servers.append(await asyncio.start_server(accept, self.host, port, limit=READ_BYTES))

    def inject_fault(self, kind: str, planes: Iterable[Plane], amount: int = 0) -> None:
        for plane in planes:
            self._gates[plane].inject_fault(kind, amount)

    def heal(self, planes: Iterable[Plane]) -> None:
        for plane in planes:
            self._gates[plane].heal()

    def connections(self, plane: Plane) -> int:
        """How many connections were made so far."""
        return self._gates[plane].count

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for gate in self._gates.values():
            gate.heal()
            gate.cut()
        for pair in list(self._pairs):
            pair.cancel()
        await asyncio.gather(*self._pairs, return_exceptions=True)

    async def _connect(self, gate: Gate, port: int, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        gate.count += 1
        if gate.refusing:
            back.transport.abort()
            return
        try:
            far, forth = await asyncio.open_connection(self._broker, port, limit=READ_BYTES)
        except OSError:  # there is no broker
            back.transport.abort()
            return
        gate.connections |= {back, forth}
        try:
            # If one end is reset, both directions end, because ZeroMQ cannot use half a connection.
            tasks = [
                asyncio.create_task(_pump(gate, "up", near, forth)),
                asyncio.create_task(_pump(gate, "down", far, back)),
            ]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            gate.connections -= {back, forth}
            back.transport.abort()
            forth.transport.abort()


async def _pump(gate: Gate, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reading continues while data waits for its time, or a delay would limit the rate as well."""
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_READS)
    read = asyncio.create_task(_fill(gate, queue, reader))
    loop = asyncio.get_running_loop()
    try:
        while True:
            due, data = await queue.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            await gate.open[direction].wait()
            if not data:
                return
            if gate.bytes_per_s:
                await asyncio.sleep(len(data) / gate.bytes_per_s)
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        return
    finally:
        read.cancel()


async def _fill(gate: Gate, queue: asyncio.Queue[tuple[float, bytes]], reader: asyncio.StreamReader) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            data = await reader.read(READ_BYTES)
        except ConnectionError:
            data = b""
        await queue.put((loop.time() + gate.delay_ms / 1000, data))
        if not data:
            return


class ThreadedProxy:
    """A proxy in front of one broker, on a thread of its own. A fault is in force when its call returns."""

    def __init__(self, port: int) -> None:
        self.address = sockets.endpoint(PROXY_HOST, port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._proxy = Proxy(PROXY_HOST, BROKER_HOST, [port])

    def __enter__(self) -> ThreadedProxy:
        self._thread.start()
        self._run(self._proxy.start())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._proxy.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(ANSWER_S)
        self._loop.close()

    def inject_fault(self, plane: Plane, kind: str, amount: int = 0) -> None:
        async def inject() -> None:
            self._proxy.inject_fault(kind, [plane], amount)

        self._run(inject())

    def heal(self, plane: Plane) -> None:
        async def heal() -> None:
            self._proxy.heal([plane])

        self._run(heal())

    def connections(self, plane: Plane) -> int:
        return self._proxy.connections(plane)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(ANSWER_S)
