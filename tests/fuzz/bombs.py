"""Attacks that libzmq itself does not bound: endless messages, any number of subscriptions, and ways to abort it.

    python -m tests.fuzz bombs --limit-mib 1024

The broker has a limit of memory (RLIMIT_AS, where a unit of systemd has MemoryMax) and a supervisor that restarts it,
as systemd does. An honest client sends requests all the time. Measured: bytes sent, peak memory, how the broker ends,
how long it is away, and what the client sees.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import select
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from llambo.broker.config import BrokerConfig
from llambo.mesh.security import keys
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire import codec
from llambo.mesh.wire import messages as m
from llambo.testing.mesh import Mesh, key_folder, key_of
from llambo.testing.processes import TIMEOUT_S
from llambo.testing.raw_peer import RawPeer, inference_request
from llambo.worker.config import FakeOptions
from tests.fuzz import honest, members, wire

#: A bomb that has not killed the broker by then has failed, or was held off.
BOMB_S = 8.0
ALONE_S = 2.0
SAMPLE_S = 0.01
#: Parts of an endless message.
PART = bytes(60_000)
#: More than any queue of messages holds, and a PING behind every few of them.
FULL = 400_000
PINGED = 50
#: More than the peers that a broker has had until now.
NAMES = 300

#: Throws until it is stopped by an error or by the time; how many bytes (of pings: messages) went out. Those who write
#: ZMTP by hand have no key, and those of `members` have one where it is needed.
Bomb = Callable[[int, int, float, str], int]


# --- the bombs ---------------------------------------------------------------------------------------------------


def endless_message(port: int, offset: int, until: float, key: str) -> int:
    """Parts without a last one. libzmq stores them, and the broker never sees them."""
    with wire.connect(port + offset) as raw:
        wire.shake_hands(raw, wire.PARTNERS[offset])
        return _pour(raw, wire.frame(PART, wire.MORE), until)


def small_parts(port: int, offset: int, until: float, key: str) -> int:
    """The same with parts that libzmq keeps in blocks of its own, and it aborts when it gets no more of those."""
    with wire.connect(port + offset) as raw:
        wire.shake_hands(raw, wire.PARTNERS[offset])
        return _pour(raw, wire.frame(b"x", wire.MORE) * 20_000, until)


def long_subscriptions(port: int, offset: int, until: float, key: str) -> int:
    """Topics as long as a frame may be: libzmq keeps a node for each of their bytes."""
    return _subscribe(port, until, 900)


def many_subscriptions(port: int, offset: int, until: float, key: str) -> int:
    """As many topics as there is time for, each as long as a session's."""
    return _subscribe(port, until, 16)


def _subscribe(port: int, until: float, size: int) -> int:
    chunk = 200_000 // size
    sent = number = 0
    with wire.connect(port + 3) as raw:
        wire.shake_hands(raw, wire.PARTNERS[3])
        while time.monotonic() < until:
            topics = ((n.to_bytes(8, "little") * size)[:size] for n in range(number, number + chunk))
            data = b"".join(wire.frame(b"\1" + topic) for topic in topics)
            if not _send(raw, data):
                break
            number, sent = number + chunk, sent + len(data)
    return sent


def small_messages(port: int, offset: int, until: float, key: str) -> int:
    """Empty messages as fast as they go, without ever reading an answer."""
    with wire.connect(port + offset) as raw:
        wire.shake_hands(raw, wire.PARTNERS[offset])
        return _pour(raw, wire.frame(b"") * 20_000, until)


def ping_behind_a_full_queue(port: int, offset: int, until: float, key: str) -> int:
    """Fill a queue, let PINGs wait behind it, and reset: libzmq 4.3.5 aborts by an assertion."""
    sent = 0
    piece = (wire.frame(b"\1" if offset == 3 else b"T") * PINGED + wire.command(b"PING", b"\0\0")) * (FULL // PINGED)
    while time.monotonic() < until:
        try:
            raw = wire.connect(port + offset)
        except OSError:
            break  # it has worked
        try:
            wire.shake_hands(raw, wire.PARTNERS[offset])
            raw.settimeout(0.2)
            for at in range(0, len(piece), 65_536):
                sent += raw.send(piece[at : at + 65_536])
        except OSError:
            pass
        wire.reset(raw)
        time.sleep(0.05)  # its end comes, if it comes, with the next read of a thread that we cannot see
    return sent


def names_that_are_taken(port: int, offset: int, until: float, key: str) -> int:
    """Choose the names that libzmq, if rand() was not seeded, is about to give away: it aborts when they are taken."""
    first = (0x6B8B4567, 0xE43C9869)[offset]
    crowd: list[socket.socket] = []
    sent = 0
    with suppress(OSError):
        for number in range(NAMES):
            raw = wire.connect(port + offset)
            crowd.append(raw)
            # Every other one comes without a name, and is given the next.
            named = {"Identity": b"\0" + (first + number & 0xFFFFFFFF).to_bytes(4, "big")} if number % 2 else {}
            wire.shake_hands(raw, wire.PARTNERS[offset], **named)
            raw.sendall(wire.frame(b"hello"))
            sent += 1
        while time.monotonic() < until:
            wire.reset(crowd.pop())
            time.sleep(0.01)
            raw = wire.connect(port + offset)
            crowd.append(raw)
            wire.shake_hands(raw, wire.PARTNERS[offset])
            raw.sendall(wire.frame(b"hello"))
    for raw in crowd:
        raw.close()
    return sent


#: What is asked for by a client that reads a few bytes now and then, so that the kernel does not close its connection.
UNREAD: dict[str, Callable[[bytes], list[m.Message]]] = {
    "replays": lambda id: [m.Replay(id, 0)] * 250,
    "attaches": lambda id: [m.Attach(id)] * 250,
    "queries": lambda id: [
        m.Query(n, what) for n in range(1, 64) for what in ("events", "status", "requests", "recent")
    ],
}
UNREAD["replays and queries"] = lambda id: [*UNREAD["replays"](id)[::2], *UNREAD["queries"](id)[::2]]
ANSWER_TOKENS = 1_000


def unread(asked: str, port: int, offset: int, until: float, key: str) -> int:
    """Questions whose answers are some hundred times as long, as fast as they go."""
    id, sent = os.urandom(16), 0
    with RawPeer(port) as maker:
        maker.join_as_client()
        fields = {"max_tokens": ANSWER_TOKENS, "detached": True}
        maker.send_map(inference_request(id=id, **fields), b"hello")
        maker.expect(m.End)
        maker.send_messages(m.EndAck([id]), m.Goodbye())
    with wire.connect(port + offset) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        wire.shake_hands(raw, wire.PARTNERS[offset])
        raw.sendall(_bundle(codec.NO_SESSION, m.ClientHello()))
        welcome = b""
        while (at := welcome.find(b"session\xc4\x08")) < 0 or len(welcome) < at + 17:
            welcome += raw.recv(4_096)
        data = _bundle(welcome[at + 9 : at + 17], m.ClientHeartbeat(1), *UNREAD[asked](id))
        raw.settimeout(0.2)
        while time.monotonic() < until:
            with suppress(TimeoutError):
                raw.sendall(data)
                sent += len(data)
            if select.select([raw], [], [], 0)[0]:
                raw.recv(64 * 1024)
    return sent


def _bundle(session: bytes, *messages: m.Message) -> bytes:
    header, body = codec.encode(session, [(message, None) for message in messages])
    return wire.frame(header, wire.MORE) + wire.frame(body)


def _pour(raw: socket.socket, data: bytes, until: float) -> int:
    sent = 0
    while time.monotonic() < until and _send(raw, data):
        sent += len(data)
    return sent


def _send(raw: socket.socket, data: bytes) -> bool:
    try:
        raw.sendall(data)
    except OSError:
        return False
    return True


#: By name: the bomb, and at which of the four sockets it is thrown.
BOMBS: dict[str, tuple[Bomb, int]] = {
    **{f"endless message, port +{n}": (endless_message, n) for n in range(4)},
    "small parts without end, port +0": (small_parts, 0),
    "long subscriptions": (long_subscriptions, 3),
    "many subscriptions": (many_subscriptions, 3),
    "small messages, port +0": (small_messages, 0),
    "small messages, port +2": (small_messages, 2),
    **{f"ping behind a full queue, port +{n}": (ping_behind_a_full_queue, n) for n in range(4)},
    **{f"names that are taken, port +{n}": (names_that_are_taken, n) for n in range(2)},
    "endless message of a member": (members.endless_message, 0),
    "subscriptions of a member": (members.subscriptions, 3),
    "pings of a member": (members.ping_behind_a_full_queue, 0),
    "questions of a member": (members.questions, 0),
    **{f"unread {name}": (partial(unread, name), 0) for name in UNREAD},
}


def _throw(name: str, port: int, seconds: float, key: str, pipe: Any) -> None:
    bomb, offset = BOMBS[name]
    try:
        pipe.send(bomb(port, offset, time.monotonic() + seconds, key))
    except (OSError, AssertionError, zmq.ZMQError):
        pipe.send(0)


# --- the supervisor -----------------------------------------------------------------------------------------------


class Supervisor:
    """Starts the broker of a mesh again whenever it has ended, at once, and with the same limit."""

    def __init__(self, mesh: Mesh, limit_bytes: int) -> None:
        self.deaths: list[str] = []
        #: Seconds from each death until the next broker takes connections.
        self.away_s: list[float] = []
        self.first_bytes = self.peak_bytes = 0
        self._mesh = mesh
        self._limit = limit_bytes
        self._over = False
        self._bind()
        self._thread = threading.Thread(target=self._watch, name="supervisor")
        self._thread.start()

    def _bind(self) -> None:
        assert self._mesh.process is not None
        if self._limit:
            resource.prlimit(self._mesh.process.pid, resource.RLIMIT_AS, (self._limit, self._limit))

    def _watch(self) -> None:
        mesh = self._mesh
        while not self._over:
            process = mesh.process
            assert process is not None
            with suppress(OSError, IndexError):  # it may just have ended
                self.peak_bytes = max(self.peak_bytes, process.rss_bytes())
                self.first_bytes = self.first_bytes or self.peak_bytes
            if process.running:
                time.sleep(SAMPLE_S)
                continue
            died = time.monotonic()
            code = process.end()
            last = process.log().strip().splitlines()[-1:] or [""]
            self.deaths.append(f"{signal.Signals(-code).name if code < 0 else f'status {code}'}: {last[0][:100]}")
            process.close()
            mesh._start_broker()
            self._bind()
            self.away_s.append(time.monotonic() - died)

    def close(self) -> None:
        self._over = True
        self._thread.join(TIMEOUT_S)


@dataclass
class Report:
    name: str
    sent_mib: float = 0.0
    #: Of the broker before the attack, and at most.
    first_mib: float = 0.0
    peak_mib: float = 0.0
    seconds: float = 0.0
    deaths: list[str] = field(default_factory=list)
    away_s: list[float] = field(default_factory=list)
    tallies: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def faults(self) -> int:
        return honest.faults_of(self.tallies)

    def row(self) -> str:
        away = f"{max(self.away_s):.2f}" if self.away_s else "-"
        during = self.tallies["during"]
        death = self.deaths[0] if self.deaths else "lives"
        return (
            f"{self.name:<36}{self.sent_mib:>9.1f}{self.peak_mib:>9.0f}{len(self.deaths):>7}{away:>8}{during['answers']:>9}"
            f"{during['gap_ms'] / 1000:>7.2f}{during['most_ms'] / 1000:>8.2f}{self.faults:>7}  {death}"
        )


COLUMNS = {"sent MiB": 9, "peak MiB": 9, "deaths": 7, "away s": 8, "answers": 9, "gap s": 7, "most s": 8, "faults": 7}
HEAD = f"{'':<36}" + "".join(f"{name:>{width}}" for name, width in COLUMNS.items())


def attack(
    name: str, limit_bytes: int, seconds: float = BOMB_S, alone_s: float = ALONE_S, folder: Folder | None = None
) -> Report:
    """One bomb, at a broker of its own. With keys, those of `members` have a valid one, and the others none."""
    report = Report(name)
    config = BrokerConfig.of(queue_requests=5_000)
    spawning = multiprocessing.get_context("spawn")
    fake = FakeOptions(slots=8, tokens_per_s=1_000)
    key, own = (keys.to_line(key_of(folder, each)) if folder else "" for each in ("mallory", "honest"))
    with Mesh(1, fake=fake, config=config, broker="process", keys=folder) as mesh:
        supervisor = Supervisor(mesh, limit_bytes)
        try:
            with honest.Honest(mesh.address, key=own) as watched:
                time.sleep(alone_s)
                watched.mark("during")
                supervisor.first_bytes = 0
                began = time.monotonic()
                here, there = spawning.Pipe(duplex=False)
                thrower = spawning.Process(target=_throw, args=(name, mesh.port, seconds, key, there))
                thrower.start()
                there.close()
                report.sent_mib = here.recv() / 2**20 if here.poll(seconds + TIMEOUT_S) else -1.0
                thrower.join(TIMEOUT_S)
                report.seconds = time.monotonic() - began
                time.sleep(alone_s)  # until the honest client is answered again
                watched.mark("after")
                time.sleep(alone_s)
            report.tallies = watched.tallies
        finally:
            supervisor.close()
    report.first_mib, report.peak_mib = supervisor.first_bytes / 2**20, supervisor.peak_bytes / 2**20
    report.deaths, report.away_s = supervisor.deaths, supervisor.away_s
    return report


def main(names: list[str], limit_mib: int, seconds: float, *, keyed: bool) -> int:
    faults = 0
    print(f"RLIMIT_AS {limit_mib} MiB, {seconds:g} s each, {'with' if keyed else 'without'} keys\n{HEAD}", flush=True)
    with tempfile.TemporaryDirectory(prefix="llambo-fuzz-") as place:
        folder = key_folder(Path(place, "keys")) if keyed else None
        for name in names or BOMBS:
            report = attack(name, limit_mib * 2**20, seconds, folder=folder)
            faults += report.faults
            print(report.row(), flush=True)
    return int(bool(faults))
