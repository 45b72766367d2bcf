"""Mutated messages over real sockets, to the live broker and to live workers and clients, while others are served.

    python -m tests.fuzz live --count 1000000 --role broker|keyed-broker|worker|client

    broker   hostile clients and workers, which have joined, and both token planes; or with keys, which are all valid
    worker   a worker of two brokers: one is hostile, through the other one honest requests run on the same worker
    client   a program with two clients: the broker of one is hostile, the other one's answers have to be right

The target has to live, to take every message in time, and to serve the honest clients.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq

from llambo.broker.config import BrokerConfig
from llambo.mesh.link import sockets
from llambo.mesh.security import keys
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire import codec, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.identity import PeerKey
from llambo.testing.mesh import Mesh, key_folder, key_of
from llambo.worker.config import FakeOptions
from tests.fuzz import honest, plausible
from tests.fuzz.hostile_broker import HostileBroker
from tests.fuzz.hostile_peer import (
    ANEW_EVERY,
    ENDS_IT,
    HANG_S,
    LISTEN_EVERY,
    MODEL,
    HostilePeer,
    Report,
    Said,
    ends,
    judge,
    send_all,
    status,
    wait_to_send,
)

# --- against a broker ------------------------------------------------------------------------------------------


#: Hostile clients, and as many hostile workers.
PAIRS = 2


class Peer(HostilePeer):
    """A client or worker that joins and then sends arbitrary messages; a worker publishes as well."""

    def __init__(
        self, context: zmq.Context[Any], port: int, seed: str, *, worker: bool, key: PeerKey | None = None
    ) -> None:
        super().__init__(seed)
        self.sessions = 0
        self._worker = worker
        self._since = ANEW_EVERY
        self._name = key.name if key else f"hostile-{seed}"[:60]
        self._direction = "worker" if worker else "client"
        self._decoder: codec.Codec[Any] = codec.to_worker if worker else codec.to_client
        self.control = sockets.control(context, zmq.DEALER, curve=key)
        self.control.connect(f"tcp://127.0.0.1:{port + (sockets.WORKER_OFFSET if worker else 0)}")
        kind, offset = (zmq.XPUB, sockets.TOKENS_IN_OFFSET) if worker else (zmq.XSUB, sockets.TOKENS_OUT_OFFSET)
        self.tokens = sockets.token(context, kind, curve=key)
        self.tokens.connect(f"tcp://127.0.0.1:{port + offset}")

    def close(self) -> None:
        self.control.close(linger=0)
        self.tokens.close(linger=0)

    def send_one(self, sent: Counter[str]) -> None:
        self._since += 1
        if self._since >= ANEW_EVERY:
            self._join()
        if self._since % LISTEN_EVERY == 0:
            self._listen()
        if self.chance.random() < 0.25:
            frame = self.chunk() if self._worker else self._upstream()
            wait_to_send(self.tokens, [frame], "the token plane")
            sent["tokens" if self._worker else "subscriptions"] += 1
            return
        frames = self.message(self._direction, self._say)
        if frames and ends(frames, codec.from_worker if self._worker else codec.from_client):
            if self.chance.random() > ENDS_IT:
                return
            self._since = ANEW_EVERY
        wait_to_send(self.control, frames, "the broker")
        sent[self._direction] += bool(frames)

    def _say(self) -> Said:
        if self._worker:
            return plausible.from_worker(self.chance, self.alive, MODEL)
        return plausible.from_client(self.chance, self.alive, MODEL)

    def _upstream(self) -> bytes:
        """Filters that belong to no session, and bytes that are no filter."""
        topic = self.chance.choice((b"", self.chance.randbytes(16), self.chance.randbytes(self.chance.randrange(40))))
        return self.chance.choice((b"\1", b"\0", b"\2", b"")) + topic

    def _join(self) -> None:
        """A new session; what the last one had asked for ends with it."""
        self._since, self.alive = 0, []
        if self.session != codec.NO_SESSION:
            wait_to_send(self.control, codec.encode(self.session, [(m.Goodbye(), None)]), "the broker")
        hello: m.Message = m.ClientHello(name=self._name)
        if self._worker:
            hello = m.WorkerHello(self._name, self.chance.randbytes(8), [m.ModelInfo(MODEL)], 4)
        wait_to_send(self.control, codec.encode(codec.NO_SESSION, [(hello, None)]), "the broker")
        before, until = self.session, time.monotonic() + HANG_S
        while self.session == before:
            # The broker reads the hello after all that was sent before it: any answer is progress.
            assert self.control.poll(max(0, int((until - time.monotonic()) * 1_000))), f"no answer within {HANG_S} s"
            self._listen()
            until = time.monotonic() + HANG_S
        self.sessions += 1
        if self._worker:
            self.tokens.send(tokens.encode_beat(1, self.session))

    def _listen(self) -> None:
        with suppress(zmq.Again):
            for _ in range(1_000):
                bundle = self._decoder.decode(self.control.recv_multipart(zmq.DONTWAIT))
                assert not bundle.problems, f"the broker itself broke the protocol: {bundle.problems}"
                for message, _ in bundle.messages:
                    self._hear(bundle.session, message)
        if not self._worker:
            with suppress(zmq.Again):
                while True:
                    self.tokens.recv(zmq.DONTWAIT)

    def _hear(self, session: bytes, message: m.Message) -> None:
        match message:
            case m.Welcome(session, _, topic):
                self.session = session
                self.remember(session, topic)
            case m.Dispatch(id, dispatch):
                self.alive = [*self.alive[-8:], id + dispatch]
                self.remember(id, id + dispatch, dispatch)
            case m.Accepted(id):
                self.alive = [*self.alive[-8:], id]
                self.remember(id)
            case m.Problem(error) if error.code is Code.UNKNOWN_SESSION and session == self.session:
                self._since = ANEW_EVERY
            case _:
                pass


def against_keyed_broker(count: int, seed: str) -> Report:
    """The same with keys: each peer has a valid one."""
    with tempfile.TemporaryDirectory(prefix="llambo-fuzz-") as place:
        return against_broker(count, seed, key_folder(Path(place, "keys")))


def against_broker(count: int, seed: str, folder: Folder | None = None) -> Report:
    """Hostile clients and as many hostile workers, in turns; honest requests beside them."""
    report = Report("keyed broker" if folder else "broker")
    config = BrokerConfig.of(
        hold_ms=300, queue_ms=5_000, detached_bytes=2**20, startup_grace_ms=0, adopt_ms=200, orphan_ms=500
    )
    context: zmq.Context[Any] = zmq.Context()
    own = key_of(folder, "honest") if folder else None
    with Mesh(1, fake=FakeOptions(slots=8, tokens_per_s=2_000), config=config, broker="process", keys=folder) as mesh:
        assert mesh.process is not None
        peers = []
        for number in range(2 * PAIRS):
            worker = bool(number % 2)
            key = key_of(folder, f"mallory{number}", "worker" if worker else "client") if folder else None
            peers.append(Peer(context, mesh.port, f"{seed}/{number}", worker=worker, key=key))
        try:
            with honest.Honest(mesh.address, key=keys.to_line(own) if own else "") as watched:
                send_all(report, watched, count, [peer.send_one for peer in peers])
                mesh.run(status(mesh, own), 2 * HANG_S)
            report.tallies = watched.tallies
        finally:
            for peer in peers:
                peer.close()
            context.term()
        report.sessions = sum(peer.sessions for peer in peers)
        if not mesh.process.running:
            report.wrong.append("the broker is gone")
        judge(report, mesh)
    return report


def against_worker(count: int, seed: str) -> Report:
    report = Report("worker")
    context: zmq.Context[Any] = zmq.Context()
    broker = HostileBroker(context, seed, client=False)
    config = BrokerConfig.of(hold_ms=60_000)
    try:
        with Mesh(0, fake=FakeOptions(slots=32, tokens_per_s=2_000), config=config, broker="process") as mesh:
            worker = mesh.spawn("w0", mesh.address, broker.address)
            worker.first_line()
            broker.wait()
            with honest.Honest(mesh.address) as watched:
                send_all(report, watched, count, [broker.send_one])
            report.sessions = broker.sessions
            report.tallies = watched.tallies
            if not worker.running:
                report.wrong.append(f"the worker is gone:\n{worker.log()}")
            judge(report, mesh)
    finally:
        broker.close()
        context.term()
    return report


def against_client(count: int, seed: str) -> Report:
    report = Report("client")
    context: zmq.Context[Any] = zmq.Context()
    broker = HostileBroker(context, seed, client=True)
    try:
        with Mesh(1, fake=FakeOptions(slots=8, tokens_per_s=2_000), broker="process") as mesh:
            with honest.Honest(mesh.address, broker.address) as watched:
                broker.wait()
                send_all(report, watched, count, [broker.send_one])
            report.sessions = broker.sessions
            report.tallies = watched.tallies
            judge(report, mesh)
    finally:
        broker.close()
        context.term()
    return report


ROLES: dict[str, Callable[[int, str], Report]] = {
    "broker": against_broker,
    "keyed-broker": against_keyed_broker,
    "worker": against_worker,
    "client": against_client,
}


def main(roles: Sequence[str], count: int, seed: str) -> int:
    found = 0
    for role in roles:
        report = ROLES[role](count, seed)
        print(report.show(), flush=True)
        found += len(report.wrong)
    return int(bool(found))
