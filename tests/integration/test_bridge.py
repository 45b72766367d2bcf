"""The bridge on real sockets, in front of a mesh of fake engines."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest

from llambo.bridge.connection import ConnectionLimits
from llambo.bridge.server import Bridge, BridgeLimits, Listener, open_tcp, open_unix
from llambo.testing.mesh import Mesh
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import FakeOptions

#: At once; many programs may have no other way to the mesh.
CROWD = 200
#: So many of these are more than the buffers between two processes hold. Few long ones take the bridge less time.
PINGS, PING = 10_000, b"PING" + 59 * b" " + b"\n"
ENDLESS = {"prompt": "p", "max_tokens": 100_000}


class Peer:
    """The client end of a connection with lines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def say(self, *lines: str) -> None:
        self.writer.write("".join(f"{line}\n" for line in lines).encode())

    async def receive(self) -> dict[str, Any]:
        line = await self.reader.readline()
        assert line.endswith(b"\n"), f"the connection ended within a line: {line!r}"
        received: dict[str, Any] = json.loads(line)
        return received

    async def ask(self, line: str) -> dict[str, Any]:
        self.say(line)
        return await self.receive()

    async def stream(self, **request: Any) -> list[dict[str, Any]]:
        self.say(f"INFER_STREAM {json.dumps(request)}")
        received = [await self.receive()]
        while not received[-1]["final"]:
            received.append(await self.receive())
        return received

    async def ended(self) -> bool:
        return await self.reader.read() == b""

    def vanish(self) -> None:
        self.writer.transport.abort()


class Running:
    """A bridge that runs on this loop."""

    def __init__(self, bridge: Bridge, listener: Listener, task: asyncio.Task[None]) -> None:
        self.bridge, self.listener, self.task = bridge, listener, task

    @asynccontextmanager
    async def peer(self) -> AsyncIterator[Peer]:
        if self.listener.path is not None:
            streams = await asyncio.open_unix_connection(str(self.listener.path), limit=2**24)
        else:
            streams = await asyncio.open_connection(*self.listener.socket.getsockname(), limit=2**24)
        try:
            yield Peer(*streams)
        finally:
            streams[1].close()

    async def stop(self) -> None:
        self.bridge.stop()
        await self.task


@asynccontextmanager
async def bridge(
    mesh: Mesh,
    where: Path | None,
    *,
    each: ConnectionLimits | None = None,
    connections: int = 2 * CROWD,
    leave_ms: int = 5_000,
) -> AsyncIterator[Running]:
    async with mesh.client() as client:
        listener = open_unix(where) if where is not None else open_tcp(0)
        made = Bridge(client, listener, each or ConnectionLimits(), BridgeLimits(connections, leave_ms))
        began = asyncio.Event()
        task = asyncio.create_task(made.run(began.set))
        await began.wait()
        try:
            yield Running(made, listener, task)
        finally:
            if not task.done():
                made.stop()
                made.stop()
            await task
    listener.close()


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(1, fake=FakeOptions(tokens_per_s=50)) as mesh:
        yield mesh


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "b.sock"


async def test_answers_are_those_of_the_mesh(path: Path) -> None:
    with Mesh(1, fake=FakeOptions(utf8_split=True)) as mesh:
        async with bridge(mesh, path) as running, running.peer() as peer, mesh.client() as client:
            direct = await client.generate("hi", seed=7, max_tokens=40, form="user")
            request = {"prompt": "hi", "seed": 7, "max_tokens": 40}
            whole = await peer.ask(f"INFER {json.dumps(request)}")
            streamed = await peer.stream(**request)
            assert whole["data"]["text"] == direct.text == "".join(line["token"] for line in streamed)
            assert whole["message"] == streamed[-1]["message"] == "length"
            assert (await peer.ask("LOAD fake"))["data"]["workers"] == 1
            status = (await peer.ask("STATUS"))["data"]
            assert status["model"] == "fake" and status["mesh"]["workers"] == 1
            assert status["bridge"] == {"connections": 1, "answers": 1}


@pytest.mark.parametrize("tcp", [False, True])
async def test_a_crowd_is_served_at_once(path: Path, tcp: bool) -> None:
    """All are connected, and have asked, before the first one is read."""

    async def one(running: Running, number: int, all_there: asyncio.Barrier) -> str:
        async with running.peer() as peer:
            assert (await peer.ask("PING"))["message"] == "pong"
            await all_there.wait()
            received = await peer.stream(prompt=f"{number}", seed=number, max_tokens=20)
            assert received[-1]["status"] == "ok", received[-1]
            return "".join(line["token"] for line in received)

    with Mesh(2, fake=FakeOptions(slots=32)) as mesh:
        async with bridge(mesh, None if tcp else path) as running:
            all_there = asyncio.Barrier(CROWD)
            texts = await asyncio.gather(*[one(running, number, all_there) for number in range(CROWD)])
            async with mesh.client() as client:
                for number in (0, CROWD // 2, CROWD - 1):
                    direct = await client.generate(f"{number}", seed=number, max_tokens=20, form="user")
                    assert texts[number] == direct.text
            assert len(set(texts)) == CROWD


async def test_one_connection_too_many_gets_an_error(path: Path) -> None:
    with Mesh(0) as mesh:
        async with bridge(mesh, path, connections=1) as running:
            async with running.peer() as first, running.peer() as second:
                assert (await second.receive())["data"]["code"] == "over_limit"
                assert await second.ended()
                assert (await first.ask("PING"))["status"] == "ok"
                first.say("QUIT")
                assert (await first.receive())["message"] == "bye" and await first.ended()
            async with running.peer() as third:
                assert (await third.ask("PING"))["status"] == "ok"


async def test_the_limit_of_connections_holds_against_a_burst(path: Path) -> None:
    """All of them wait to be accepted before the bridge looks at the first."""
    with Mesh(0) as mesh:
        async with bridge(mesh, path, connections=3) as running:
            burst = []
            for _ in range(20):
                burst.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                burst[-1].connect(str(path))  # the kernel completes it; this loop has not run meanwhile
            peers = [Peer(*await asyncio.open_unix_connection(sock=each)) for each in burst]
            replies = await asyncio.gather(*[peer.ask("PING") for peer in peers])
            assert [reply["message"] for reply in replies].count("pong") == 3
            assert sum(reply["data"].get("code") == "over_limit" for reply in replies) == 17
            assert running.bridge.numbers()["connections"] == 3
            for peer in peers:
                peer.vanish()


@pytest.mark.parametrize("streamed", [False, True])
async def test_who_goes_away_cancels_what_it_asked(mesh: Mesh, path: Path, streamed: bool) -> None:
    cancelled = mesh.counter("cancelled")
    async with bridge(mesh, path) as running, running.peer() as peer:
        peer.say(f"INFER{'_STREAM' if streamed else ''} {json.dumps(ENDLESS)}", "PING")
        await mesh.aside(lambda core: core.state.registry.workers and core.state.running, "it runs")
        peer.vanish()
        await mesh.aside(lambda core: not core.state.running, "it does not run any more")
        assert running.bridge.numbers() == {"connections": 0, "answers": 0}
    assert mesh.counter("cancelled") == cancelled + 1


async def test_a_half_closed_connection_is_still_answered(mesh: Mesh, path: Path) -> None:
    async with bridge(mesh, path) as running, running.peer() as peer:
        peer.say('INFER {"prompt": "p", "max_tokens": 20}', "PING")
        peer.writer.write_eof()
        assert [(await peer.receive())["message"] for _ in range(2)] == ["length", "pong"]
        assert await peer.ended()


def read_all(slow: socket.socket) -> bytes:
    slow.settimeout(TIMEOUT_S)
    received = bytearray()
    while not received.endswith(b'"tag":"last"}\n'):
        received += slow.recv(2**20)
    return bytes(received)


async def test_a_slow_reader_delays_no_other(path: Path) -> None:
    """One asks for more than fits between it and the bridge, and reads nothing until all others are done."""
    with Mesh(2) as mesh:
        async with bridge(mesh, path) as running, running.peer() as other:
            slow = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            slow.connect(str(path))
            with slow:
                # More than fits between the two: it ends when the answer is being read.
                requests = (
                    b'INFER_STREAM {"prompt": "slow", "max_tokens": 10000, "seed": 1}\n'
                    + PINGS * PING
                    + b'PING {"tag": "last"}\n'
                )
                saying = asyncio.create_task(asyncio.to_thread(slow.sendall, requests))
                for number in range(20):
                    assert (await other.stream(prompt=f"{number}", max_tokens=50))[-1]["status"] == "ok"
                assert not saying.done()
                received = await asyncio.to_thread(read_all, slow)
                await saying
            tokens = received[: received.index(b"pong")].splitlines()[:-1]
            text = "".join(json.loads(line)["token"] for line in tokens)
            async with mesh.client() as client:
                assert text == (await client.generate("slow", max_tokens=10_000, seed=1, form="user")).text
            assert received.count(b"pong") == PINGS + 1


async def test_lines_that_mean_nothing_get_errors(path: Path) -> None:
    with Mesh(1) as mesh:
        async with bridge(mesh, path, each=ConnectionLimits(line_bytes=1_000)) as running, running.peer() as peer:
            peer.writer.write(b"\xff\xfe\nINFER \0\nfrob\n" + 5_000 * b"x" + b"\nINFER {\r\n\r\n")
            peer.say('INFER {"prompt": "p", "max_tokens": -1}', 'INFER {"prompt": "p", "top_k": "many"}', "LOAD other")
            codes = [(await peer.receive())["data"]["code"] for _ in range(8)]
            assert codes == 7 * ["bad_request"] + ["unknown_model"]
            assert (await peer.ask("PING"))["message"] == "pong"


async def test_programs_speak_msgpack(mesh: Mesh, path: Path) -> None:
    async with bridge(mesh, path) as running, running.peer() as peer:
        assert (await peer.ask("BINARY"))["data"] == {"format": "msgpack"}
        asked = [{"command": "INFER_STREAM", "prompt": f"{n}", "max_tokens": 30, "seed": n, "tag": n} for n in (1, 2)]
        peer.writer.write(b"".join(map(msgpack.packb, [*asked, {"command": "PING"}])))
        unpacker, texts, ended = msgpack.Unpacker(), {1: "", 2: ""}, 0
        while ended < 2:
            unpacker.feed(await peer.reader.read(7))
            for reply in unpacker:
                if "tag" in reply:
                    texts[reply["tag"]] += reply["token"]
                    ended += reply["final"]
        async with mesh.client() as client:
            for n, text in texts.items():
                assert text == (await client.generate(f"{n}", max_tokens=30, seed=n, form="user")).text


async def test_a_bridge_that_stops_lets_answers_finish(mesh: Mesh, path: Path) -> None:
    async with bridge(mesh, path) as running, running.peer() as idle, running.peer() as busy:
        assert (await idle.ask("PING"))["status"] == "ok"
        busy.say('INFER_STREAM {"prompt": "p", "max_tokens": 30}')
        assert not (await busy.receive())["final"]
        running.bridge.stop()
        assert await idle.ended()
        received = (await busy.reader.read()).splitlines()
        assert json.loads(received[-1])["message"] == "length"
        await running.task
    assert not path.exists()  # noqa: ASYNC240 - nothing else is going on here


@pytest.mark.parametrize("hurried", [False, True])
async def test_what_takes_too_long_is_cut_short(mesh: Mesh, path: Path, hurried: bool) -> None:
    async with bridge(mesh, path, leave_ms=60_000 if hurried else 1) as running, running.peer() as peer:
        peer.say(f"INFER_STREAM {json.dumps(ENDLESS)}")
        assert not (await peer.receive())["final"]
        running.bridge.stop()
        if hurried:
            running.bridge.stop()
        received = (await peer.reader.read()).splitlines()
        assert json.loads(received[-1])["data"]["code"] == "cancelled"
        await running.task
        await mesh.aside(lambda core: not core.state.running, "it does not run any more")


async def test_quit_stops_the_bridge_where_it_may(path: Path) -> None:
    with Mesh(0) as mesh:
        async with bridge(mesh, path, each=ConnectionLimits(quit_stops=True)) as running, running.peer() as peer:
            assert (await peer.ask("QUIT"))["message"] == "bye"
            await running.task


async def test_a_reset_over_tcp_cancels_too(mesh: Mesh) -> None:
    async with bridge(mesh, None) as running:
        peer = socket.create_connection(running.listener.socket.getsockname())
        peer.sendall(f"INFER {json.dumps(ENDLESS)}\n".encode())
        await mesh.aside(lambda core: core.state.running, "it runs")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        await mesh.aside(lambda core: not core.state.running, "it does not run any more")


async def test_answers_survive_their_worker(path: Path) -> None:
    with Mesh(2, fake=FakeOptions(tokens_per_s=100)) as mesh:
        async with bridge(mesh, path) as running, running.peer() as peer:
            peer.say('INFER_STREAM {"prompt": "p", "max_tokens": 60, "seed": 3}')
            received = [await peer.receive()]
            (name,) = mesh.look(lambda core: [r.run.worker.name for r in core.state.running.values() if r.run.worker])
            next(worker for worker in mesh.workers if worker.name == name).send(signal.SIGKILL)
            while not received[-1]["final"]:
                received.append(await peer.receive())
            assert received[-1]["data"]["moves"] == 1
            async with mesh.client() as client:
                direct = await client.generate("p", max_tokens=60, seed=3, form="user")
            assert "".join(line["token"] for line in received) == direct.text
