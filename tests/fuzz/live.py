"""Mutated messages over real sockets, to the live broker and to live workers and clients, while others are served.

    python -m tests.fuzz live --count 1000000 --role broker|worker|client

    broker   hostile clients and workers, which have joined, and both token planes
    worker   a worker of two brokers: one means harm, through the other one honest requests run on the same worker
    client   a program with two clients: the broker of one means harm, the other one's answers have to be right

Whoever is hit has to live, to take every message in time, and to serve everybody else.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import zmq

from llambo.broker.config import BrokerConfig
from llambo.mesh import codec, sockets, tokens
from llambo.mesh import messages as m
from llambo.mesh.client import Client
from llambo.mesh.errors import Code
from llambo.worker.knobs import FakeKnobs
from tests.fuzz import honest, plausible
from tests.fuzz.mutator import Mutator
from tests.fuzz.targets import Bodies, Frames, _chunk_mutant
from tests.integration.harness import Mesh
from tests.unit import samples

#: Whoever takes nothing for so long hangs.
HANG_S = 30.0
#: Replies are read after so many messages, and this often a peer begins anew.
LISTEN_EVERY = 16
ANEW_EVERY = 3_000
#: What would end a session, or the work of the one who is hit, is said this seldom: then he would be hit no more.
ENDS_IT = 0.0005
MODEL = "tiny"

Said = tuple[m.Message, bytes | None]


@dataclass
class Report:
    role: str
    sent: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    sessions: int = 0
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: What was not as it should be.
    wrong: list[str] = field(default_factory=list)

    def show(self) -> str:
        total = self.sent.total()
        lines = [
            f"live {self.role}: {total:,} mutated messages in {self.seconds:.0f} s ({total / self.seconds:,.0f} a second), "
            f"{dict(self.sent)}, {self.sessions:,} sessions",
            honest.show(self.told),
            *(f"FINDING {text}" for text in self.wrong),
            f"findings: {len(self.wrong)}",
        ]
        return "\n".join(lines)


class Gunner:
    """What all hostile peers have: a seed, what is alive, and messages that are almost right."""

    def __init__(self, seed: str) -> None:
        self.chance = random.Random(seed)
        self.mutator = Mutator(self.chance)
        self.bodies = {name: Bodies(name) for name in samples.CODECS}
        self.session = codec.NO_SESSION
        self.alive: list[bytes] = []

    def remember(self, *values: Any) -> None:
        self.mutator.pool = [*self.mutator.pool[-60:], *(value for value in values if value)]

    def message(self, direction: str, say: Callable[[], Said]) -> Frames:
        """Half plausible, half a sample with something in it changed."""
        if self.chance.random() < 0.5:
            return plausible.frames(self.mutator, self.session, [say()])
        bodies = self.bodies[direction]
        frames = bodies.mutate(self.mutator, self.chance.choice(bodies.seeds))
        return [codec.MAGIC + self.session, *frames[1:]] if frames and self.chance.random() < 0.95 else frames

    def chunk(self) -> bytes:
        key = (self.chance.choice(self.alive) if self.alive else bytes(24))[:24].ljust(24, b"d")
        frame = self.chance.choice(plausible.chunks(key, self.chance.choice((1, 3))))
        return frame if self.chance.random() < 0.3 else _chunk_mutant(self.mutator, [frame])[0]


def wait_to_send(socket: zmq.Socket[bytes], frames: Sequence[bytes], what: str) -> None:
    """It is taken in time, or this is a hang. A message without frames cannot be sent at all."""
    if not frames:
        return
    assert socket.poll(int(HANG_S * 1_000), zmq.POLLOUT), f"{what} takes nothing for {HANG_S} s"
    socket.send_multipart(list(frames), zmq.DONTWAIT)


# --- against a broker ------------------------------------------------------------------------------------------


class Peer(Gunner):
    """A client or worker that joins, and then says what it likes; a worker publishes as well."""

    def __init__(self, context: zmq.Context[Any], port: int, seed: str, *, worker: bool) -> None:
        super().__init__(seed)
        self.sessions = 0
        self._worker = worker
        self._since = ANEW_EVERY
        self._name = f"hostile-{seed}"[:60]
        self._direction = "worker" if worker else "client"
        self._decoder: codec.Codec[Any] = codec.to_worker if worker else codec.to_client
        self.control = sockets.control(context, zmq.DEALER)
        self.control.connect(f"tcp://127.0.0.1:{port + (sockets.WORKER_OFFSET if worker else 0)}")
        kind, offset = (
            (zmq.XPUB, sockets.TOKENS_IN_OFFSET) if worker else (zmq.XSUB, sockets.TOKENS_OUT_OFFSET)
        )
        self.tokens = sockets.token(context, kind)
        self.tokens.connect(f"tcp://127.0.0.1:{port + offset}")

    def close(self) -> None:
        self.control.close(linger=0)
        self.tokens.close(linger=0)

    def shoot(self, sent: Counter[str]) -> None:
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
        if frames and _ends(frames, codec.from_worker if self._worker else codec.from_client):
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
        """Filters that are nobody's, and what is none."""
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
            assert self.control.poll(max(0, int((until - time.monotonic()) * 1_000))), f"no welcome within {HANG_S} s"
            self._listen()
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


def _ends(frames: Frames, decoder: codec.Codec[Any]) -> bool:
    """Whether it would end what is going on here, by a right that nobody disputes."""
    ends = (m.Goodbye, m.Drain, m.ClientHello, m.WorkerHello, m.Welcome)
    return any(
        isinstance(message, ends)
        or (isinstance(message, m.Problem) and message.error.code is Code.UNKNOWN_SESSION)
        # Nobody is kept from draining an honest worker by its name, so nobody may guess it here.
        or (isinstance(message, m.DrainWorker) and message.worker == "w0")
        for message, _ in decoder.decode(frames).messages
    )


def against_broker(count: int, seed: str, peers: int = 2) -> Report:
    """`peers` hostile clients and as many hostile workers, in turns; honest requests beside them."""
    report = Report("broker")
    config = BrokerConfig(hold_ms=300, queue_ms=5_000, detached_bytes=2**20, young_ms=0, adopt_ms=200, orphan_ms=500)
    context: zmq.Context[Any] = zmq.Context()
    with Mesh(1, knobs=FakeKnobs(slots=8, tokens_per_s=2_000), config=config, broker="process") as mesh:
        assert mesh.process is not None
        gang = [Peer(context, mesh.port, f"{seed}/{n}", worker=bool(n % 2)) for n in range(2 * peers)]
        try:
            with honest.Honest(mesh.address) as watched:
                began = time.monotonic()
                watched.mark("during")
                _barrage(report, count, [peer.shoot for peer in gang])
                report.seconds = time.monotonic() - began
                watched.mark("after")
                mesh.run(_status(mesh))
            report.told = watched.told
        finally:
            for peer in gang:
                peer.close()
            context.term()
        report.sessions = sum(peer.sessions for peer in gang)
        if not mesh.process.running:
            report.wrong.append("the broker is gone")
        _judge(report, mesh)
    return report


def _barrage(report: Report, count: int, guns: Sequence[Callable[[Counter[str]], None]]) -> None:
    try:
        while report.sent.total() < count:
            for shoot in guns:
                shoot(report.sent)
    except AssertionError as error:
        report.wrong.append(str(error))


async def _status(mesh: Mesh) -> Any:
    """Everything that was sent before has been read when this is answered."""
    async with Client(mesh.address) as client:
        return await client.status()


def _judge(report: Report, mesh: Mesh) -> None:
    faults = sum(tally["wrong"] + sum(tally["errors"].values()) for tally in report.told.values())
    if faults:
        report.wrong.append(f"{faults} honest requests failed")
    if not all(tally["answers"] for name, tally in report.told.items() if name == "during"):
        report.wrong.append("nobody was served during it")
    for process in (*mesh.workers, *([mesh.process] if mesh.process else [])):
        if "Traceback" in process.written():
            report.wrong.append(f"{process.name} wrote:\n{process.written()[-2_000:]}")


# --- against workers and clients -------------------------------------------------------------------------------


class HostileBroker(Gunner):
    """Says welcome to whoever says hello, and then what it likes: to a worker, or with `client` to a client."""

    def __init__(self, context: zmq.Context[Any], seed: str, *, client: bool) -> None:
        super().__init__(seed)
        self._client = client
        self._seq = 0
        self._route = b""
        self._topic = bytes(16)
        self._queries: list[int] = []
        self.sessions = 0
        self.lost_s = 0.0
        self.control = sockets.control(context, zmq.ROUTER)
        self.tokens = sockets.token(context, zmq.XPUB if client else zmq.SUB)
        if not client:
            self.tokens.subscribe(b"")
        self.port = self.control.bind_to_random_port("tcp://127.0.0.1")
        self._token_port = self.tokens.bind_to_random_port("tcp://127.0.0.1")

    @property
    def address(self) -> str:
        """A worker adds one to the port that clients use."""
        return f"tcp://127.0.0.1:{self.port - (0 if self._client else sockets.WORKER_OFFSET)}"

    def close(self) -> None:
        self.control.close(linger=0)
        self.tokens.close(linger=0)

    def wait(self) -> None:
        """Until somebody has joined."""
        self._route, until = b"", time.monotonic() + HANG_S
        while not self._route:
            left_ms = int((until - time.monotonic()) * 1_000)
            assert left_ms > 0 and self.control.poll(left_ms), f"nobody said hello for {HANG_S} s"
            self._listen()

    def shoot(self, sent: Counter[str]) -> None:
        if sent.total() % LISTEN_EVERY == 0:
            self._listen()
        if not self._route:
            began = time.monotonic()
            self.wait()
            self.lost_s += time.monotonic() - began
        if self._client and self.chance.random() < 0.3:
            self.tokens.send(self._topic + self._frame())
            sent["tokens"] += 1
            return
        direction, decoder = ("to_client", codec.to_client) if self._client else ("to_worker", codec.to_worker)
        frames = self.message(direction, self._say)
        if frames and _ends(frames, decoder) and self.chance.random() > ENDS_IT:
            return
        self._send(frames)
        sent[direction] += bool(frames)
        if not self._client and sent.total() % 64 == 0:
            self._free()

    def _frame(self) -> bytes:
        if self.chance.random() < 0.9:
            return self.chunk()
        return tokens.encode_beat(self.chance.choice((1, 2**53, 2**64 - 1)), self.session)

    def _say(self) -> Said:
        if self._client:
            return plausible.to_client(self.chance, self.alive, self._queries)
        self._seq += 1
        return plausible.to_worker(self.chance, self.alive, self._seq, "fake")

    def _free(self) -> None:
        """The honest broker's requests want a slot as well."""
        for key in self.alive:
            self._send(codec.encode(self.session, [(m.Cancel(key[:16], key[16:]), None), (m.EndAck([key]), None)]))

    def _send(self, frames: Frames) -> None:
        if not frames:
            return
        until = time.monotonic() + HANG_S
        while self._route:
            try:
                self.control.send_multipart([self._route, *frames], zmq.DONTWAIT)
                return
            except zmq.Again:
                assert time.monotonic() < until, f"what was hit takes nothing for {HANG_S} s"
                self._listen()
                time.sleep(0.001)  # libzmq does not tell when a ROUTER has room for one peer again
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self._route = b""

    def _listen(self) -> None:
        decoder = codec.from_client if self._client else codec.from_worker
        with suppress(zmq.Again):
            for _ in range(1_000):
                route, *frames = self.control.recv_multipart(zmq.DONTWAIT)
                bundle = decoder.decode(frames)
                assert not bundle.problems, f"what was hit broke the protocol: {bundle.problems}"
                for message, _ in bundle.messages:
                    self._hear(route, message)
        with suppress(zmq.Again):
            for _ in range(1_000):
                self.tokens.recv(zmq.DONTWAIT)

    def _hear(self, route: bytes, message: m.Message) -> None:
        match message:
            case m.ClientHello() | m.WorkerHello():
                self._route, self.session = route, self.chance.randbytes(8)
                self.sessions += 1
                self.alive, self._seq = [], 0
                welcome = m.Welcome(self.session, self._token_port, self._topic if self._client else b"")
                self.control.send_multipart([route, *codec.encode(codec.NO_SESSION, [(welcome, None)])], zmq.DONTWAIT)
            case m.InferenceRequest(id) | m.Attach(id):
                self.alive = [*self.alive[-8:], id]
                self.remember(id)
            case m.Query(query):
                self._queries = [*self._queries[-8:], query]
                self.remember(query)
            case m.Accept(id, dispatch):
                self.alive = [*self.alive[-8:], id + dispatch]
                self.remember(id, id + dispatch)
            case m.WorkerHeartbeat(beat=beat):
                self._send(codec.encode(self.session, [(m.BrokerHeartbeat(1, beat, seq=self._seq), None)]))
            case m.Goodbye():
                self._route = b""
            case _:
                pass


def against_worker(count: int, seed: str) -> Report:
    report = Report("worker")
    context: zmq.Context[Any] = zmq.Context()
    broker = HostileBroker(context, seed, client=False)
    config = BrokerConfig(hold_ms=60_000)
    try:
        with Mesh(0, knobs=FakeKnobs(slots=32, tokens_per_s=2_000), config=config, broker="process") as mesh:
            worker = mesh.spawn("w0", mesh.address, broker.address)
            broker.wait()
            with honest.Honest(mesh.address) as watched:
                began = time.monotonic()
                watched.mark("during")
                _barrage(report, count, [broker.shoot])
                report.seconds, report.sessions = time.monotonic() - began, broker.sessions
                watched.mark("after")
            report.told = watched.told
            if not worker.running:
                report.wrong.append(f"the worker is gone:\n{worker.written()}")
            _judge(report, mesh)
    finally:
        broker.close()
        context.term()
    return report


def against_client(count: int, seed: str) -> Report:
    report = Report("client")
    context: zmq.Context[Any] = zmq.Context()
    broker = HostileBroker(context, seed, client=True)
    try:
        with (
            Mesh(1, knobs=FakeKnobs(slots=8, tokens_per_s=2_000), broker="process") as mesh,
            honest.Honest(mesh.address, broker.address) as watched,
        ):
            broker.wait()
            began = time.monotonic()
            watched.mark("during")
            _barrage(report, count, [broker.shoot])
            report.seconds, report.sessions = time.monotonic() - began, broker.sessions
            watched.mark("after")
        report.told = watched.told
        _judge(report, mesh)
    finally:
        broker.close()
        context.term()
    return report


ROLES: dict[str, Callable[[int, str], Report]] = {
    "broker": against_broker,
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
