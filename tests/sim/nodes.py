"""The shells of the simulator: each runs a real core, in virtual time, over virtual sockets."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from random import Random
from typing import Any

from llambo.broker import events as b
from llambo.broker.config import BrokerConfig
from llambo.broker.core import BrokerCore
from llambo.broker.events import Publish as BrokerPublish
from llambo.broker.events import ToClient, ToWorker
from llambo.broker.invariants import check
from llambo.broker.records.measurements import Counters
from llambo.mesh.client import client_events as c
from llambo.mesh.client.client_core import ClientCore
from llambo.mesh.client.client_requests import RequestState
from llambo.mesh.link import link_core as lc
from llambo.mesh.wire import limits, naming, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.identity import Identity
from llambo.worker.agent import events as w
from llambo.worker.agent.announcement import ProcessIdentity as WorkerIdentity
from llambo.worker.agent.core import WorkerCore
from llambo.worker.agent.core import check_invariants as check_worker
from llambo.worker.agent.delivery import UNREAD_MS
from llambo.worker.config import WorkerConfig
from llambo.worker.engine import protocol as proto
from llambo.worker.engine.fake import FakeEngine
from tests.sim.clock import Clock
from tests.sim.history import History
from tests.sim.network import Bundle, Hub, Network, Wire
from tests.sim.shares import Shares


class Node:
    """A process: its clock is off, it may freeze, and it wakes when its core wants to."""

    def __init__(self, clock: Clock, skew_ms: int) -> None:
        self.clock = clock
        self.skew_ms = skew_ms
        self.alive = True
        self.frozen = False
        self._inbox: list[Any] = []
        self._wake_at = 2**62

    @property
    def now_ms(self) -> int:
        return self.clock.now_ms + self.skew_ms

    def happen(self, event: Any) -> None:
        if not self.alive:
            return
        if self.frozen:
            self._inbox.append(event)
            return
        self.perform(self.handle(event))
        self.plan_wakeup()

    def plan_wakeup(self) -> None:
        due = max(self.wakeup() - self.skew_ms, self.clock.now_ms + 1)
        if due < self._wake_at:
            self._wake_at = due
            self.clock.at(due, lambda: self._wake(due))

    def freeze(self, length_ms: int) -> None:
        self.frozen = True
        self.clock.after(length_ms, self.thaw)

    def thaw(self) -> None:
        """Everything that arrived meanwhile is read at once, as from a socket's buffer."""
        self.frozen = False
        inbox, self._inbox = self._inbox, []
        for event in inbox:
            self.happen(event)
        self._wake_at = 2**62
        if self.alive:
            self.plan_wakeup()

    def _wake(self, due: int) -> None:
        if due != self._wake_at:
            return
        self._wake_at = 2**62
        if self.alive and not self.frozen:
            self.happen(self.tick())

    def handle(self, event: Any) -> list[Any]:
        raise NotImplementedError

    def perform(self, actions: list[Any]) -> None:
        raise NotImplementedError

    def wakeup(self) -> int:
        raise NotImplementedError

    def tick(self) -> Any:
        raise NotImplementedError


class BrokerNode(Node):
    def __init__(
        self,
        clock: Clock,
        skew_ms: int,
        config: BrokerConfig,
        random: Random,
        network: Network,
        hub: Hub,
        history: History,
        identities: dict[str, Identity] | None = None,
    ) -> None:
        super().__init__(clock, skew_ms)
        self._config = config
        self._random = random
        #: Who has which key, the name of its wire; None: there are no keys.
        self._identities = identities
        self.shares = Shares()
        self.core = self._new_core()
        #: What its former lives have counted.
        self.past: list[Counters] = []
        self.network = network
        self.hub = hub
        self.history = history
        self.check_every = 1
        self._events = 0
        hub.to_broker = self._control
        hub.tokens_to_broker = lambda frame: self.happen(b.TokensArrived([frame]))
        hub.disconnected = lambda: clock.after(1, lambda: self.happen(b.PeersDisconnected()))

    def _new_core(self) -> BrokerCore:
        core = BrokerCore(self._config, self._random.randbytes)
        if self._identities is not None:
            core.handle(b.KeysChanged(self._identities), self.now_ms)
            self.shares.begin(self._identities.values())
        return core

    def change_keys(self, identities: dict[str, Identity]) -> None:
        self._identities = identities
        self.shares.allow(identities.values())
        if self.alive:
            self.happen(b.KeysChanged(identities))

    def restart(self, down_ms: int, *, orderly: bool) -> None:
        """It forgets everything; its peers find its port closed, and then find it again."""
        if not self.alive:
            return
        if orderly:
            self.happen(b.StopAsked("it was stopped"))
            self.clock.after(5, lambda: self._die(down_ms))
        else:
            self._die(down_ms)

    def _die(self, down_ms: int) -> None:
        self.alive = False
        self.past.append(self.core.state.counters)
        self.hub.down = True
        self.hub.topics.clear()
        for wire in self.hub.wires:
            wire.cut()
        self.clock.after(down_ms, self._begin_again)

    def _begin_again(self) -> None:
        self.core = self._new_core()
        self.alive, self.hub.down = True, False
        self._wake_at = 2**62
        self.plan_wakeup()

    def counted(self, name: str) -> int:
        return sum(counters.flat()[name] for counters in (*self.past, self.core.state.counters))

    def _control(self, wire: Wire, route: bytes, bundle: Bundle) -> None:
        if self.alive and bundle[0] in self.core.state.registry.workers:
            for message, _ in bundle[1]:
                if isinstance(message, m.EngineLost):
                    running = self.core.state.running
                    self.history.death_reported(message, (id(self), len(self.past)), running)
        said = b.WorkerSaid if wire.to_worker else b.ClientSaid
        user = wire.name if self._identities is not None else ""
        self.happen(said(route, bundle[0], bundle[1], user=user))

    def handle(self, event: Any) -> list[Any]:
        ended = self.core.state.counters.requests.ended
        actions = self.core.handle(event, self.now_ms)
        self._check_ends(actions, self.core.state.counters.requests.ended - ended)
        if isinstance(event, b.Tick):
            self._check_leases()
        self._events += 1
        if self._events % self.check_every == 0:
            check(self.core)
            if self._identities is not None:
                state = self.core.state
                self.history.check_owners((id, live.owner) for id, live in state.requests.items())
                self.history.check_owners((id, ended.owner) for id, ended in state.archive.ended.items())
        if self._identities is not None:
            self.shares.judge(self.core.state, actions)
            self._note_refusals(actions)
        return actions

    def _note_refusals(self, actions: list[Any]) -> None:
        """What another broker has admitted is refused only where its identity is far over its limit already."""
        accounts = self.core.state.access.accounts
        for action in actions:
            problem = action.message if isinstance(action, ToClient) else None
            if isinstance(problem, m.Problem) and problem.error.code is Code.OVER_LIMIT:
                account = accounts.of(self.history.owners[problem.id])
                if account.bytes > account.who.max_bytes > 0:
                    self.history.too_much.add(problem.id)

    def _check_ends(self, actions: list[Any], count: int) -> None:
        """An END leaves in the step in which the request ends, and not only when it is due to be sent again."""
        state = self.core.state
        sent = {(a.session, a.message.id) for a in actions if isinstance(a, ToClient) and isinstance(a.message, m.End)}
        for id in islice(reversed(state.archive.ended), count):
            missing = [session for session in state.archive.ended[id].owed if (session, id) not in sent]
            assert not any(session in state.registry.clients for session in missing), "an END was not sent"

    def _check_leases(self) -> None:
        """However rare the heartbeats of idle workers are, one that has requests is lost soon after it fell silent."""
        timing = self.core.state.config.timing
        for worker in self.core.state.registry.workers.values():
            silent_ms = self.now_ms - max(worker.link.heard_at, worker.link.busy_at)
            noticed = worker.claims and worker.link.busy_at  # (what it got since the last round does not count yet)
            late = noticed and silent_ms >= timing.lease_ms + 2 * timing.ping_ms
            assert not late, f"{worker.name} has requests and is silent for {silent_ms} ms"

    def perform(self, actions: list[Any]) -> None:
        bundles: dict[tuple[bytes, bytes, bool], list[tuple[Any, bytes]]] = {}
        for action in actions:
            if isinstance(action, BrokerPublish):
                for frame in action.frames:
                    self._publish(frame)
                continue
            to_worker = isinstance(action, ToWorker)
            blob = (action.blob or b"") if isinstance(action, ToWorker) else b""
            if isinstance(action.message, m.Dispatch):
                self.history.dispatched(self.core.state.running, action.message)
            bundles.setdefault((action.route, action.session, to_worker), []).append((action.message, blob))
        for (route, session, to_worker), messages in bundles.items():
            wire = self.hub.routes.get(route)
            if not self.alive:
                return
            if wire is not None:
                wire.deliver((session, messages))
            else:
                self.clock.after(1, lambda r=route, t=to_worker: self.happen(b.RouteGone(r, t)))  # type: ignore[misc]

    def _publish(self, frame: bytes) -> None:
        topic = frame[: limits.TOPIC_BYTES]
        wire = self.hub.topics.get(topic)
        # (The socket of an earlier session, with its subscription, is closed.)
        if wire is not None and wire.topic == topic and wire.tokens_open and not wire.tokens_dead:
            self.network.token(wire, frame[limits.TOPIC_BYTES :], up=False)

    def subscribe(self, wire: Wire) -> None:
        if wire.topic not in self.core.state.registry.topics:
            return  # not granted: it is the topic of a former life
        self.hub.topics[wire.topic] = wire
        self.happen(b.Subscribed(wire.topic))

    def wakeup(self) -> int:
        return self.core.next_wakeup_ms()

    def tick(self) -> Any:
        return b.Tick()


class Peer(Node):
    """What a worker and a client have in common: a wire to each broker, for their links."""

    def __init__(self, clock: Clock, skew_ms: int, wires: list[Wire]) -> None:
        super().__init__(clock, skew_ms)
        self.wires = wires

    def wire_of(self, link: int) -> Wire:
        raise NotImplementedError

    def connect(self, order: lc.OpenControl) -> None:
        self.wire_of(order.link).connect()

    def perform_link(self, orders: list[Any]) -> None:
        """As the real shell does: what one round orders for one session is one bundle."""
        outboxes: dict[int, tuple[bytes, list[tuple[Any, bytes]]]] = {}

        def flush(link: int) -> None:
            session, messages = outboxes.pop(link, (b"", []))
            if messages:
                self.wire_of(link).say((session, messages))

        for order in orders:
            match order:
                case lc.Send(link, to, message, blob):
                    if link in outboxes and outboxes[link][0] != to:
                        flush(link)
                    outboxes.setdefault(link, (to, []))[1].append((message, blob or b""))
                case lc.Publish(link, frames):
                    self.wire_of(link).publish(frames)
                case lc.OpenControl():
                    self.connect(order)
                case lc.OpenTokens(link, _, topic):
                    self.wire_of(link).open_tokens(topic)
                case lc.CloseLink(link):
                    flush(link)
                    wire = self.wire_of(link)
                    self.clock.after(10, self._close_unless_reopened(wire, wire.route))
                case _:
                    self.perform_other(order)
        for link in list(outboxes):
            flush(link)

    @staticmethod
    def _close_unless_reopened(wire: Wire, route: bytes) -> Callable[[], None]:
        def close() -> None:
            if wire.route == route:
                wire.close()

        return close

    def perform(self, actions: list[Any]) -> None:
        self.perform_link(actions)

    def perform_other(self, order: Any) -> None:
        raise NotImplementedError

    def die(self, *, noticed: bool) -> None:
        self.alive = False
        for wire in self.wires:
            if noticed:
                wire.close()
            else:
                # The host lost power: the broker's messages go nowhere, and nothing says so.
                wire.partitioned = True


class WorkerNode(Peer):
    def __init__(
        self, clock: Clock, skew_ms: int, config: WorkerConfig, random: Random, wires: list[Wire], history: History
    ) -> None:
        super().__init__(clock, skew_ms, wires)
        for number, wire in enumerate(wires):
            wire.from_broker = lambda bundle, n=number: self.happen(w.ControlArrived(n, bundle[0], bundle[1]))  # type: ignore[misc]
            wire.on_subscribed = lambda n=number: self.happen(w.Subscribed(n))  # type: ignore[misc]
            wire.on_sign = lambda sign, n=number: self.happen(w.ConnectionChanged(n, sign))  # type: ignore[misc]
        self.config = config
        self.history = history
        self.core = WorkerCore(config, WorkerIdentity(random.randbytes(8), "sim"))
        self.engine: FakeEngine | None = None
        self.engine_deaths = 0
        #: The request of which its engine died or hung, and the runs it had then.
        self._died_with: tuple[bytes, list[bytes]] | None = None
        #: It has died of a request, and its agent does not know it yet.
        self._unnoticed = False
        self._generation = 0
        self._step_at = 2**62
        self.left = False
        #: How long an engine of this host takes to load its model.
        self.load_ms = 20
        self._loading = False
        self.on_exit: Callable[[], None] = lambda: None

    def wire_of(self, link: int) -> Wire:
        return self.wires[link]

    def handle(self, event: Any) -> list[Any]:
        for message, _ in event.messages if isinstance(event, w.ControlArrived) else ():
            if isinstance(message, m.Dispatch) and naming.PLUS in message.model:
                assert self.config.adapters, f"{self.config.name} is to run {message.model}, and has no adapter"
        actions = self.core.handle(event, self.now_ms)
        if not self.core.exited:
            check_worker(self.core)
        return actions

    def wakeup(self) -> int:
        return self.core.next_wakeup_ms()

    def tick(self) -> Any:
        return w.Ticked()

    def perform_other(self, order: Any) -> None:
        match order:
            case w.SpawnEngine():
                self._load()
            case w.KillEngine():
                self.engine_dies("killed", 2)
            case w.StartRun(start):
                if self.engine is not None:
                    if self._died_with and self.now_ms <= self.core.engine.last_alive_ms + UNREAD_MS:
                        self._died_with[1].append(start.key)  # it hangs, but for all the agent knows it has read this
                    refused = self.engine.start(start, self.now_ms)
                    if refused is not None:
                        self._later(proto.Refused(refused.key, refused.error, refused.final))
                    self._plan_step()
                elif self._unnoticed and self.now_ms <= self.core.engine.last_alive_ms + UNREAD_MS:
                    self.history.engine_died(b"", [start.key])  # as above: the agent learns of the death in a moment
            case w.StopRun(key):
                if self.engine is not None:
                    self.engine.stop(key)
            case w.Exit():
                self.left = True
                self.clock.after(50, self._exit)
            case _:
                pass  # logs, and READY for a supervisor

    def _exit(self) -> None:
        self.die(noticed=True)
        self.on_exit()

    def engine_dies(self, text: str, delay_ms: int = 1, *, outside: bool = False) -> None:
        if self.engine is None and not self._loading and text != "killed":
            return
        if self._died_with and not outside:
            self.history.engine_died(*self._died_with)
        self._unnoticed = self._died_with is not None and not outside
        self.engine, self._died_with, self._loading = None, None, False
        self.engine_deaths += 1
        self._generation += 1
        self._later(w.EngineDied(text, outside), delay_ms)

    def _load(self) -> None:
        """Loading takes its time, reports its progress, and may kill the engine."""
        self._loading, self._unnoticed = True, False
        self._generation += 1
        generation = self._generation

        def progress(percent: int) -> None:
            if self.alive and generation == self._generation:
                self.happen(proto.Progress(f"loading: {percent} %", percent=percent))

        for quarter in range(4):
            self.clock.after(self.load_ms * quarter // 4, lambda n=25 * quarter: progress(n))  # type: ignore[misc]
        self.clock.after(self.load_ms, lambda: self._spawn(generation))

    def _spawn(self, generation: int) -> None:
        if not self.alive or generation != self._generation:
            return
        self.engine, self._loading = FakeEngine(self.config.fake, self.config.model), False
        self._step_at = 2**62
        self.happen(self.engine.ready())

    def _later(self, event: Any, delay_ms: int = 1) -> None:
        self.clock.after(delay_ms, lambda: self.happen(event))

    def _plan_step(self) -> None:
        if self.engine is None:
            return
        due = max(self.engine.next_wakeup_ms() - self.skew_ms, self.clock.now_ms + 1)
        if due < self._step_at:
            self._step_at = due
            generation = self._generation
            self.clock.at(due, lambda: self._step(due, generation))

    def _step(self, due: int, generation: int) -> None:
        """The engine child has a life of its own: it goes on while the agent is frozen."""
        if due != self._step_at or generation != self._generation or self.engine is None or not self.alive:
            return
        self._step_at = 2**62
        outputs = self.engine.step(self.now_ms)
        if self.engine.fault and self._died_with is None:
            self._died_with = self.engine.poisoned, self.engine.running_keys
        self.happen(proto.Step(outputs))
        if self.engine is not None and self.engine.fault == "crash":
            # Its own count of tokens stands for what comes from outside; a request is not to blame for it.
            self.engine_dies("killed by a signal", outside=not self.engine.poisoned)
        else:
            self._plan_step()


class ClientNode(Peer):
    def __init__(
        self, clock: Clock, skew_ms: int, name: str, incarnation: bytes, wires: list[Wire], history: History
    ) -> None:
        """The wires are in the order in which it tries the brokers."""
        super().__init__(clock, skew_ms, wires)
        self.name = name
        self.core = ClientCore(m.ClientHello(name=name, incarnation=incarnation))
        self.history = history
        self.duplicates = 0
        self.wire = wires[0]
        for wire in wires:
            # What comes from the one it has left is not read any more: that socket is closed.
            wire.tokens_from_broker = lambda frame, x=wire: self._if(x, c.TokensArrived([frame]))  # type: ignore[misc]
            wire.from_broker = lambda bundle, x=wire: self._if(x, c.ControlArrived(bundle[0], bundle[1], []))  # type: ignore[misc]
            wire.on_sign = lambda sign, x=wire: self._if(x, c.ConnectionChanged(sign))  # type: ignore[misc]

    def begin(self) -> None:
        self.happen(c.BrokersFound(len(self.wires)))

    def _if(self, wire: Wire, event: Any) -> None:
        if wire is self.wire:
            self.happen(event)

    def wire_of(self, link: int) -> Wire:
        return self.wire

    def connect(self, order: lc.OpenControl) -> None:
        if self.wire is not self.wires[order.target]:
            self.clock.after(10, self._close_unless_reopened(self.wire, self.wire.route))
            self.wire = self.wires[order.target]
        self.wire.connect()

    def _count_duplicates(self, frames: list[bytes]) -> None:
        """Chunks that hold nothing this client has not been given already."""
        for frame in frames:
            if frame[:1] == tokens.CHUNK:
                first, count, _ = tokens.head(frame, tokens.KEY_END)
                heard = self.history.heard.get((self.name, frame[1 : 1 + limits.REQUEST_ID_BYTES]))
                self.duplicates += heard is not None and first + count <= len(heard.ids)

    def handle(self, event: Any) -> list[Any]:
        if isinstance(event, c.TokensArrived):
            self._count_duplicates(event.frames)
        elif isinstance(event, c.ControlArrived):
            for message, _ in event.messages:
                if isinstance(message, m.Page):
                    self._count_duplicates(message.chunks)
                elif isinstance(message, m.End) and event.session == self.core.link.session:
                    request = self.core.requests.live.get(message.id)
                    if request is not None and request.sent and request.state is not RequestState.WAITING:
                        self.history.end_arrived(self.name, message, request.tokens.next_index)
        return self.core.handle(event, self.now_ms)

    def wakeup(self) -> int:
        return self.core.next_wakeup_ms()

    def tick(self) -> Any:
        return c.Tick()

    def perform_other(self, order: Any) -> None:
        match order:
            case c.DeliverTokens(id, ids, pieces, logprobs):
                self.history.delivered(self.name, id, ids, pieces, logprobs)
            case c.ReportEnd(id, end):
                self.history.ended(self.name, id, end, self.clock.now_ms)
            case c.ReportFailure(key, error) if isinstance(key, bytes):
                self.history.failed(self.name, key, error, self.clock.now_ms)
            case c.ReportPlace(id, _, model) if model:
                # (From a heartbeat alone it would know its place, and have no proof for another broker.)
                self.history.placed(self.name, id)
            case _:
                pass
