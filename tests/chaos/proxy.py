"""A TCP proxy between one worker and its brokers that can make every connection as bad as a network can.

It listens on a loopback address of its own, at the brokers' ports: a peer joins the ports of a welcome to the host
that it reached, so everything it does goes through here. There is one for each worker, in the harness's own loop.

    cut         connections are reset; new ones are welcome
    hold        nothing passes, in neither direction; connections stay
    halfopen    nothing passes towards the broker
    delay       everything passes later
    throttle    so many bytes a second
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from llambo.mesh.link import sockets

#: A worker uses these two of a broker's ports.
PLANES = {"control": sockets.WORKER_OFFSET, "tokens": sockets.TOKENS_IN_OFFSET}
READ_BYTES = 16 * 1024
#: What may wait inside for one direction of one connection. Then TCP itself pushes back, as a full network would.
QUEUED_READS = 64


class Gate:
    """One plane of one worker, to all brokers."""

    def __init__(self) -> None:
        self.open = {"up": asyncio.Event(), "down": asyncio.Event()}
        self.delay_ms = 0
        self.bytes_per_s = 0
        self.connections: set[asyncio.StreamWriter] = set()
        self.heal()

    def suffer(self, kind: str, amount: int) -> None:
        match kind:
            case "cut":
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
        self.delay_ms = self.bytes_per_s = 0

    def cut(self) -> None:
        for writer in list(self.connections):
            writer.transport.abort()


class Proxy:
    """All connections of one worker."""

    def __init__(self, host: str, broker: str, ports: Iterable[int]) -> None:
        self.host = host
        self._broker = broker
        self._ports = list(ports)
        self._gates = {plane: Gate() for plane in PLANES}
        self._servers: list[asyncio.Server] = []
        self._pairs: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        for base in self._ports:
            for plane, offset in PLANES.items():
                await self._listen(self._gates[plane], base + offset)

    async def _listen(self, gate: Gate, port: int) -> None:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            pair = asyncio.current_task()
            assert pair is not None
            self._pairs.add(pair)
            pair.add_done_callback(self._pairs.discard)
            await self._pass_on(gate, port, reader, writer)

        self._servers.append(await asyncio.start_server(accept, self.host, port, limit=READ_BYTES))

    def suffer(self, kind: str, what: str, amount: int) -> None:
        for gate in self._meant(what):
            gate.suffer(kind, amount)

    def heal(self, what: str) -> None:
        for gate in self._meant(what):
            gate.heal()

    def _meant(self, what: str) -> list[Gate]:
        return [gate for plane, gate in self._gates.items() if what in ("", "both", plane)]

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for gate in self._gates.values():
            gate.heal()
            gate.cut()
        for pair in list(self._pairs):
            pair.cancel()
        await asyncio.gather(*self._pairs, return_exceptions=True)

    # --- one connection ------------------------------------------------------------------------------

    async def _pass_on(self, gate: Gate, port: int, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        try:
            far, forth = await asyncio.open_connection(self._broker, port, limit=READ_BYTES)
        except OSError:  # the broker is away
            back.transport.abort()
            return
        gate.connections |= {back, forth}
        try:
            # A worker that was reset, or a broker, ends both directions: half a connection is of no use to ZeroMQ.
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
    """Reads on while what was read waits for its time, or delay would be a throttle too."""
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_READS)
    read = asyncio.create_task(_fill(gate, queue, reader))
    loop = asyncio.get_running_loop()
    try:
        while True:
            due, data = await queue.get()
            await asyncio.sleep(max(0.0, due - loop.time())) if due > loop.time() else None
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
