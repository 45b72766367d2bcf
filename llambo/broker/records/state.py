"""All that a broker knows, in one value. The modules beside this one are the rules that change it.

Each rule is a function `rule(state, ..., now_ms)`. What it wants done it appends to `state.out`; the core
hands that to the shell when the event has been handled.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llambo.broker.actions import Action
from llambo.broker.config import BrokerConfig
from llambo.broker.events import Counted
from llambo.broker.records.accounts import Account, Accounts
from llambo.broker.records.archive import Archive
from llambo.broker.records.meter import Meter
from llambo.broker.records.orphans import Orphanage
from llambo.broker.records.queue import WaitingRoom
from llambo.broker.records.registry import ClientEntry, Registry, WorkerEntry
from llambo.broker.records.request import Request, plain
from llambo.broker.records.retry_budget import Budget
from llambo.broker.records.schedule import POLICIES, Pool
from llambo.mesh.wire.identity import ANYONE, Identity
from llambo.mesh.wire.messages import Attach, InferenceRequest

#: `chance(n)` gives n random bytes. The shell passes the system's, the simulator seeded ones.
Chance = Callable[[int], bytes]
#: So many alarms at least are kept before those of requests that have ended are looked for.
ALARMS_KEPT = 256
#: Lines for the log that are kept until the shell writes them.
REPORTS_KEPT = 256
Alarm = Literal["repair", "deadline", "adopt"]


@dataclass(slots=True)
class Counters:
    """Since the broker started. Names are what `llambo status` shows."""

    submitted: int = 0
    attached: int = 0
    refused: int = 0
    dispatched: int = 0
    ended: int = 0
    failed: int = 0
    cancelled: int = 0
    moved: int = 0
    adopted: int = 0
    tokens: int = 0
    chunks: int = 0
    stale_chunks: int = 0
    duplicate_chunks: int = 0
    malformed_frames: int = 0
    gaps: int = 0
    repaired: int = 0
    replays_asked: int = 0
    replays_served: int = 0
    engine_deaths: int = 0
    suspected: int = 0
    convicted: int = 0
    ejected: int = 0
    retries_denied: int = 0
    workers_lost: int = 0
    clients_lost: int = 0
    problems: int = 0
    unknown_sessions: int = 0
    forbidden: int = 0


@dataclass(frozen=True, slots=True)
class Happening:
    """One line of the events feed."""

    number: int
    at_ms: int
    kind: str
    text: str
    worker: str = ""


class Sample(NamedTuple):
    """How the mesh was at one moment, of which there is one a second: history.py."""

    number: int
    at_ms: int
    tokens_per_s: float
    running: int
    waiting: int
    busy: int
    slots: int
    ready: int
    workers: int
    ended: int
    failed: int
    first_ms: int


@dataclass(frozen=True, slots=True)
class Report:
    """One line for the log of the shell, with what it is about. Never with what somebody has asked or was answered."""

    text: str
    warning: bool = False
    worker: str = ""
    request: bytes = b""


@dataclass(frozen=True, slots=True)
class Early:
    """Something a client said about what this broker does not know yet."""

    client: ClientEntry
    message: InferenceRequest | Attach
    blob: bytes
    due: int


@dataclass(frozen=True, slots=True)
class Lease:
    holder: bytes
    #: What the holder calls himself.
    by: str
    until: int
    promised: frozenset[str]
    #: Session and number of the question that was answered last.
    seen: tuple[bytes, int]


class State:
    def __init__(self, config: BrokerConfig, chance: Chance) -> None:
        self.config = config
        self.chance = chance
        self.policy = POLICIES[config.policy]
        self.out: list[Action] = []
        #: Public key to identity, of those that are valid now; None: there are no keys, and everybody is let in.
        self.identities: Mapping[str, Identity] | None = None
        self.accounts = Accounts()
        #: The session of the client whose message is being answered.
        self.speaker = b""
        #: Workers whose load or fitness this event has changed: `dispatching.settle` looks after them.
        self.touched: dict[bytes, WorkerEntry] = {}
        #: Accounts that may have another request at work than before: likewise.
        self.eased: dict[str, Account] = {}
        self.registry = Registry()
        #: Workers, by session, whose requests are to go on elsewhere: see draining.py.
        self.emptying: dict[bytes, WorkerEntry] = {}
        self.room = WaitingRoom(config.queue_requests, config.queue_bytes, config.queue_ms)
        self.pools: dict[str, Pool] = {}
        #: Those of them that are for suspects. Mostly there is none.
        self.wary: list[Pool] = []
        #: Model to when its last worker went away; 0 while it has one. A model stays known once seen.
        self.models: dict[str, int] = {}
        #: What may be retried of each model, where that is not all: budget.py.
        self.budgets: dict[str, Budget] = {}
        self.requests: dict[bytes, Request] = {}
        #: The fence: tokens count only under the key of a current dispatch.
        self.running: dict[bytes, Request] = {}
        #: Requests of other brokers, by workers that run them still.
        self.orphanage = Orphanage()
        #: By what they are for.
        self.leases: dict[str, Lease] = {}
        #: What may yet make sense, since we have only just begun; see admission.py.
        self.early: dict[tuple[bytes, bytes], Early] = {}
        self.archive = Archive(config.tombstones, config.detached_bytes, config.detached_ms)
        #: Bytes set aside for live requests, transcripts and prompts.
        self.reserved = 0
        self.counters = Counters()
        self.meter = Meter()
        #: What the shell has counted.
        self.seen = Counted()
        self.happenings: deque[Happening] = deque(maxlen=config.events)
        self.samples: deque[Sample] = deque(maxlen=config.samples)
        #: Taken away by the shell; what it does not take makes room.
        self.reports: deque[Report] = deque(maxlen=REPORTS_KEPT)
        self.rate = 0.0  # requests ended per second, smoothed, for retry-after
        self.rate_mark = (0, 0)
        self.started_at = -1
        self.worker_round_at = 0
        self.client_round_at = 0
        self.sweep_at = 0
        self.turns = 0
        self._alarms: list[tuple[int, int, Alarm, bytes]] = []
        self._alarm_count = 0
        self._alarms_kept = ALARMS_KEPT
        self._happened = 0

    def hears(self, client: ClientEntry) -> bool:
        """Whether what is said to it now goes to who has proved its key.

        A route is only a name, and who has left it may be followed by somebody who chose the same. So with keys
        nothing of an answer is sent on control but in reply, to who has just spoken from there.
        """
        return self.identities is None or self.speaker == client.session

    def is_promised(self, model: str) -> bool:
        """Somebody who can has said that its workers come when they are asked for."""
        return any(model in lease.promised for lease in self.leases.values())

    def identity(self, user: str) -> Identity | None:
        return ANYONE if self.identities is None else self.identities.get(user)

    def admit(self, request: Request) -> None:
        """From now on it is ours, until it has ended."""
        self.requests[request.id] = request
        size = request.transcript.reserved + len(request.prompt)
        self.reserved += size
        account = request.account
        account.bytes += size
        account.submitted += 1

    def take_off(self, request: Request) -> None:
        """It is with a worker, under its key."""
        self.running[request.key] = request
        request.account.in_flight += 1

    def land(self, request: Request) -> None:
        """It is not with a worker any more, if it was: the fence is closed."""
        if self.running.pop(request.key, None) is not None:
            account = request.account
            account.in_flight -= 1
            if account.queued and account.who.max_in_flight:
                self.eased[account.name] = account

    def release(self, request: Request) -> None:
        """It has ended."""
        self.land(request)
        del self.requests[request.id]
        size = request.transcript.reserved + len(request.prompt)
        self.reserved -= size
        request.account.bytes -= size

    def happened(
        self, now_ms: int, kind: str, text: str, *, warning: bool = False, worker: str = "", request: bytes = b""
    ) -> None:
        self._happened += 1
        self.happenings.append(Happening(self._happened, now_ms, kind, text, worker))
        self.reports.append(Report(f"{kind}: {text}", warning, worker, request))

    def alarm(self, due_ms: int, kind: Alarm, id: bytes) -> None:
        """Wake up for this. Alarms are never taken back: whoever hears one looks whether it still matters."""
        self._alarm_count += 1
        heapq.heappush(self._alarms, (due_ms, self._alarm_count, kind, id))
        if len(self._alarms) > self._alarms_kept:
            # A deadline may be hours away, and its request long ended.
            self._alarms = [alarm for alarm in self._alarms if alarm[3] in self.requests]
            heapq.heapify(self._alarms)
            self._alarms_kept = ALARMS_KEPT + 2 * len(self._alarms)

    def next_alarm(self, now_ms: int) -> tuple[Alarm, bytes] | None:
        if not self._alarms or self._alarms[0][0] > now_ms:
            return None
        _, _, kind, id = heapq.heappop(self._alarms)
        return kind, id

    @property
    def alarm_at(self) -> int:
        return self._alarms[0][0] if self._alarms else 2**62

    def touch(self, worker: WorkerEntry) -> None:
        self.touched[worker.session] = worker

    def update_pools(self, worker: WorkerEntry) -> None:
        """Call it whenever a worker's load or fitness has changed."""
        for model in worker.models:
            pool = self.pools.get(model)
            if pool is None:
                pool = self.pools[model] = Pool(model)
            pool.update(worker)
        for lane in worker.lanes:
            if (pool := self.pools.get(lane)) is not None:
                pool.update(worker)
        for pool in self.wary:
            if worker.serves(plain(pool.model)):
                pool.update(worker)

    def open_lane(self, lane: str) -> None:
        """A request moves: from now on there is a pool of those who may continue it. Most lanes never need one."""
        if lane not in self.pools:
            pool = self.pools[lane] = Pool(lane)
            if pool.wary:
                self.wary.append(pool)
            for worker in self.registry.workers.values():
                if worker.serves(plain(lane)):
                    pool.update(worker)

    def close_lanes(self) -> None:
        """Those that nobody waits in."""
        for name in [name for name in self.pools if "\0" in name and name not in self.room.lines]:
            pool = self.pools.pop(name)
            pool.clear()
            if pool.wary:
                self.wary.remove(pool)

    @property
    def held_bytes(self) -> int:
        """What counts against the cap on transcripts."""
        return self.reserved + self.archive.owed_bytes
