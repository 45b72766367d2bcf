"""Hostile well-formed messages, and half-formed ones beside them, given to the cores directly.

A decoder lets through whatever satisfies its schema. So the three cores are given, by peers that have joined them,
mutated messages with ids, sessions and keys in them that are alive; and what is always true of a core is checked.
"""

from __future__ import annotations

import random
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

from llambo.broker import events as be
from llambo.broker import invariants as broker_invariants
from llambo.broker.config import BrokerConfig
from llambo.broker.core import BrokerCore
from llambo.mesh.client import client_events as ce
from llambo.mesh.client.client_core import ClientCore
from llambo.mesh.link.link_core import ConnectionChange, OpenTokens, Send
from llambo.mesh.wire import codec, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import Identity
from llambo.worker.agent import events as we
from llambo.worker.agent.announcement import ProcessIdentity as WorkerIdentity
from llambo.worker.agent.core import WorkerCore
from llambo.worker.agent.core import check_invariants as check_worker
from llambo.worker.config import WorkerConfig
from llambo.worker.engine import protocol as proto
from llambo.worker.engine.protocol import Output
from tests.fuzz import plausible
from tests.fuzz.mutator import Mutator
from tests.fuzz.target import Frames
from tests.fuzz.targets import Bodies, chunk_mutant
from tests.unit import samples

#: What is always true is looked at after so many messages.
CHECKED_EVERY = 20
#: A core lives for so many messages, then there is another one: some faults need a fresh state, others an old one.
LIFE = 2_000
#: How many of the latest live ids a mutator gets.
REMEMBERED = 64
#: Requests of a broker that is gone: clients ask for them, workers claim to run them.
FOREIGN = [bytes([number]) * 16 for number in range(1, 4)]
#: The identities of a broker with keys, by key; names of workers begin with those of their keys.
KEYS = {
    "c1": Identity("c1", "client", max_in_flight=3, max_queued=5, max_bytes=100_000, per_minute=50, models=("ti*",)),
    "c2": Identity("c2", "admin"),
    "w1": Identity("w1", "worker"),
    "w2": Identity("w2", "worker"),
}
#: Mostly none: what has a lease is to live.
PAUSES_MS = (0,) * 30 + (1,) * 10 + (10,) * 4 + (100, 400, 3_000)

#: What a broker sends to no worker.
FOR_HOSTS = (m.PlaceModels, m.Hold, m.FetchFiles)


class UnderFire(ABC):
    """A core that is shot at."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.mutator = Mutator(chance)
        self.now_ms = 1_000_000
        self.bodies = {name: Bodies(name) for name in samples.CODECS}

    def remember(self, *values: Any) -> None:
        self.mutator.pool += [value for value in values if value]
        del self.mutator.pool[:-REMEMBERED]

    def message(self, direction: str, session: bytes, say: Callable[[], plausible.Said]) -> Frames:
        """A mutant, mostly under a live session; or a plausible message of `say`, as it is or changed a little."""
        bodies, chance = self.bodies[direction], self.chance
        if chance.random() < 0.7:
            return plausible.frames(self.mutator, session, [say() for _ in range(chance.choice((1, 1, 1, 2, 5)))])
        original = chance.choice(bodies.seeds)
        frames = original if chance.random() < 0.15 else bodies.mutate(self.mutator, original)
        if frames and chance.random() < 0.95:
            frames = [codec.MAGIC + session, *frames[1:]]
        return frames

    def chunk(self, key: bytes) -> bytes:
        chance = self.chance
        first, count = chance.choice((0, 0, 1, 2, 5, 2**32 - 1)), chance.choice((1, 1, 2, 9))
        frame = tokens.encode_chunk(key, first, list(range(count)), [b"x"] * count, chance.choice((0, 0, 1, 3, 255)))
        return frame if chance.random() < 0.7 else chunk_mutant(self.mutator, [frame])[0]

    def pass_time(self) -> None:
        self.now_ms += self.chance.choice(PAUSES_MS)

    @abstractmethod
    def send_one(self) -> None: ...

    @abstractmethod
    def check(self) -> None: ...


class Broker(UnderFire):
    """Two hostile clients and two hostile workers that have joined. Half of the brokers have keys, and so have they."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(chance)
        config = BrokerConfig.of(
            tokens_in_port=1, tokens_out_port=2, startup_grace_ms=chance.choice((0, 500)), queue_requests=50
        )
        self.core = BrokerCore(config, chance.randbytes)
        self.sessions: dict[bytes, bytes] = {}
        self.topics: list[bytes] = []
        self.keys: list[bytes] = []
        self.ids: list[bytes] = []
        self.keyed = chance.random() < 0.5
        if self.keyed:
            self.handle(be.KeysChanged(KEYS))
        self.handle(be.Tick())
        self.join()

    def user(self, route: bytes) -> str:
        """The key of its connection, mostly."""
        if not self.keyed:
            return ""
        return route.decode() if self.chance.random() < 0.97 else self.chance.choice(["", "c1", "c2", "w1", "gone"])

    def join(self) -> None:
        for route in (b"c1", b"c2"):
            hello: m.Message = m.ClientHello(name=route.decode())
            self.handle(be.ClientSaid(route, codec.NO_SESSION, [(hello, b"")], user=route.decode() * self.keyed))
        for route in (b"w1", b"w2"):
            hello = m.WorkerHello(route.decode(), b"i", [m.ModelInfo("tiny", "f")], 3)
            self.handle(be.WorkerSaid(route, codec.NO_SESSION, [(hello, b"")], user=route.decode() * self.keyed))
            if route in self.sessions:
                self.handle(be.TokensArrived([tokens.encode_beat(1, self.sessions[route])]))

    def handle(self, event: be.Event) -> None:
        for order in self.core.handle(event, self.now_ms):
            if isinstance(order, be.ToClient | be.ToWorker):
                self._hear(order.route, order.message)
                to_peer = codec.to_host if isinstance(order.message, FOR_HOSTS) else codec.to_worker
                reader = codec.to_client if isinstance(order, be.ToClient) else to_peer
                plausible.check_sayable(reader, order.session, order.message, getattr(order, "blob", None))

    def _hear(self, route: bytes, message: m.Message) -> None:
        match message:
            case m.Welcome(session, _, topic):
                self.sessions[route] = session
                self.remember(session, topic)
            case m.Dispatch(id, dispatch):
                self.keys = [*self.keys[-6:], id + dispatch]
                self.remember(id, dispatch, id + dispatch)
            case m.Accepted(id):
                self.ids = [*self.ids[-8:], id]
                self.remember(id)
            case _:
                pass

    def send_one(self) -> None:
        chance = self.chance
        self.pass_time()
        if chance.random() < 0.03:
            self.join()
        what = chance.random()
        if what < 0.45:
            route = chance.choice((b"c1", b"c2"))
            ids = [*self.ids, *FOREIGN]
            frames = self.message("client", self.sessions[route], lambda: plausible.from_client(chance, ids))
            bundle = codec.from_client.decode(frames)
            self.handle(be.ClientSaid(route, bundle.session, bundle.messages, bundle.problems, self.user(route)))
        elif what < 0.8:
            route = chance.choice((b"w1", b"w2"))
            keys = [*self.keys, *(id + samples.DISPATCH for id in FOREIGN)]
            frames = self.message("worker", self.sessions[route], lambda: plausible.from_worker(chance, keys))
            bundle = codec.from_worker.decode(frames)
            self.handle(be.WorkerSaid(route, bundle.session, bundle.messages, bundle.problems, self.user(route)))
        elif what < 0.9:
            key = chance.choice(self.keys) if self.keys else samples.KEY
            self.handle(be.TokensArrived([self.chunk(key) for _ in range(3)]))
        elif what < 0.92:
            self.handle(be.RouteGone(chance.choice((b"c1", b"c2", b"w1", b"w2")), chance.random() < 0.5))
        elif what < 0.94:
            beat = tokens.encode_beat(chance.choice((1, 2**53 + 1, 2**64 - 1)), self.sessions[b"w1"])
            self.handle(be.TokensArrived([beat]))
        elif what < 0.95 and self.keyed:
            # A key is revoked, or replaced by another.
            left = {key: who for key, who in KEYS.items() if chance.random() < 0.9}
            self.handle(be.KeysChanged(left))
        else:
            self.handle(be.Tick())
        for _ in range(50):
            if self.core.next_wakeup_ms() > self.now_ms:
                break
            self.handle(be.Tick())
        else:
            raise AssertionError("the broker wants to be woken for ever")

    def check(self) -> None:
        try:
            broker_invariants.check(self.core)
        except AssertionError as error:
            # A worker that reports fewer slots than it uses harms only itself, and gets no error.
            if "than it has slots" not in str(error):
                raise


class Worker(UnderFire):
    """One worker with a hostile broker, whose engine is an honest fake."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(chance)
        self.core = WorkerCore(WorkerConfig(name="w", drain_ms=5_000), WorkerIdentity(b"incarnat"))
        self.session = b"session1"
        self.keys: list[bytes] = []
        self.welcomes = self.seq = 0
        self.handle(we.Ticked())
        self.handle(proto.Ready([m.ModelInfo("tiny", "f")], 4))

    def handle(self, event: we.Event) -> None:
        for order in self.core.handle(event, self.now_ms):
            match order:
                case we.StartRun(start):
                    self.keys = [*self.keys[-4:], start.key]
                    self.remember(start.key, start.key[:16], start.key[16:])
                case we.SpawnEngine():
                    self.keys.clear()
                case Send(_, session, message, blob):
                    plausible.check_sayable(codec.from_worker, session, message, blob)
                    if isinstance(message, m.WorkerHello) and self.chance.random() < 0.9:
                        self.welcomes += 1
                case OpenTokens(_, port):
                    assert 0 < port < 65_536, f"a port that is none: {port}"
                case _:
                    pass

    def send_one(self) -> None:
        chance = self.chance
        self.pass_time()
        if self.welcomes:
            self.welcomes -= 1
            self.session = chance.randbytes(8)
            self.handle(we.ControlArrived(0, codec.NO_SESSION, [(m.Welcome(self.session, 7332), b"")]))
        what = chance.random()
        if what < 0.75:
            self.seq += 1
            keys, seq = self.keys, self.seq
            frames = self.message("to_worker", self.session, lambda: plausible.to_worker(chance, keys, seq))
            bundle = codec.to_worker.decode(frames)
            # A worker that is drained takes nothing more, and the run would end: most of these are left out here.
            messages = [each for each in bundle.messages if not isinstance(each[0], m.Drain) or chance.random() < 0.01]
            self.handle(we.ControlArrived(0, bundle.session, messages))
        elif what < 0.9 and self.keys:
            self.handle(
                proto.Step([Output(key, [1], [b"x"], chance.choice((None, None, "stop"))) for key in self.keys])
            )
        elif what < 0.92:
            self.handle(we.ConnectionChanged(0, chance.choice(list(ConnectionChange))))
        elif what < 0.93:
            self.handle(we.EngineDied("shot", outside=False))
        elif what < 0.96:
            self.handle(proto.Ready([m.ModelInfo("tiny", "f")], 4))
        else:
            beat = m.BrokerHeartbeat(1, self.core.links[0].beats.number)
            self.handle(we.ControlArrived(0, self.session, [(beat, b"")]))
        self.handle(we.Ticked())

    def check(self) -> None:
        if not self.core.exited:
            check_worker(self.core)


class Client(UnderFire):
    """One client with requests and a hostile broker."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(chance)
        self.core = ClientCore(m.ClientHello(name="c"))
        self.session = b"session1"
        self.delivered: dict[bytes, int] = {}
        self.ids: list[bytes] = []
        self.queries: list[int] = []
        self.welcomes = 0
        self.handle(ce.BrokersFound(1))

    def handle(self, event: ce.Event) -> None:
        for order in self.core.handle(event, self.now_ms):
            match order:
                case ce.DeliverTokens(id, ids, pieces):
                    assert len(ids) == len(pieces) > 0
                    self.delivered[id] = self.delivered.get(id, 0) + len(ids)
                case ce.ReportEnd(id, end):
                    # A hostile broker may count fewer than it has sent; all that it counted must have been delivered.
                    assert self.delivered.pop(id, 0) >= end.count, "ended before all its tokens were delivered"
                case Send(_, session, message, blob):
                    plausible.check_sayable(codec.from_client, session, message, blob)
                    self.welcomes += isinstance(message, m.ClientHello)
                case OpenTokens(_, port):
                    assert 0 < port < 65_536, f"a port that is none: {port}"
                case _:
                    pass

    def send_one(self) -> None:
        chance = self.chance
        self.pass_time()
        if self.welcomes and chance.random() < 0.9:
            self.welcomes -= 1
            self.session = chance.randbytes(8)
            self.handle(ce.ControlArrived(codec.NO_SESSION, [(m.Welcome(self.session, 7333, bytes(16)), b"")], []))
        what = chance.random()
        if what < 0.05:
            id = chance.randbytes(16)
            self.ids = [*self.ids[-8:], id]
            self.remember(id)
            self.handle(ce.SubmitAsked(m.InferenceRequest(id, max_tokens=50), b"hello"))
        elif what < 0.07:
            query = chance.randrange(1, 2**53)
            self.queries = [*self.queries[-4:], query]
            self.remember(query)
            self.handle(ce.QueryAsked(query, "status"))
        elif what < 0.75:
            say = partial(plausible.to_client, chance, self.ids, self.queries)
            bundle = codec.to_client.decode(self.message("to_client", self.session, say))
            self.handle(ce.ControlArrived(bundle.session, bundle.messages, bundle.problems))
        elif what < 0.9:
            id = chance.choice(self.ids) if self.ids else bytes(16)
            self.handle(ce.TokensArrived([self.chunk(id + samples.DISPATCH) for _ in range(3)]))
        elif what < 0.93:
            self.handle(ce.ConnectionChanged(chance.choice(list(ConnectionChange))))
        else:
            beat = tokens.encode_beat(chance.choice((1, 2, 2**64 - 1)), self.session)
            self.handle(ce.TokensArrived([beat]))
        self.handle(ce.Tick())

    def check(self) -> None:
        """With each delivery."""


CORES: dict[str, Callable[[random.Random], UnderFire]] = {
    "broker-core": Broker,
    "worker-core": Worker,
    "client-core": Client,
}


def fire(name: str, seed: str, count: int) -> tuple[int, str]:
    """Shoot so often. How often it was, and what was found."""
    chance = random.Random(seed)
    core: UnderFire | None = None
    for number in range(count):
        try:
            if core is None or number % LIFE == 0:
                core = CORES[name](chance)
            core.send_one()
            if number % CHECKED_EVERY == 0:
                core.check()
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the finding
            return number, f"shot {number}\n" + "".join(traceback.format_exception(error)[-6:])
    return count, ""
