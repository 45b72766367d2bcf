"""Which peers are connected: sessions of workers and clients, by session, by route, by name, by topic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

from llambo.broker.records.backlog import Backlog
from llambo.broker.records.request import Lane, Request
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import ANYONE, Identity

#: What `llambo workers` and the metrics call a worker's state.
CONDITIONS = ("joining", "loading", "ready", "trial", "slow", "mending", "draining", "drained")
#: Backlogs of sessions that are over, of each kind of peer.
BACKLOGS = 10_000
#: Token-plane beats that may be on their way.
BEATS_AWAY = 3


@dataclass(slots=True)
class Session:
    """The connection of a peer, as far as a broker knows it."""

    route: bytes
    welcome: m.Welcome
    heard_at: int
    joined_at: int
    #: The public key that opened this session, and what the keyring says of it.
    user: str = ""
    identity: Identity = ANYONE
    #: Since when its route is gone; 0: it is there.
    route_gone_at: int = 0
    #: When its next heartbeat is due, and the interval without runs as it was sent last.
    due_at: int = 0
    idle_ms: int = 0
    #: Since when it has runs, as far as the rounds of heartbeats have noticed; 0: it has none.
    busy_at: int = 0


@dataclass(slots=True)
class Beats:
    """Heartbeats on both planes, and the order of control messages."""

    #: Sent by us on control.
    number: int = 0
    #: The last token-plane beat that a worker is known to have sent. (Not used for a client.)
    beat: int = 0
    #: The last token-plane beat that arrived: of a worker's, here; of ours, at the client, as its heartbeats say.
    echo: int = 0
    #: Control sequence number of the last message to it that has one.
    seq: int = 0


class Serving:
    """What a worker serves."""

    __slots__ = ("continuing", "fingerprints", "infos", "lanes", "models", "slots")

    def __init__(self, infos: list[m.ModelInfo], slots: int) -> None:
        self.infos = infos
        self.slots = slots
        self.models = tuple(model.name for model in infos)
        #: Model to fingerprint, for those that have one.
        self.fingerprints = {model.name: model.fingerprint for model in infos if model.fingerprint}
        #: The lanes of requests that only the very same model may continue; and all lanes, these first.
        self.continuing = tuple(Lane(*of) for of in self.fingerprints.items())
        self.lanes = (*self.continuing, *(Lane(model) for model in self.models))


class Speed:
    """Mainly changed by speed.py; a new model or a dead engine begins it anew."""

    __slots__ = (
        "ejected",
        "fresh_until",
        "idle_load",
        "level",
        "measured_at",
        "measurements",
        "note",
        "pace",
        "pauses",
        "step_load",
        "trial",
        "until",
    )

    def __init__(self, slots: int) -> None:
        #: Smoothed tokens per second and stream, from how many measurements, and the last one's time.
        self.pace = 0.0
        self.measurements = self.measured_at = 0
        #: It is much slower than its peers: no new work `until` then; after that, one at a time while it is on trial.
        self.ejected = self.trial = False
        self.until = self.pauses = 0
        #: It is not compared with others before.
        self.fresh_until = 0
        self.note = ""
        self.weigh(0, slots)

    def weigh(self, level: int, slots: int) -> None:
        """What the worker counts as loaded, idle and for each claim: full is taken to be half as fast as idle."""
        #: How often its weight is halved.
        self.level = level
        self.idle_load = float(2**level)
        self.step_load = self.idle_load / slots

    def forget(self) -> None:
        self.measurements, self.pace = 0, 0.0


@dataclass(slots=True)
class DrainState:
    """Kept by draining.py: by an operator's order it gets no new work; `moving`: and what it runs goes on elsewhere."""

    drained: bool = False
    moving: bool = False
    #: Its control sequence number when the order was sent.
    sent_seq: int = 0
    #: It was not yet as the order wants it.
    differed: bool = False


class WorkerEntry:
    """A worker, from its welcome until it is lost."""

    __slots__ = (
        "adopted",
        "backlog",
        "beats",
        "claims",
        "done",
        "drain",
        "hello",
        "last",
        "link",
        "position",
        "refusing",
        "serving",
        "session",
        "speed",
        "state",
        "suspects",
        "turn",
        "yields",
    )

    def __init__(self, hello: m.WorkerHello, link: Session, backlog: Backlog) -> None:
        self.hello = hello
        self.link = link
        self.session = link.welcome.session
        self.backlog = backlog
        self.beats = Beats()
        self.serving = Serving(hello.models, hello.slots)
        self.speed = Speed(hello.slots)
        self.drain = DrainState()
        self.state: m.WorkerState | Literal["gone"] = hello.state
        #: What it was given: dispatch key to control sequence number.
        self.claims: dict[bytes, int] = {}
        #: Those of them that it ran already: they may be more than it has slots, if they have ended.
        self.adopted: set[bytes] = set()
        #: By dispatch key: the suspect that it was given, and those of another broker that it ran already.
        self.suspects: dict[bytes, Request] = {}
        #: It refused something: nothing more until its next heartbeat.
        self.refusing = False
        #: Another model is to have its memory: it refuses from one heartbeat to the next (placement/wishes.py).
        self.yields = False
        self.last = m.WorkerHeartbeat()
        self.done = 0
        #: Its index in `Pool.free` of each pool that has it: pools.py.
        self.position: dict[object, int] = {}
        #: Rises with each dispatch of the broker: when it was chosen last.
        self.turn = 0

    @property
    def name(self) -> str:
        return self.hello.name

    @property
    def slots(self) -> int:
        return self.serving.slots

    @property
    def busy(self) -> int:
        """Slots that others than this broker have taken."""
        return self.last.busy

    @property
    def free(self) -> int:
        return self.slots - len(self.claims) - self.busy

    @property
    def has_suspect(self) -> bool:
        """It has a suspect that is not cleared. A cancelled one counts until its slot is free."""
        if self.last.wary:
            return True
        return any(key in self.claims and request.suspicion.token >= 0 for key, request in self.suspects.items())

    def add_suspect(self, key: bytes, request: Request) -> None:
        self.suspects = {each: other for each, other in self.suspects.items() if each in self.claims} | {key: request}

    @property
    def tokens_up(self) -> bool:
        """Its token plane delivers: a beat was seen, and not too many after it are missing."""
        return self.beats.echo > 0 and self.beats.beat - self.beats.echo <= BEATS_AWAY

    @property
    def condition(self) -> str:
        """One of CONDITIONS."""
        if self.drain.drained or self.state == "draining":
            return "draining" if self.claims or self.busy else "drained"
        if self.state == "starting":
            return "loading"
        if not self.beats.echo:
            return "joining"
        if self.speed.ejected:
            return "slow"
        return ("trial" if self.speed.trial else "ready") if self.tokens_up else "mending"

    @property
    def dispatchable(self) -> bool:
        # Asked several times for each request, so `free` and `tokens_up` are written out.
        beats, speed = self.beats, self.speed
        return (
            self.serving.slots - len(self.claims) - self.last.busy > 0
            and self.state == "ready"
            and beats.echo > 0
            and beats.beat - beats.echo <= BEATS_AWAY
            and self.backlog.bytes < self.backlog.limit
            and not (self.drain.drained or self.refusing or speed.ejected or (speed.trial and self.claims))
        )


class ClientEntry:
    """A client's session: its topic, what it follows, and the ENDs it has not acknowledged."""

    __slots__ = ("backlog", "beats", "following", "hello", "link", "session", "topic", "unacked")

    def __init__(self, hello: m.ClientHello, link: Session, backlog: Backlog) -> None:
        self.hello = hello
        self.link = link
        self.session = link.welcome.session
        self.topic = link.welcome.topic
        self.backlog = backlog
        self.beats = Beats()
        self.following: dict[bytes, None] = {}
        #: Request id to the time its END was sent last, oldest first.
        self.unacked: dict[bytes, int] = {}

    @property
    def identity(self) -> Identity:
        return self.link.identity

    def is_same(self, other: ClientEntry) -> bool:
        """Two sessions of one client."""
        if self.identity.name != other.identity.name:
            return False
        return bool(self.hello.incarnation) and self.hello.incarnation == other.hello.incarnation


class _Peer(Protocol):
    link: Session
    session: bytes
    backlog: Backlog


P = TypeVar("P", bound=_Peer)


class Sessions(dict[bytes, P]):
    """Peers of one kind, by session and by route."""

    def __init__(self) -> None:
        super().__init__()
        self.by_route: dict[bytes, P] = {}
        #: By route, of sessions that are over: the same connection cannot begin another one with an empty backlog.
        self._backlogs: dict[bytes, Backlog] = {}

    def add(self, peer: P) -> None:
        peer.backlog = self._backlogs.pop(peer.link.route, peer.backlog)
        self[peer.session] = peer
        self.by_route[peer.link.route] = peer

    def remove(self, peer: P) -> None:
        del self[peer.session]
        self.by_route.pop(peer.link.route, None)
        if peer.backlog.much:
            self._backlogs[peer.link.route] = peer.backlog
            if len(self._backlogs) > BACKLOGS:
                del self._backlogs[next(iter(self._backlogs))]

    def route_gone(self, route: bytes) -> None:
        self._backlogs.pop(route, None)

    def move(self, peer: P, route: bytes) -> None:
        """The same session speaks from a new route: it has connected again."""
        self.by_route.pop(peer.link.route, None)
        peer.link.route = route
        self.by_route[route] = peer


class Drained(NamedTuple):
    """`incarnation`: of the process that has confirmed it."""

    move: bool
    incarnation: bytes


@dataclass(frozen=True, slots=True)
class HeldLease:
    """What a client holds alone for a while: fleet_leases.py."""

    holder: bytes
    #: What the holder calls itself.
    holder_name: str
    until: int
    promised: frozenset[str]
    #: Session and number of the question that was answered last.
    answered: tuple[bytes, int]


class Registry:
    """Plain tables; the rules of joining and leaving are in membership.py."""

    def __init__(self) -> None:
        self.workers: Sessions[WorkerEntry] = Sessions()
        self.clients: Sessions[ClientEntry] = Sessions()
        self.worker_names: dict[str, WorkerEntry] = {}
        self.topics: dict[bytes, ClientEntry] = {}
        #: Workers that are to take no new work, by name: it outlives their sessions.
        self.drained: dict[str, Drained] = {}
        #: Orders to drain, and to work again, that a worker has yet to confirm.
        self.orders: dict[str, m.Drain] = {}
        #: Workers, by session, whose requests are to go on elsewhere: draining.py.
        self.emptying: dict[bytes, WorkerEntry] = {}
        #: By what they are for.
        self.leases: dict[str, HeldLease] = {}

    def add_worker(self, worker: WorkerEntry) -> None:
        self.workers.add(worker)
        self.worker_names[worker.name] = worker

    def remove_worker(self, worker: WorkerEntry) -> None:
        self.workers.remove(worker)
        del self.worker_names[worker.name]
        self.emptying.pop(worker.session, None)

    def add_client(self, client: ClientEntry) -> None:
        self.clients.add(client)
        self.topics[client.topic] = client

    def remove_client(self, client: ClientEntry) -> None:
        self.clients.remove(client)
        del self.topics[client.topic]
