"""One run: a broker, workers and clients, a plan of faults, and the judgement."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import msgspec

from llambo.broker.config import Bounds, BrokerConfig
from llambo.mesh.client import client_events as c
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.naming import with_adapter
from llambo.worker.config import Adapter, FakeFaults, FakeOptions, WorkerConfig
from tests.sim import faults
from tests.sim.clock import Clock
from tests.sim.history import ADAPTER, ADAPTER_FILES, EMBEDDING_SIZE, POISON, History, Wanted
from tests.sim.hostile import HostileWorker
from tests.sim.keys import Keys
from tests.sim.network import Hub, Network, Wire
from tests.sim.nodes import BrokerNode, ClientNode, WorkerNode

#: A few messages: in a quarter of the worlds peers have to give receipts all the time.
SMALL_BACKLOG_BYTES = 4_000


@dataclass
class Report:
    seed: int
    wrong: list[str]
    tokens: int = 0
    requests: int = 0
    dispatches: int = 0
    moves: int = 0
    adopted: int = 0
    duplicates: int = 0
    stale: int = 0
    repaired: int = 0
    poisoned: int = 0
    #: In worlds with hosts: models that were loaded and unloaded, and requests that ended because one could not be.
    loads: int = 0
    unloads: int = 0
    refused: int = 0
    story: list[str] = field(default_factory=list)


class World:
    #: Workers leave although nothing goes wrong, perhaps while a request is on its way there. (So does a hostile one.)
    come_and_go = False

    def __init__(self, seed: int, check_every: int = 1, brokers: int = 0) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.plan = faults.draw(self.random, brokers)
        self.clock = Clock()
        self.network = Network(self.clock, self.random, self.plan)
        # A suspicion is not passed on when a request goes to another broker: there it may take a bystander with it.
        apart = self.plan.brokers > 1 and bool(self.plan.incidents)
        self.keys = self._new_keys()
        hangs = self.plan.engine_hangs or apart
        self.history = self._new_history(hangs=hangs, apart=apart, limits=self.keys.there)
        self.gone: set[str] = set()
        self.log: list[str] = []
        config = BrokerConfig.of(
            engine_failures=10**6,
            hold_ms=10**6,
            startup_grace_ms=60_000 if self.plan.brokers == 1 else 20_000,
            client_lease_ms=4_000 if self.plan.brokers == 1 else 6_000 if self._comes_back_early else 2_500,
            lease_ms=1_500,
            # As with many more peers than a world has: those without runs send and get heartbeats seldom.
            idle_each_ms=400 if seed % 3 == 1 else 0,
            queue_requests=self.plan.queue,
            marks_key=self.keys.marks,
            backlog_bytes=SMALL_BACKLOG_BYTES if seed % 4 == 3 else Bounds().backlog_bytes,
        )
        self.brokers = [
            BrokerNode(self.clock, self._skew(), config, self.random, self.network, Hub(), self.history, self.keys.now)
            for _ in range(self.plan.brokers)
        ]
        for broker in self.brokers:
            broker.check_every = check_every
        self.workers = [self._worker(i) for i in range(self.plan.workers)]
        self.clients = [self._client(i) for i in range(self.plan.clients)]

    def _new_keys(self) -> Keys:
        return Keys(self.seed, self.plan)

    def _new_history(self, **known: bool) -> History:
        return History(self.plan.style, **known)

    def run(self) -> Report:
        for node in (*self.brokers, *self.workers):
            node.plan_wakeup()
        for client in self.clients:
            client.begin()
        self._plan_requests()
        self._plan_followers()
        for at, kind, who, length in self.plan.incidents:
            self.clock.at(at, lambda k=kind, n=who, t=length: self._incident(k, n, t))  # type: ignore[misc]
        if self.keys.hostile:
            hostile = HostileWorker(self.clock, Random(f"evil in {self.seed}"), self.brokers, self.history)
            hostile.begin(faults.FAULTS_END_MS)
        if self.keys.change_at:
            self.clock.at(self.keys.change_at, self._change_keys)
        wrong: list[str] = []
        try:
            self.clock.run_until(faults.FAULTS_END_MS)
            self._heal()
            self._settle()
        except (AssertionError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            wrong.append(f"broken: {type(error).__name__}: {error} at {self.clock.now_ms} ms")
            self.log.append(_where(error))
        else:
            wrong += self.history.judge(self.gone)
            wrong += self._unsettled()
        return self._report(wrong)

    # --- who is there --------------------------------------------------------------------------------

    def _skew(self) -> int:
        return self.random.randint(0, 10**9)

    def _worker(self, index: int) -> WorkerNode:
        plan, random = self.plan, self.random
        fake = FakeOptions(
            style="plain" if plan.style == "plain" else "wander",
            slots=random.randint(1, 4),
            ttft_ms=random.choice((5, 60)),
            tokens_per_s=random.choice((20, 100, 400)),
            jitter_ms=random.choice((0, 10)),
            burst=plan.burst,
            answer_tokens=self.answer_tokens,
            embedding_size=EMBEDDING_SIZE,
            adapters=self._adapters(index),
            faults=FakeFaults(
                poison=POISON.decode(),
                crash_at=random.randint(20, 200) if plan.engine_crashes and index == 0 else 0,
                hang_at=random.randint(20, 200) if plan.engine_hangs and index == 1 else 0,
            ),
        )
        brokers = tuple(f"tcp://b{number}:7330" for number in range(plan.brokers))
        config = WorkerConfig(brokers, f"w{index}", fake=fake, stall_ms=1_000, drain_ms=1_000)
        return self._start_worker(config)

    @property
    def adapted(self) -> bool:
        """Workers have adapters of one name, and some requests ask for it."""
        return self.seed % 10 == 9 and not self.come_and_go

    def _adapters(self, index: int) -> tuple[Adapter, ...]:
        """Every third has another file, and every third none."""
        path = ADAPTER_FILES[index % len(ADAPTER_FILES)]
        return (Adapter(ADAPTER, path),) if self.adapted and path else ()

    @property
    def restarts(self) -> bool:
        return any(kind.startswith("broker ") for _, kind, _, _ in self.plan.incidents)

    @property
    def answer_tokens(self) -> int:
        return 12 if self.seed % 2 else 0

    def _start_worker(self, config: WorkerConfig) -> WorkerNode:
        wires = [Wire(self.network, config.name, True, broker.hub) for broker in self.brokers]
        node = WorkerNode(self.clock, self._skew(), config, self.random, wires, self.history)
        # Mostly there at once, as after a restart of the agent alone; a large model takes longer than any lease.
        node.load_ms = self.random.choice((20, 20, 300, 2_500))
        number = int(config.name.removeprefix("w"))
        if number == 0 or self.adapted:  # whenever it leaves, however late, its supervisor starts it again
            node.on_exit = lambda: self.clock.after(500, lambda: self._restart(number))
        return node

    def _client(self, index: int) -> ClientNode:
        wires = []
        for broker in self.random.sample(self.brokers, len(self.brokers)):
            wire = Wire(self.network, f"c{index}", False, broker.hub)
            wire.on_subscribed = lambda b=broker, w=wire: b.subscribe(w)  # type: ignore[misc]
            wires.append(wire)
        incarnation = self.random.randbytes(8)
        return ClientNode(self.clock, self._skew(), f"c{index}", incarnation, wires, self.history)

    # --- what is asked -------------------------------------------------------------------------------

    def _plan_requests(self) -> None:
        random = self.random
        requests = self.plan.requests * self.keys.crowd
        poisoned = random.sample(range(requests), self.plan.poison)
        for number in range(requests):
            at = random.randint(150, faults.FAULTS_END_MS - 2_000)
            client = random.choice(self.clients)
            id = random.randbytes(16)
            prompt = f"prompt {number}".encode()
            texts = 1 + id[3] % 90 if id[2] % 6 == 0 and number not in poisoned else 0
            if number in poisoned:
                prompt += POISON
            if texts:  # embeddings of so many texts, one in six
                prompt = msgspec.msgpack.encode([f"{number} {text}" for text in range(texts)])
            message = m.InferenceRequest(
                id,
                with_adapter("fake", ADAPTER) if self.adapted and id[4] % 2 and not texts else "",
                random.choice((1, 5, 20, 60, 150)) if not texts else random.choice((30, 40)),
                stream=random.random() < 0.8,
                priority=random.choice(("interactive", "normal", "batch")),
                deadline_ms=random.choice((0, 0, 0, 0, 500, 20_000)),
                detached=random.random() < 0.15,
                seed=random.getrandbits(62),
                # Of every fourth, and a few each time: what travels with tokens has to arrive with them.
                logprobs=id[1] % 4 if id[0] % 4 == 0 else None,
                task="embed" if texts else "generate",
            )
            self.history.wanted[message.id] = Wanted(message, prompt, self.answer_tokens)
            self.clock.at(at, lambda n=client, q=message: self._submit(n, q))  # type: ignore[misc]
            if random.random() < 0.15:
                self.clock.at(at + random.randint(1, 800), lambda n=client, q=message: self._cancel(n, q))  # type: ignore[misc]
            if random.random() < 0.2:
                other = random.choice(self.clients)
                later = at + random.randint(100, 3_000)
                self.clock.at(later, lambda n=client, o=other, q=message: self._attach(n, o, q))  # type: ignore[misc]

    def _plan_followers(self) -> None:
        """A client submits a long answer, leaves its broker, which is cut off from all, and comes back when the other
        one dies; a client of the other one follows the answer meanwhile, and comes with it.
        """
        random = Random(f"{self.seed}/followers")
        if self.plan.brokers < 2 or self.plan.calm or len(self.clients) < 2 or self.seed % 4 != 2:
            return  # (an answer of an odd seed is short)
        who, at = random.randrange(len(self.clients)), random.randint(600, 1_200)
        client = self.clients[who]
        message = m.InferenceRequest(random.randbytes(16), "", random.choice((400, 1_200)), seed=random.getrandbits(62))
        self.history.wanted[message.id] = Wanted(message, b"a long answer", 0)
        self.clock.at(at - random.randint(50, 250), lambda: self._submit(client, message))
        self.clock.at(at, lambda: self._leave_together(client, message))
        self.clock.at(at + random.randint(4_200, 4_700), lambda: self._incident("client bereft", who, 300))

    def _submit(self, client: ClientNode, message: m.InferenceRequest) -> None:
        if not client.alive:
            return
        self.history.expect(client.name, message.id)
        self.history.owners[message.id] = self.keys.names[client.name]
        client.happen(c.SubmitAsked(message, self.history.wanted[message.id].prompt))

    def _cancel(self, client: ClientNode, message: m.InferenceRequest) -> None:
        heard = self.history.heard.get((client.name, message.id))
        if client.alive and not client.frozen and heard is not None:
            if heard.ends:
                heard.late = True
            else:
                self.history.wanted[message.id].cancelled = True
            client.happen(c.CancelAsked(message.id))

    @property
    def _comes_back_early(self) -> bool:
        """While its broker still has the request, for the sessions that both had before."""
        return self.seed % 8 == 2

    def _leave_together(self, client: ClientNode, message: m.InferenceRequest) -> None:
        first = next(number for number, broker in enumerate(self.brokers) if broker.hub is client.wire.hub)
        others = [other for other in self.clients if (other.wire.hub is client.wire.hub) is self._comes_back_early]
        other = next((other for other in others if other is not client), None)
        if other is not None and self._comes_back_early:
            self._attach(client, other, message)
        self._incident("broker partition", first, 1_500)
        if other is not None:
            self._attach_when_known(client, other, message)

    def _attach_when_known(self, client: ClientNode, other: ClientNode, message: m.InferenceRequest) -> None:
        """Its broker may learn of the request only when the client that submitted it comes there."""
        self._attach(client, other, message)
        if (other.name, message.id) not in self.history.heard and self.clock.now_ms < faults.FAULTS_END_MS:
            self.clock.after(100, lambda: self._attach_when_known(client, other, message))

    def _attach(self, client: ClientNode, other: ClientNode, message: m.InferenceRequest) -> None:
        """Another client follows the same request, if the broker knows it by now."""
        state = next(broker for broker in self.brokers if broker.hub is other.wire.hub).core.state
        if message.task != "generate":
            return  # a result goes only to the client that asked for it
        known = message.id in state.requests or (message.detached and state.archive.get(message.id))
        if other is client or not other.alive or not known or (other.name, message.id) in self.history.heard:
            return
        if self.keys.hostile and self.keys.names[other.name] != self.keys.names[client.name]:
            return
        if not message.detached or self.restarts or (self.plan.incidents and self.plan.brokers > 1):
            self.history.wanted[message.id].abandoned = True  # it may end before the attach gets there
        self.history.expect(other.name, message.id)
        other.happen(c.AttachAsked(message.id))

    # --- what goes wrong -----------------------------------------------------------------------------

    def _incident(self, kind: str, who: int, length_ms: int) -> None:
        self.log.append(f"{self.clock.now_ms} ms: {kind} of {who} for {length_ms} ms")
        if kind == "broker partition":
            for wire in self.brokers[who].hub.wires:
                wire.partition(length_ms * 2)
        elif kind.startswith("broker "):
            self.brokers[who].restart(length_ms, orderly=kind == "broker restart")
        elif kind.startswith("client "):
            self._client_incident(kind.removeprefix("client "), self.clients[who], length_ms)
        else:
            self._worker_incident(kind, who, length_ms)

    def _change_keys(self) -> None:
        self.log.append(f"{self.clock.now_ms} ms: the keys allow something else: {self.keys.later}")
        for broker in self.brokers:
            broker.change_keys(self.keys.later)

    def _client_incident(self, kind: str, client: ClientNode, length_ms: int) -> None:
        if not client.alive:
            return
        match kind:
            case "vanish":
                self.gone.add(client.name)
                for (name, id), heard in self.history.heard.items():
                    if name == client.name and not heard.ends:
                        self.history.wanted[id].abandoned = True
                client.die(noticed=length_ms > 500)
                self._take_over(client)
            case "stall":
                self._stall(client, length_ms)
            case "lost":
                # Its broker is out of its reach for longer than any lease, and well.
                client.wire.partition(2_100 + length_ms)
            case "bereft":
                next(broker for broker in self.brokers if broker.hub is client.wire.hub).restart(
                    length_ms, orderly=False
                )
            case _:
                self._link_incident(kind, client, length_ms)

    def _take_over(self, gone: ClientNode) -> None:
        """Another client submits its requests again, without their tokens, as a gateway does for readers of another."""
        random = Random(f"{self.seed}/takeover")
        if self.seed % 4 != 3 or self.keys.there:
            return
        for name, id in [(name, id) for name, id in self.history.heard if name == gone.name]:
            message, others = self.history.wanted[id].message, [client for client in self.clients if client.alive]
            if self.history.heard[name, id].ends or message.task != "generate" or not others:
                continue
            other = random.choice(others)
            if (other.name, id) not in self.history.heard:
                self.history.expect(other.name, id)
                self.clock.after(random.choice((0, 200, 3_000)), lambda n=other, q=message: self._resume(n, q))  # type: ignore[misc]

    def _resume(self, client: ClientNode, message: m.InferenceRequest) -> None:
        if client.alive and message.id not in client.core.requests.live:
            client.happen(c.SubmitAsked(message, self.history.wanted[message.id].prompt, resume=True))

    def _worker_incident(self, kind: str, who: int, length_ms: int) -> None:
        worker = self.workers[who]
        if not worker.alive:
            return
        match kind:
            case "crash" | "power loss":
                worker.die(noticed=kind == "crash")
                self._maybe_restart(who, length_ms)
            case "engine crash":
                worker.engine_dies("killed by signal 9", outside=True)
            case "drain" | "move":
                self._drain(worker.config.name, length_ms, move=kind == "move")
            case "leave":
                worker.happen(_stop())
                self._maybe_restart(who, 2_500)
            case "freeze":
                worker.freeze(length_ms * 3)
            case _:
                self._link_incident(kind, worker, length_ms)

    def _drain(self, name: str, length_ms: int, *, move: bool) -> None:
        """An operator drains a worker, or empties it, and puts it back to work later."""
        operator = next((client for client in self.clients if client.alive), None)
        if operator is not None and not self.keys.hostile:  # (there no client may)
            drain = m.DrainWorker(len(self.log), name, move=move)
            operator.happen(c.CommandAsked(drain))
            self.clock.after(length_ms, lambda: self._undo(operator, drain))

    def _undo(self, before: ClientNode, drain: m.DrainWorker) -> None:
        operator = next((client for client in self.clients if client.alive), None)
        if operator is not None:
            # A person gives one order after the other: the first is not repeated once it is taken back.
            before.happen(c.ReaderLeft(drain.query))
            operator.happen(c.CommandAsked(m.DrainWorker(drain.query + 10**6, drain.worker, undo=True)))
            lives = self._broker_lives
            self.clock.after(2_000, lambda: self._see_to_it(operator, drain, lives))
        else:  # no client is left, neither to undo the drain nor to wait for an end
            self.gone.update(client.name for client in self.clients)

    def _see_to_it(self, operator: ClientNode, drain: m.DrainWorker, lives: int) -> None:
        """Sends the order again if a broker or a client died before the worker had it, as a person would."""
        worker = next(worker for worker in self.workers if worker.config.name == drain.worker)
        # Of two brokers one may have taken the order and not have got through for a while.
        lost = self.plan.brokers > 1 or lives != self._broker_lives or not operator.alive
        if lost and worker.core.drain.drained:
            self._undo(operator, m.DrainWorker(drain.query + 1_000, drain.worker))
        elif self.clock.now_ms < 2 * faults.FAULTS_END_MS:  # a frozen worker reads it when it wakes
            self.clock.after(2_000, lambda: self._see_to_it(operator, drain, lives))

    @property
    def _broker_lives(self) -> int:
        return sum(len(broker.past) for broker in self.brokers)

    def _stall(self, client: ClientNode, length_ms: int) -> None:
        """Its user reads nothing for a while: tokens are left out, and fetched afterwards."""
        ids = [id for (name, id), heard in self.history.heard.items() if name == client.name and not heard.ends]
        for id in ids:
            client.happen(c.ReaderBehind(id))
            self.clock.after(length_ms, lambda i=id: client.happen(c.ReaderCaughtUp(i)))  # type: ignore[misc]

    def _link_incident(self, kind: str, node: WorkerNode | ClientNode, length_ms: int) -> None:
        wire = node.wire if isinstance(node, ClientNode) else self.random.choice(node.wires)
        match kind:
            case "cut":
                wire.cut()
            case "partition":
                wire.partition(length_ms * 2)
            case "tokens down":
                wire.tokens_dead = True
            case "freeze":
                node.freeze(length_ms)

    def _maybe_restart(self, who: int, delay_ms: int) -> None:
        """Worker 0 always comes back: without any worker no progress could be required. Nor without an adapter."""
        if who == 0 or self.random.random() < 0.6 or self.adapted:
            self.clock.after(delay_ms, lambda: self._restart(who))

    def _restart(self, who: int) -> None:
        if not self.workers[who].alive:
            self.workers[who] = self._start_worker(self.workers[who].config)
            self.workers[who].plan_wakeup()

    def _heal(self) -> None:
        self.network.healed = True
        for index, node in enumerate(self.workers):
            node.config = _healthy(node.config)
            if node.engine is not None:
                node.engine._options = node.config.fake
            if not node.alive and (index == 0 or self.adapted):
                self._restart(index)

    def _settle(self) -> None:
        """Progress is owed: run on until nothing is left to do, or the time for it is over."""
        while self.clock.now_ms < faults.SETTLED_MS:
            self.clock.run_until(self.clock.now_ms + 2_000)
            if not self.history.waiting(self.gone) and not self._unsettled():
                self.clock.run_until(self.clock.now_ms + 1_000)  # whatever comes after the end comes now
                return

    # --- the judgement -------------------------------------------------------------------------------

    def _unsettled(self) -> list[str]:
        """After healing nothing may be left over anywhere."""
        wrong: list[str] = []
        for state in (broker.core.state for broker in self.brokers):
            if any(client.alive for client in self.clients):  # else no client is left that could end a drain
                wrong += [f"stuck: request {id.hex()[:8]} lives in {r.state.value}" for id, r in state.requests.items()]
            for client in state.registry.clients.values():
                if client.unacked:
                    wrong.append(f"stuck: {len(client.unacked)} ENDs are not acknowledged")
            if state.archive.owed_bytes:
                wrong.append(f"stuck: {state.archive.owed_bytes} transcript bytes are never freed")
        for worker in self.workers:
            if worker.alive and len(worker.core.runs):
                wrong.append(f"stuck: {worker.config.name} still holds {len(worker.core.runs)} runs")
            if worker.alive and worker.core.drain.drained and any(c.alive for c in self.clients):
                wrong.append(f"stuck: {worker.config.name} is still drained")  # each drain was taken back
        lost = 0 if self.keys.hostile else self._counted("workers_lost")
        if self.plan.calm and not self.come_and_go and (self._counted("moved") or lost):
            wrong.append(f"disturbed: {self._counted('moved')} moves although nothing went wrong")
        return wrong

    def _counted(self, name: str) -> int:
        return sum(broker.counted(name) for broker in self.brokers)

    def _report(self, wrong: list[str]) -> Report:
        counted = self._counted
        duplicates = counted("duplicate_chunks") + sum(client.duplicates for client in self.clients)
        report = Report(
            self.seed,
            wrong,
            tokens=self.history.tokens,
            requests=len(self.history.heard),
            dispatches=counted("dispatched"),
            moves=counted("moved"),
            adopted=counted("adopted"),
            duplicates=duplicates,
            stale=counted("stale_chunks"),
            repaired=counted("repaired"),
            poisoned=counted("convicted"),
        )
        if wrong:
            report.story = self._story(wrong)
        return report

    def _story(self, wrong: list[str]) -> list[str]:
        lines = [str(self.plan), *([f"keys: {self.keys.now}"] if self.keys.there else []), *self.log]
        for (client, id), heard in self.history.heard.items():
            if any(id.hex()[:8] in problem for problem in wrong):
                lines.append(f"-- {client} {id.hex()[:8]}: {len(heard.ids)} tokens, {heard.end or heard.error}")
                for number, broker in enumerate(self.brokers):
                    live = broker.core.state.requests.get(id)
                    ended = broker.core.state.archive.get(id)
                    story = live.story if live else ended.story if ended else []
                    lines += [f" b{number} {at - broker.skew_ms:6} ms {what}: {detail}" for at, what, detail in story]
        return lines


def _stop() -> object:
    from llambo.worker.agent.events import StopRequested

    return StopRequested()


def _healthy(config: WorkerConfig) -> WorkerConfig:
    from dataclasses import replace

    return replace(config, fake=replace(config.fake, faults=replace(config.fake.faults, crash_at=0, hang_at=0)))


def _where(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_tb(error.__traceback__)[-3:])
