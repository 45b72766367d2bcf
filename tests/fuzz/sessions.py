"""Thousands of hostile connections to a broker that serves meanwhile: bounded in number and time, on loopback.

    python -m tests.fuzz sessions --count 10000 --idle 1000

Each opens a connection to one of the four sockets, does one of the actions of `wire`, and ends in one of the ways there
are: closed, reset, or left open until a hundred others are. Beside them so many are idle for all of the time, half of
them without a word, the others after a handshake.
"""

from __future__ import annotations

import random
import resource
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from llambo.broker.config import BrokerConfig
from llambo.mesh.client.client import Client
from llambo.testing.mesh import Mesh
from llambo.worker.config import FakeOptions
from tests.fuzz import honest, wire

#: Connections that are made at a time.
THREADS = 8
#: Those that are neither closed nor reset stay, and the oldest goes when there are more.
LEFT_OPEN = 100
#: How long the honest client is watched alone, before and after.
ALONE_S = 5.0
#: How long a broker may take to close connections without a peer; libzmq gives a handshake five seconds.
SETTLE_S = 20.0


@dataclass
class Report:
    sessions: int = 0
    seconds: float = 0.0
    actions: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    idle: int = 0
    descriptors: dict[str, int] = field(default_factory=dict)
    rss_mib: dict[str, float] = field(default_factory=dict)
    tallies: dict[str, dict[str, Any]] = field(default_factory=dict)
    alive: bool = False

    @property
    def settled(self) -> bool:
        return self.descriptors["after"] <= self.descriptors["before"]


class Crowd:
    """Those connections that are left open for a while."""

    def __init__(self) -> None:
        self._open: deque[socket.socket] = deque()
        self._lock = Lock()

    def leave(self, raw: socket.socket, most: int = LEFT_OPEN) -> None:
        with self._lock:
            self._open.append(raw)
            gone = [self._open.popleft() for _ in range(max(0, len(self._open) - most))]
        for each in gone:
            each.close()

    def close(self) -> None:
        for raw in self._open:
            raw.close()
        self._open.clear()


def raise_descriptor_limit(wanted: int) -> None:
    """Of this process and of those that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def one(port: int, seed: str, crowd: Crowd) -> tuple[str, bool]:
    """One session. The name of its action, and whether the broker hung up before it was done."""
    chance = random.Random(seed)
    offset, action = chance.randrange(4), chance.choice(wire.ACTIONS)
    try:
        raw = wire.connect(port + offset)
    except OSError:
        return "no connection", True
    cut = False
    try:
        action(chance, raw, offset)
        if chance.random() < 0.2:
            raw.settimeout(0.05)
            raw.recv(4_096)
    except (OSError, ValueError):
        cut = True
    end = chance.random()
    if end < 0.4:
        wire.reset(raw)
    elif end < 0.8:
        raw.close()
    else:
        crowd.leave(raw)
    return action.__name__, cut


def idle(port: int, count: int, crowd: Crowd) -> int:
    """So many that do nothing, from now on. How many the broker took."""
    there = 0
    for number in range(count):
        offset = number % 4
        try:
            raw = wire.connect(port + offset)
            if number % 8 >= 4:
                wire.shake_hands(raw, wire.PARTNERS[offset])
        except OSError:
            continue
        crowd.leave(raw, most=count)
        there += 1
    return there


def descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def attack(mesh: Mesh, count: int, idlers: int, seed: str, alone_s: float = ALONE_S) -> Report:
    """The whole of it, against a mesh whose broker is a process."""
    assert mesh.process is not None
    report, pid, crowd, idle_crowd = Report(), mesh.process.pid, Crowd(), Crowd()

    def look(when: str) -> None:
        report.descriptors[when] = descriptors(pid)
        report.rss_mib[when] = round(mesh.broker_rss_bytes() / 2**20, 1)

    with honest.Honest(mesh.address) as watched:
        time.sleep(alone_s)
        look("before")
        watched.mark("during")
        began = time.monotonic()
        report.idle = idle(mesh.port, idlers, idle_crowd)
        look("idle")
        seeds = (f"{seed}/{number}" for number in range(count))
        with ThreadPoolExecutor(THREADS) as threads:
            while batch := list(islice(seeds, 500)):
                for action, cut in threads.map(lambda each: one(mesh.port, each, crowd), batch):
                    report.actions[action] += 1
                    report.refused += cut
        report.sessions, report.seconds = report.actions.total(), time.monotonic() - began
        look("during")
        crowd.close()
        idle_crowd.close()
        watched.mark("after")
        time.sleep(alone_s)
        settle(lambda: descriptors(pid) <= report.descriptors["before"])
        look("after")
    report.tallies, report.alive = watched.tallies, mesh.process.running
    return report


def settle(condition: Callable[[], bool]) -> bool:
    """Whether it became true in time."""
    until = time.monotonic() + SETTLE_S
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)  # there is no event for the descriptors of another process
    return True


def mesh_for_it() -> Mesh:
    # Sessions that vanish are forgotten soon, so that the next ones find room.
    config = BrokerConfig.of(client_lease_ms=2_000, hold_ms=2_000)
    return Mesh(1, fake=FakeOptions(slots=8, tokens_per_s=2_000), config=config, broker="process")


def main(count: int, idlers: int, seed: str) -> int:
    raise_descriptor_limit(4 * idlers + 1_000)
    with mesh_for_it() as mesh:
        report = attack(mesh, count, idlers, seed)
        answered = mesh.run(_ask(mesh))
    print(f"{report.sessions:,} hostile sessions in {report.seconds:.0f} s beside {report.idle:,} idle connections")
    print(f"actions: {dict(sorted(report.actions.items()))}")
    print(f"cut by the broker, or not let in: {report.refused:,}")
    print(f"descriptors of the broker: {report.descriptors}; RSS in MiB: {report.rss_mib}")
    print(honest.show(report.tallies))
    print(f"the broker {'lives, and answers' if report.alive and answered else 'is gone'}")
    faults = honest.faults_of(report.tallies)
    return int(not (report.alive and answered and report.settled and not faults))


async def _ask(mesh: Mesh) -> bool:
    async with Client(mesh.address) as client:
        return (await client.generate("after", max_tokens=3, model="fake")).reason == "length"
