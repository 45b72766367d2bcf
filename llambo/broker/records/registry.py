"""Who is there: sessions of workers and clients, by session, by route, by name, by topic."""

from __future__ import annotations

from typing import NamedTuple

from llambo.broker.records.request import Request, lane
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import ANYONE, Identity

#: What `llambo workers` and the metrics call a worker's state.
CONDITIONS = ("joining", "loading", "ready", "trial", "slow", "mending", "draining", "drained")


class WorkerEntry:
    """A worker, from its welcome until it is lost. `claims` is what counts: dispatch key to control sequence."""

    __slots__ = (
        "adopted",
        "beat",
        "busy",
        "claims",
        "closed",
        "done",
        "drained_seq",
        "draining",
        "echo",
        "ejected",
        "fingerprints",
        "heard_at",
        "hello",
        "identity",
        "idle_load",
        "incarnation",
        "joined_at",
        "lanes",
        "last",
        "level",
        "models",
        "moving",
        "name",
        "number",
        "pace",
        "paced",
        "paced_at",
        "position",
        "route",
        "route_gone_at",
        "seq",
        "serving",
        "session",
        "slots",
        "slow_note",
        "slow_times",
        "slow_until",
        "state",
        "step_load",
        "suspect",
        "trial",
        "turn",
        "user",
        "was_otherwise",
        "welcome",
    )

    def __init__(
        self,
        hello: m.WorkerHello,
        welcome: m.Welcome,
        route: bytes,
        now_ms: int,
        user: str = "",
        identity: Identity = ANYONE,
    ) -> None:
        #: The public key that opened this session, and what the keyring says of it.
        self.user, self.identity = user, identity
        self.hello = hello
        self.welcome = welcome
        self.name = hello.name
        # --- kept by speed.py: a smoothed pace, from how many measurements, and the last one's time
        self.pace = 0.0
        self.paced = 0
        self.paced_at = 0
        #: How often its weight is halved.
        self.level = 0
        #: It is much slower than its peers: no new work until `slow_until`; then one at a time while it is tried.
        self.ejected = self.trial = False
        self.slow_until = self.slow_times = 0
        self.slow_note = ""
        self.serve(hello.models, hello.slots)
        self.incarnation = hello.incarnation
        self.session = welcome.session
        self.route = route
        self.joined_at = self.heard_at = now_ms
        self.route_gone_at = 0
        #: The last token-plane beat seen from it: 0 until that plane works.
        self.echo = 0
        self.number = 0
        #: Control sequence number of the last message that carries one.
        self.seq = 0
        self.claims: dict[bytes, int] = {}
        #: Those of them that it ran already: they may be more than it has slots, if they have ended.
        self.adopted: set[bytes] = set()
        #: The last suspect it was given, with its key: one at a time.
        self.suspect: tuple[bytes, Request] | None = None
        #: Slots that others than us have taken.
        self.busy = 0
        self.state: str = hello.state
        #: By an operator's order; `moving`: and what it runs is to go on elsewhere.
        self.draining = False
        self.moving = False
        #: Its control sequence number when it was told so.
        self.drained_seq = 0
        #: It was not yet as that order wants it.
        self.was_otherwise = False
        #: It refused something: nothing more until its next heartbeat tells how it is.
        self.closed = False
        self.last = m.WorkerHeartbeat()
        self.beat = 0
        self.done = 0
        # --- kept by schedule.Pool
        self.position: dict[str, int] = {}
        self.turn = 0

    def serve(self, serving: list[m.ModelInfo], slots: int) -> None:
        """What it serves: from its hello, or, if that was said too early to know, from a heartbeat."""
        self.serving = serving
        self.models = tuple(model.name for model in serving)
        #: Model to fingerprint, for those that have one.
        self.fingerprints = {model.name: model.fingerprint for model in serving if model.fingerprint}
        #: The lanes of requests that only the very same model may continue.
        self.lanes = tuple(lane(*of) for of in self.fingerprints.items())
        self.slots = slots
        self.weigh(self.level)

    def weigh(self, level: int) -> None:
        """What it counts as loaded, idle and for each claim: full is taken to be half as fast as idle."""
        self.level = level
        self.idle_load = float(2**level)
        self.step_load = self.idle_load / self.slots

    def serves(self, lane: str) -> bool:
        return lane in self.models or lane in self.lanes

    @property
    def wary(self) -> bool:
        """A suspect is aboard that has not cleared itself yet. A cancelled one is aboard until its slot is free."""
        if self.last.wary:
            return True
        return self.suspect is not None and self.suspect[0] in self.claims and self.suspect[1].suspect_at >= 0

    @property
    def free(self) -> int:
        return self.slots - len(self.claims) - self.busy

    @property
    def tokens_up(self) -> bool:
        """Its token plane delivers: a beat was seen, and not too many after it are missing."""
        return self.echo > 0 and self.beat - self.echo <= 3

    @property
    def condition(self) -> str:
        """How it is, in a word: one of CONDITIONS."""
        if self.draining or self.state == "draining":
            return "draining" if self.claims or self.busy else "drained"
        if self.state == "starting":
            return "loading"
        if not self.echo:
            return "joining"
        if self.ejected:
            return "slow"
        return ("trial" if self.trial else "ready") if self.tokens_up else "mending"

    @property
    def dispatchable(self) -> bool:
        # Asked several times for each request, so `free` and `tokens_up` are written out.
        return (
            self.slots - len(self.claims) - self.busy > 0
            and self.state == "ready"
            and self.echo > 0
            and self.beat - self.echo <= 3
            and not (self.draining or self.closed or self.ejected or (self.trial and self.claims))
        )


class ClientEntry:
    """A client's session: its topic, what it follows, and the ENDs it has not acknowledged."""

    __slots__ = (
        "echo",
        "following",
        "heard_at",
        "hello",
        "identity",
        "joined_at",
        "number",
        "route",
        "session",
        "topic",
        "unacked",
        "user",
        "welcome",
    )

    def __init__(
        self,
        hello: m.ClientHello,
        welcome: m.Welcome,
        route: bytes,
        now_ms: int,
        user: str = "",
        identity: Identity = ANYONE,
    ) -> None:
        #: The public key that opened this session, and what the keyring says of it.
        self.user, self.identity = user, identity
        self.hello = hello
        self.welcome = welcome
        self.session = welcome.session
        self.topic = welcome.topic
        self.route = route
        self.joined_at = self.heard_at = now_ms
        self.echo = 0
        self.number = 0
        self.following: dict[bytes, None] = {}
        #: Request id to the time its END was sent last, oldest first.
        self.unacked: dict[bytes, int] = {}

    def is_same(self, other: ClientEntry) -> bool:
        """Two sessions of one client."""
        if self.identity.name != other.identity.name:
            return False
        return bool(self.hello.incarnation) and self.hello.incarnation == other.hello.incarnation


class Drained(NamedTuple):
    """`incarnation`: of the process that has said so itself."""

    move: bool
    incarnation: bytes


class Registry:
    """Plain tables; the rules of joining and leaving are in membership.py."""

    def __init__(self) -> None:
        self.workers: dict[bytes, WorkerEntry] = {}
        self.clients: dict[bytes, ClientEntry] = {}
        self.worker_names: dict[str, WorkerEntry] = {}
        self.worker_routes: dict[bytes, WorkerEntry] = {}
        self.client_routes: dict[bytes, ClientEntry] = {}
        self.topics: dict[bytes, ClientEntry] = {}
        #: Workers told to take no new work, by name: it outlives their sessions.
        self.drained: dict[str, Drained] = {}
        #: Those orders, and those to work again, that a worker has yet to confirm.
        self.orders: dict[str, m.Drain] = {}

    def add_worker(self, worker: WorkerEntry) -> None:
        self.workers[worker.session] = worker
        self.worker_names[worker.name] = worker
        self.worker_routes[worker.route] = worker

    def remove_worker(self, worker: WorkerEntry) -> None:
        del self.workers[worker.session]
        del self.worker_names[worker.name]
        self.worker_routes.pop(worker.route, None)

    def move_worker(self, worker: WorkerEntry, route: bytes) -> None:
        """The same session speaks from a new route: its connection blinked."""
        self.worker_routes.pop(worker.route, None)
        worker.route = route
        self.worker_routes[route] = worker

    def add_client(self, client: ClientEntry) -> None:
        self.clients[client.session] = client
        self.client_routes[client.route] = client
        self.topics[client.topic] = client

    def remove_client(self, client: ClientEntry) -> None:
        del self.clients[client.session]
        del self.topics[client.topic]
        self.client_routes.pop(client.route, None)

    def move_client(self, client: ClientEntry, route: bytes) -> None:
        self.client_routes.pop(client.route, None)
        client.route = route
        self.client_routes[route] = client
