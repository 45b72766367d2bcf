"""All that a broker knows, in one value. The rules in the other rooms change it.

Each rule is a function `rule(state, ..., now_ms)`. Its actions it appends to `state.out`; the core hands them to the
shell when the event has been handled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from llambo.broker.config import BrokerConfig
from llambo.broker.events import Action, ToClient, ToWorker
from llambo.broker.records import seals
from llambo.broker.records.accounts import Accounts
from llambo.broker.records.archive import Archive
from llambo.broker.records.backlog import MESSAGE_BYTES, SIZED, size_of
from llambo.broker.records.hosts import HostEntry, Hosts
from llambo.broker.records.journal import Journal
from llambo.broker.records.measurements import Counters, Measurements
from llambo.broker.records.orphans import Recovery
from llambo.broker.records.pools import Pool, Pools
from llambo.broker.records.queue import RequestQueue
from llambo.broker.records.registry import ClientEntry, Registry, WorkerEntry
from llambo.broker.records.request import Lane, Request
from llambo.broker.records.retry_budget import RetryBudgets
from llambo.broker.records.schedule import POLICIES
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import ANYONE, Identity
from llambo.mesh.wire.tasks import TASKS_OF
from llambo.mesh.wire.timers import NEVER_MS, Timers

#: `random_bytes(n)`: the shell passes the system's, the simulator seeded ones.
RandomBytes = Callable[[int], bytes]
#: What a request may have to be looked at for: its deadline, tokens it misses, a run that no worker has announced.
Alarm = Literal["deadline", "repair", "adopt"]
ALARMS: tuple[Alarm, ...] = get_args(Alarm)


@dataclass(slots=True)
class Access:
    """Which keys are valid, and what their identities have in use."""

    #: Public key to identity; None: there are no keys, and every peer is let in.
    identities: Mapping[str, Identity] | None = None
    accounts: Accounts = field(default_factory=Accounts)
    #: The session of the client whose message is being answered.
    speaker: bytes = b""

    def identity(self, user: str) -> Identity | None:
        return ANYONE if self.identities is None else self.identities.get(user)


class Models:
    """What is known of the models that are, were, or are to be served."""

    def __init__(self, retries: RetryBudgets) -> None:
        #: Model to when its last worker went away; 0 while it has one.
        self.unserved_since: dict[str, int] = {}
        #: Those that a worker was ready with. The name of a file that never loads is not among them.
        self.served: set[str] = set()
        #: Those that a client says to have had at another broker, and of which no worker or orchestrator has said so.
        self.claimed: set[str] = set()
        #: What they are for, as a worker has said that is ready, or knows it already.
        self.kinds: dict[str, m.Kind] = {}
        self.retries = retries

    def forget(self, model: str) -> None:
        del self.unserved_since[model]
        self.served.discard(model)
        self.claimed.discard(model)
        self.kinds.pop(model, None)

    def can(self, model: str, task: m.Task) -> bool:
        """As far as is known: the kind of a model whose first worker is still loading it may not be."""
        kind = self.kinds.get(model)
        return kind is None or task in TASKS_OF[kind]


class Wakeups:
    """When the core has to be called again."""

    def __init__(self) -> None:
        self.started_at = -1
        self.worker_round_at = self.client_round_at = self.sweep_at = 0
        #: While a model is asked for that no worker has.
        self.placement_at = NEVER_MS
        self.alarms: Timers[tuple[Alarm, bytes]] = Timers()
        #: Connections have ended: until when workers are sent heartbeats to find out which, and when that was done.
        self.probe_until = self.probed_at = self.idle_probed_at = 0

    def next_wakeup_ms(self) -> int:
        rounds = self.worker_round_at, self.client_round_at, self.sweep_at, self.placement_at
        return min(*rounds, self.alarms.next_wakeup_ms())


class State:
    def __init__(self, config: BrokerConfig, random_bytes: RandomBytes) -> None:
        bounds, faults = config.bounds, config.faults
        self.config = config
        self.random_bytes = random_bytes
        self.policy = POLICIES[config.policy]
        self.out: list[Action] = []
        self.access = Access()
        self.registry = Registry()
        self.hosts = Hosts()
        self.queue = RequestQueue(bounds.queue_requests, bounds.queue_bytes, bounds.queue_ms)
        self.pools = Pools()
        self.models = Models(RetryBudgets(faults.retry_reserve, faults.retry_percent))
        self.requests: dict[bytes, Request] = {}
        #: The fence: the keys of current dispatches, of requests that are DISPATCHED, RUNNING or COMPLETING. A key is
        #: in it or not; tokens count only under one that is.
        self.running: dict[bytes, Request] = {}
        self.archive = Archive(bounds.tombstones, bounds.detached_bytes, bounds.detached_ms)
        #: Bytes set aside for live requests, transcripts and prompts.
        self.reserved = 0
        self.recovery = Recovery()
        self.wakeups = Wakeups()
        self.pace = config.timing.pace(0)
        self.journal = Journal(bounds.events)
        self.counters = Counters()
        self.measured = Measurements(bounds.samples)

    def to_client(self, client: ClientEntry, message: m.Message) -> None:
        self.out.append(ToClient(client.link.route, client.session, message))
        backlog = client.backlog
        backlog.bytes += size_of(message) if type(message) in SIZED else MESSAGE_BYTES
        if backlog.bytes >= backlog.much_bytes and backlog.wants_receipt and client.hello.incarnation:
            self.ask_client(client)

    def ask_client(self, client: ClientEntry) -> None:
        """For a receipt, or again for the same: it acknowledges an END of an unknown request (backlog.py)."""
        receipt = client.backlog.receipt or client.backlog.ask(self.random_bytes(limits.REQUEST_ID_BYTES))
        self.out.append(ToClient(client.link.route, client.session, m.End(receipt, 0, "cancelled")))

    def to_worker(self, worker: WorkerEntry, message: m.Message, blob: bytes | None = None) -> None:
        self.out.append(ToWorker(worker.link.route, worker.session, message, blob))
        backlog = worker.backlog
        backlog.bytes += MESSAGE_BYTES if blob is None else MESSAGE_BYTES + len(blob)
        if backlog.bytes >= backlog.much_bytes:
            if not backlog.receipt:
                self.ask_worker(worker)
            if backlog.full:
                self.pools.refresh(worker)

    def to_host(self, host: HostEntry, message: m.Message) -> None:
        """On the control plane of workers."""
        self.out.append(ToWorker(host.link.route, host.session, message))
        host.backlog.bytes += size_of(message)

    def ask_worker(self, worker: WorkerEntry) -> None:
        """For a receipt, or again for the same: it answers a cancel of a run that it does not have (backlog.py)."""
        key = worker.backlog.receipt or worker.backlog.ask(self.random_bytes(limits.RUN_KEY_BYTES))
        cancel = m.Cancel(key[: limits.REQUEST_ID_BYTES], key[limits.REQUEST_ID_BYTES :])
        self.out.append(ToWorker(worker.link.route, worker.session, cancel))

    @property
    def sessions(self) -> int:
        return len(self.registry.workers) + len(self.registry.clients) + len(self.hosts.sessions)

    def may_push_to(self, client: ClientEntry) -> bool:
        """Whether answer data may be sent to this client now.

        A routing id can be taken over by another peer once its owner has left. So with keys an answer is sent on
        control only as a reply to a message that has just arrived on that route. Accepted and END are not withheld:
        they go to the route that the client had last. They have no tokens, but an END has the text of its error.
        """
        return self.access.identities is None or self.access.speaker == client.session

    def is_promised(self, model: str) -> bool:
        """An orchestrator has announced that it starts workers of this model when they are asked for."""
        return any(model in lease.promised for lease in self.registry.leases.values())

    def is_held(self, model: str, now_ms: int) -> bool:
        """A request for it may wait: it has a worker, had one a moment ago, or gets one when it is asked for."""
        since = self.models.unserved_since.get(model, -1)
        if since == 0 or (since > 0 and now_ms - since < self.config.bounds.hold_ms):
            return True
        return model in self.hosts.having or self.is_promised(model)

    def models_shown(self, now_ms: int) -> list[str]:
        """Without those that are gone, unless requests wait for them, and without names that only clients have said."""
        known = self.models.unserved_since.keys() - self.models.claimed
        return sorted(model for model in known if self.is_held(model, now_ms) or Lane(model) in self.queue.lines)

    def admit(self, request: Request) -> None:
        if self.config.marks_key:
            asked, owner = request.asked, request.owner
            request.proof = seals.proof_of(self.config.marks_key, asked, request.model, owner, request.prompt)
        self.requests[request.id] = request
        size = request.transcript.reserved + len(request.prompt)
        self.reserved += size
        request.account.bytes += size
        request.account.submitted += 1

    def mark_running(self, request: Request) -> None:
        """It is with a worker: its key is in the fence from now on."""
        self.running[request.run.key] = request
        request.account.in_flight += 1

    def leave_fence(self, request: Request) -> None:
        """It is not with a worker any more, if it was: its key is not in the fence."""
        if self.running.pop(request.run.key, None) is not None:
            account = request.account
            account.in_flight -= 1
            if account.queued and account.who.max_in_flight:
                self.queue.eased[account.name] = account

    def release(self, request: Request) -> None:
        """It has ended."""
        self.leave_fence(request)
        del self.requests[request.id]
        size = request.transcript.reserved + len(request.prompt)
        self.reserved -= size
        request.account.bytes -= size

    def set_alarm(self, request: Request, kind: Alarm, at_ms: int) -> None:
        self.wakeups.alarms.set((kind, request.id), at_ms)

    def clear_alarms(self, request: Request) -> None:
        alarms = self.wakeups.alarms
        if alarms:  # mostly there is none at all
            for kind in ALARMS:
                alarms.clear((kind, request.id))

    def open_lane(self, lane: Lane) -> Pool:
        return self.pools.open(lane, self.registry.workers.values())

    @property
    def held_bytes(self) -> int:
        """What counts against the limit for transcripts."""
        return self.reserved + self.archive.owed_bytes
