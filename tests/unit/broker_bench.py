"""A broker core with scripted peers: a test sends what the peers send, and looks at what the broker answers."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any, Literal, TypeVar

from llambo.broker.config import BrokerConfig
from llambo.broker.core import BrokerCore
from llambo.broker.events import (
    ClientSaid,
    Event,
    KeysChanged,
    Publish,
    RouteGone,
    Tick,
    ToClient,
    TokensArrived,
    ToWorker,
    WorkerSaid,
)
from llambo.broker.invariants import check
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import naming, tokens
from llambo.mesh.wire.codec import NO_SESSION
from llambo.mesh.wire.identity import Identity

M = TypeVar("M", bound=m.Message)


def request_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Bench:
    """The clock moves only when a test moves it. Invariants are checked after every event."""

    def __init__(self, **config: Any) -> None:
        config.setdefault("startup_grace_ms", 0)  # unknown requests are refused at once
        self.core = BrokerCore(BrokerConfig.of(tokens_in_port=1, tokens_out_port=2, **config), Random(1).randbytes)
        self.state = self.core.state
        self.now_ms = 1_000
        self.actions: list[Any] = []
        #: The actions of the last event.
        self.last: list[Any] = []
        self.handle(Tick())

    def handle(self, event: Event) -> list[Any]:
        self.last = list(self.core.handle(event, self.now_ms))
        self.actions += self.last
        check(self.core)
        return self.last

    def pass_time(self, length_ms: int) -> None:
        """As the shell does: handle a Tick whenever the core asks for one."""
        end = self.now_ms + length_ms
        while (due := self.core.next_wakeup_ms()) <= end:
            self.now_ms = max(self.now_ms, due)
            self.handle(Tick())
        self.now_ms = end

    def route_gone(self, route: bytes) -> None:
        self.handle(RouteGone(route, True))

    def keys(self, *identities: Identity) -> None:
        """Replaces all keys; in a test the public key is the name."""
        self.handle(KeysChanged({identity.name: identity for identity in identities}))

    def worker(
        self,
        name: str = "w",
        slots: int = 2,
        model: str = "m",
        incarnation: bytes = b"i",
        route: bytes = b"",
        fingerprint: str = "",
        state: m.WorkerState = "ready",
        user: str = "",
        kind: m.Kind | Literal[""] = "",
        paced: bool = True,
        ordered: bool = False,
        adapters: Mapping[str, str] | None = None,
    ) -> Worker:
        """`adapters`: by name, what stands for the file."""
        infos = [m.ModelInfo(model, fingerprint, kind=kind)]
        for adapter, digest in (adapters or {}).items():
            own = naming.adapter_fingerprint(fingerprint, digest)
            infos.append(m.ModelInfo(naming.with_adapter(model, adapter), own, kind=kind))
        hello = m.WorkerHello(name, incarnation, infos, slots, state=state, paced=paced, ordered=ordered)
        return Worker(self, route or name.encode() + incarnation, hello, user)

    def host(
        self,
        name: str = "box",
        *models: m.HostedModel,
        ram: int = 100,
        node_class: str = "",
        user: str = "",
        incarnation: bytes = b"i",
    ) -> Host:
        """With its first report, if it has models."""
        hello = m.HostHello(name, incarnation, node_class=node_class, host="machine")
        host = Host(self, name.encode() + incarnation, hello, user, ram)
        if models:
            host.report(*models)
        return host

    def client(self, route: bytes = b"c", user: str = "", incarnation: bytes = b"") -> Client:
        return Client(self, route, user, incarnation)


def small_mesh(slots: int = 2, **config: Any) -> tuple[Bench, Worker, Client]:
    """A broker with one worker and one client."""
    bench = Bench(**config)
    return bench, bench.worker(slots=slots), bench.client()


class Peer:
    bench: Bench
    route: bytes
    session: bytes
    user: str

    def received(self, kind: type[M]) -> list[M]:
        """All messages of one kind that were sent to this peer."""
        mine = (a for a in self.bench.actions if isinstance(a, (ToClient, ToWorker)) and a.route == self.route)
        return [a.message for a in mine if isinstance(a.message, kind)]

    def received_last(self, kind: type[M]) -> list[M]:
        """The same, of the last event only."""
        mine = (a for a in self.bench.last if isinstance(a, (ToClient, ToWorker)) and a.route == self.route)
        return [a.message for a in mine if isinstance(a.message, kind)]


class Worker(Peer):
    def __init__(self, bench: Bench, route: bytes, hello: m.WorkerHello, user: str = "") -> None:
        self.bench = bench
        self.route = route
        self.user = user
        self.beats = 0
        self.session = NO_SESSION
        self.send(hello)
        welcomes = self.received(m.Welcome)
        if welcomes:
            self.session = welcomes[-1].session
            self.beat(state=hello.state)

    def send(self, *messages: m.Message, blob: bytes = b"") -> None:
        bundle = [(message, blob) for message in messages]
        self.bench.handle(WorkerSaid(self.route, self.session, bundle, user=self.user))

    def publish(self, *frames: bytes) -> list[Any]:
        return self.bench.handle(TokensArrived(list(frames)))

    def beat(self, seq: int = 0, **fields: Any) -> None:
        """On both planes, as workers do."""
        self.beats += 1
        self.publish(tokens.encode_beat(self.beats, self.session))
        self.send(m.WorkerHeartbeat(seq=seq, beat=self.beats, **fields))

    @property
    def dispatches(self) -> list[m.Dispatch]:
        return self.received(m.Dispatch)

    def key(self, number: int = -1) -> bytes:
        dispatch = self.dispatches[number]
        return dispatch.id + dispatch.dispatch

    def chunk(self, first: int, *ids: int, number: int = -1, flags: int = 0) -> bytes:
        return tokens.encode_chunk(self.key(number), first, list(ids), [b"x"] * len(ids), flags)

    def end(self, count: int, number: int = -1, reason: m.Reason = "length", stop: str = "") -> None:
        dispatch = self.dispatches[number]
        self.send(m.End(dispatch.id, count, reason, dispatch.dispatch, stop=stop))


class Host(Peer):
    """It says what a test wants it to, and loads nothing."""

    def __init__(self, bench: Bench, route: bytes, hello: m.HostHello, user: str, ram: int) -> None:
        self.bench = bench
        self.route = route
        self.user = user
        self.name = hello.name
        self.ram = ram
        self.revision = 0
        self.session = NO_SESSION
        self.send(hello)
        welcomes = self.received(m.Welcome)
        if welcomes:
            self.session = welcomes[-1].session

    def send(self, *messages: m.Message) -> None:
        bundle = [(message, b"") for message in messages]
        self.bench.handle(WorkerSaid(self.route, self.session, bundle, user=self.user))

    def report(self, *models: m.HostedModel, seq: int | None = None, helpers: int = 0) -> None:
        """It has read everything, unless `seq` says otherwise. Then time passes until placement is decided."""
        self.revision += 1
        used = sum(model.needs.get("ram", 0) for model in models if model.state in ("loading", "ready", "unloading"))
        memory = {"ram": m.Memory(self.ram, used, helpers)}
        self.send(m.HostHeartbeat(self.seq if seq is None else seq, self.revision, list(models), memory))
        self.bench.pass_time(20)

    def beat(self, seq: int | None = None) -> None:
        self.send(m.HostHeartbeat(self.seq if seq is None else seq, self.revision))

    @property
    def seq(self) -> int:
        """The highest that it was sent."""
        numbered = (m.BrokerHeartbeat, m.PlaceModels, m.Hold)
        sent = (a.message for a in self.bench.actions if isinstance(a, ToWorker) and a.route == self.route)
        return max((message.seq for message in sent if isinstance(message, numbered)), default=0)

    @property
    def wishes(self) -> tuple[list[str], list[str]]:
        """What it was sent last."""
        places = self.received(m.PlaceModels)
        return (places[-1].load, places[-1].evict) if places else ([], [])


class Client(Peer):
    def __init__(self, bench: Bench, route: bytes, user: str = "", incarnation: bytes = b"") -> None:
        self.bench = bench
        self.route = route
        self.user = user
        self.session = NO_SESSION
        self.send(m.ClientHello(incarnation=incarnation))
        self.welcome = self.received(m.Welcome)[-1]
        self.session = self.welcome.session

    def send(self, *messages: m.Message, blob: bytes = b"") -> None:
        bundle = [(message, blob) for message in messages]
        self.bench.handle(ClientSaid(self.route, self.session, bundle, user=self.user))

    def submit(self, number: int, prompt: bytes = b"hello", **fields: Any) -> bytes:
        fields.setdefault("max_tokens", 10)
        self.send(m.InferenceRequest(request_id(number), **fields), blob=prompt)
        return request_id(number)

    @property
    def problems(self) -> list[m.Problem]:
        return self.received(m.Problem)

    @property
    def ends(self) -> list[m.End]:
        return self.received(m.End)

    def streamed(self) -> list[int]:
        """Token ids published to this client's topic."""
        topic = self.welcome.topic
        frames = [f for a in self.bench.actions if isinstance(a, Publish) for f in a.frames if f.startswith(topic)]
        chunks = [tokens.decode_chunk(frame[len(topic) :]) for frame in frames]
        return [token for chunk in chunks if chunk is not None for token in chunk.body.ids]
