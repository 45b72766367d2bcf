"""A broker whose sockets belong to another process: it is restarted, and its ports never close."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from llambo import Client
from llambo.mesh.service.service_manager import NAMES
from llambo.testing.mesh import Mesh
from llambo.testing.processes import TIMEOUT_S
from tests.integration.test_broker_restart import FAKE, STREAMS, one

#: As systemd does it: descriptors from 3 on, and the child's own id, which is known only to the child.
LAUNCH = """
import os, sys
given, notify, names, *command = sys.argv[1:]
os.dup2(int(notify), 200)
high = [os.dup2(int(fd), 100 + n) for n, fd in enumerate(given.split(","))]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(high)), "LISTEN_FDNAMES": names}
os.execv(sys.executable, [sys.executable, *command])
"""


class Parent:
    """Holds the sockets, and starts one broker after the other."""

    def __init__(self, order: tuple[int, ...], names: str) -> None:
        self.sockets = _four_in_a_row()
        self.port: int = self.sockets[0].getsockname()[1]
        self._given = [self.sockets[place].fileno() for place in order]
        self._names = names
        self.broker = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        ready, theirs = os.pipe()
        given = ",".join(map(str, self._given))
        command = [
            "-m",
            "llambo.cli.services.broker",
            "--port",
            "1",
            "--notify-fd",
            "200",
            "--parent",
            str(os.getpid()),
        ]
        broker = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, given, str(theirs), self._names, *command], pass_fds=[*self._given, theirs]
        )
        os.close(theirs)
        with os.fdopen(ready) as pipe:
            assert pipe.readline().strip() == str(self.port)
        return broker

    def restart(self, how: signal.Signals) -> None:
        self.broker.send_signal(how)
        self.broker.wait(TIMEOUT_S)
        self.broker = self._start()

    def close(self) -> None:
        self.broker.terminate()
        self.broker.wait(TIMEOUT_S)
        for there in self.sockets:
            there.close()


def _four_in_a_row() -> list[socket.socket]:
    while True:
        first = socket.create_server(("127.0.0.1", 0), backlog=128)
        four = [first]
        try:
            for number in range(1, 4):
                four.append(socket.create_server(("127.0.0.1", first.getsockname()[1] + number), backlog=128))
        except OSError:
            for there in four:
                there.close()
            continue
        return four


@contextlib.contextmanager
def knocking(port: int) -> Iterator[list[str]]:
    """Connect all the time; the errors of connections that failed."""
    refused: list[str] = []
    over = threading.Event()

    def connect() -> None:
        while not over.is_set():
            for number in range(4):
                try:
                    socket.create_connection(("127.0.0.1", port + number), TIMEOUT_S).close()
                except OSError as error:
                    refused.append(f"port {port + number}: {error}")
            over.wait(0.02)

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        yield refused
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(
    ("how", "order", "names"),
    [
        (signal.SIGTERM, (3, 1, 0, 2), "llambo-broker.socket:" * 3 + "llambo-broker.socket"),
        (signal.SIGKILL, (2, 3, 1, 0), ":".join(NAMES[place] for place in (2, 3, 1, 0))),
    ],
    ids=["terminated, by ports", "killed, by names"],
)
async def test_a_restart_closes_no_port_and_loses_no_token(
    how: signal.Signals, order: tuple[int, ...], names: str
) -> None:
    parent = Parent(order, names)
    mesh = Mesh(workers=0, fake=FAKE, broker="process")
    try:
        address = f"tcp://127.0.0.1:{parent.port}"
        workers = [mesh.spawn(f"w{number}", address) for number in range(2)]
        for worker in workers:
            worker.first_line()
        with knocking(parent.port) as refused:
            async with Client(address) as client, asyncio.TaskGroup() as group:
                begun = [asyncio.Event() for _ in range(STREAMS)]
                asked = [group.create_task(one(client, number, event)) for number, event in enumerate(begun)]
                for event in begun:
                    await event.wait()
                await asyncio.to_thread(parent.restart, how)
                stalls = [await task for task in asked]
                counters = (await client.status()).counters
        print(f"longest silence {max(stalls) * 1000:.0f} ms, {counters['adopted']} of {STREAMS} adopted")
        assert not refused
        assert counters["adopted"] == STREAMS
    finally:
        mesh.close()
        parent.close()
