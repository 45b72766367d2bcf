"""Worlds with hosts: models that are loaded when they are asked for, by the core of the host and that of the broker.

A host runs a real `HostCore`; each worker that it starts is a `WorkerNode` with a real core and a fake engine. What is
checked is seen from outside, at the orders of the host core and at what clients receive:

    budget         the models whose engines exist never need more memory than the host has: what was measured when they
                   were loaded there before, and what is expected of the others, which is no less
    single flight  no second engine of a model is started at a host
    busy, held     no model is unloaded that runs a request as far as the host knows, or that is pinned or held
    answered       every request ends: with its tokens, or with the reason why its model cannot be loaded
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import msgspec

from llambo.mesh.client import client_events as c
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.worker.agent import events as w
from llambo.worker.agent.announcement import ProcessIdentity
from llambo.worker.config import FakeOptions, HostConfig, WorkerConfig
from llambo.worker.host import host_events as h
from llambo.worker.host.host_core import HostCore, check_host
from tests.sim import faults
from tests.sim.clock import Clock
from tests.sim.history import EMBEDDING_SIZE, Heard, History, Wanted
from tests.sim.keys import Keys
from tests.sim.network import Wire
from tests.sim.nodes import Peer, WorkerNode
from tests.sim.world import Report, World

MEMORY = 100
HOST_INCIDENTS = ("crash", "power loss", "freeze", "cut", "partition", "engine crash", "engine crash")
#: The engine process of a worker that has left ends so much later.
REAPED_MS = (5, 60)


class DemandHistory(History):
    """A request may also end because its model cannot be loaded. `unloadable`: the models for which that is true."""

    def __init__(self, style: str, *, hangs: bool = False, apart: bool = False, limits: bool = False) -> None:
        super().__init__(style, hangs=hangs, apart=apart, limits=limits)
        self.unloadable: set[str] = set()
        self.refused = 0

    def _judge_poison(self, id: bytes, wanted: Wanted) -> list[str]:
        heard = next(heard for (_, other), heard in self.heard.items() if other == id and heard.ends)
        return self._judge_refusal(wanted, heard.end.error if heard.end is not None else heard.error)

    def _judge_refusal(self, wanted: Wanted, error: ErrorInfo | None) -> list[str]:
        self.refused += 1
        if error is None or "could not be loaded on" not in error.text:
            return [f"failed: {error}"]
        if wanted.message.model not in self.unloadable:
            return [f"failed: {wanted.message.model} can be loaded, and: {error.text}"]
        return []

    def _judge_end(self, id: bytes, wanted: Wanted, heard: Heard, end: m.End) -> list[str]:
        if end.error is not None and end.error.code is Code.ENGINE_FAILED:
            return self._judge_refusal(wanted, end.error)
        return super()._judge_end(id, wanted, heard, end)


class HostNode(Peer):
    def __init__(
        self,
        clock: Clock,
        skew_ms: int,
        config: HostConfig,
        models: list[h.StoredModel],
        random: Random,
        wires: list[Wire],
        start: Callable[[HostNode, str, str], WorkerNode | None],
    ) -> None:
        super().__init__(clock, skew_ms, wires)
        for number, wire in enumerate(wires):
            wire.from_broker = lambda bundle, n=number: self.happen(w.ControlArrived(n, bundle[0], bundle[1]))  # type: ignore[misc]
            wire.on_sign = lambda sign, n=number: self.happen(w.ConnectionChanged(n, sign))  # type: ignore[misc]
        self.config = config
        self.stored = {model.name: model for model in models}
        self.core = HostCore(config, ProcessIdentity(random.randbytes(8), "sim"))
        self.random = random
        #: By model: the worker of each engine process that exists; None: one that cannot load its model.
        self.engines: dict[str, WorkerNode | None] = {}
        self.loads = self.unloads = 0
        #: What models really need, of those that were loaded here. The host is sent it when they are ready.
        self.measured: dict[str, int] = {}
        self._start = start
        self._reported: dict[str, h.WorkerChanged] = {}

    def begin(self) -> None:
        self.happen(h.ModelsFound(list(self.stored.values())))

    def wire_of(self, link: int) -> Wire:
        return self.wires[link]

    def handle(self, event: Any) -> list[Any]:
        actions = self.core.handle(event, self.now_ms)
        check_host(self.core)
        return actions

    def wakeup(self) -> int:
        return self.core.next_wakeup_ms()

    def tick(self) -> Any:
        return w.Ticked()

    def perform_other(self, order: Any) -> None:
        match order:
            case h.StartWorker(model, name):
                assert model not in self.engines, f"a second engine of {model} is started on {self.config.name}"
                self.engines[model] = None
                needed = sum(self.measured.get(each, self.stored[each].needs["ram"]) for each in self.engines)
                assert needed <= MEMORY, f"{needed} of {MEMORY} are needed on {self.config.name}: {list(self.engines)}"
                self.loads += 1
                self.engines[model] = self._start(self, model, name)
            case h.UnloadWorker(model):
                self._unload(model)
            case h.StopWorker(model):
                if (worker := self.engines.get(model)) is not None:
                    worker.happen(w.StopRequested())
            case _:
                pass

    def _unload(self, model: str) -> None:
        known, state = self._reported.get(model), self.core.loading.models[model]
        assert known is None or not known.active, f"{model} is unloaded, and runs {known and known.active} requests"
        assert not state.holders, f"{model} is unloaded, and held by {list(state.holders)}"
        self.unloads += 1
        worker = self.engines.get(model)
        if worker is not None:
            worker.happen(w.StopRequested(unless_busy=True))
            self.watch(model, worker)

    def watch(self, model: str, worker: WorkerNode) -> None:
        """What the host knows of its worker, whenever that has changed. The agent tells it by a thread of its own."""
        core, engine = worker.core, worker.core.engine
        if not worker.alive or self.engines.get(model) is not worker:
            return
        change = h.WorkerChanged(
            model, engine.is_ready, core.runs.active, engine.percent, core.drain.refusals, self._measure(model)
        )
        if engine.is_ready:
            self.measured[model] = change.memory_bytes
        if change != self._reported.get(model):
            self._reported[model] = change
            self.happen(change)

    def _measure(self, model: str) -> int:
        """The same for all hosts, as the size of a file."""
        expected = self.stored[model].needs["ram"]
        return expected * Random(f"{model} {expected}").randint(50, 100) // 100

    def ended(self, model: str, worker: WorkerNode | None, problem: str = "", *, out_of_memory: bool = False) -> None:
        """Its engine process is gone."""
        if self.alive and self.engines.get(model, self) is worker:
            del self.engines[model]
            self._reported.pop(model, None)
            self.happen(h.WorkerEnded(model, problem, out_of_memory))

    def die(self, *, noticed: bool) -> None:
        super().die(noticed=noticed)
        for worker in self.engines.values():
            if worker is not None:
                worker.engine = None
                worker.die(noticed=noticed)

    def freeze(self, length_ms: int) -> None:
        """The process stands still, and all agents in it; engines are processes of their own."""
        super().freeze(length_ms)
        for worker in self.engines.values():
            if worker is not None:
                worker.freeze(length_ms)


class HostedWorker(WorkerNode):
    """The worker of a model, which reports to its host what happens to it."""

    report: Callable[[], None] = staticmethod(lambda: None)

    def happen(self, event: Any) -> None:
        super().happen(event)
        self.report()


class DemandWorld(World):
    come_and_go = True

    def __init__(self, seed: int, check_every: int = 1, brokers: int = 0) -> None:
        super().__init__(seed, check_every, brokers)
        self.workers: list[WorkerNode] = []
        self.plan = replace(self.plan, poison=0, incidents=tuple(i for i in self.plan.incidents if _is_of_others(i)))
        self.fate = Random(f"models of {seed}")
        fate = self.fate
        count = fate.randint(1, 3)
        self.models = [
            h.StoredModel(f"m{number}", fate.choice(("generate",) * 4 + ("embed",)), {"ram": fate.randint(20, 70)})
            for number in range(fate.randint(2, 6))
        ]
        self.broken: set[str] = set()
        if fate.random() < 0.3:
            self.broken.add(fate.choice(self.models).name)
        if fate.random() < 0.15:
            self.models.append(h.StoredModel("large", "generate", {"ram": MEMORY + 1}))
        self.flaky = 0.0 if self.plan.calm else fate.choice((0.0, 0.0, 0.2))
        self.healed = False
        self.holds = fate.choice((0, 0, 3, 8))
        self.demand.unloadable |= self.broken | {"large"}
        self.hosts = [self._host(f"h{number}", count) for number in range(count)]

    def _new_keys(self) -> Keys:
        """None: a wire's name stands for its key, and a host and its workers would have to have the same."""
        return Keys(self.seed, self.plan, one_of=0)

    def _new_history(self, **known: bool) -> DemandHistory:
        return DemandHistory(self.plan.style, **known)

    @property
    def demand(self) -> DemandHistory:
        assert isinstance(self.history, DemandHistory)
        return self.history

    # --- hosts -----------------------------------------------------------------------------------------

    def _host(self, name: str, count: int) -> HostNode:
        """Each model is on at least one of them: the one whose turn it is."""
        turn = int(name[1:])
        models = [
            model
            for at, model in enumerate(self.models)
            if at % count == turn or Random(f"{self.seed} {name} {at}").random() < 0.5
        ]
        config = HostConfig(
            tuple(f"tcp://b{number}:7330" for number in range(self.plan.brokers)),
            name,
            budget={"ram": MEMORY},
            min_loaded_ms=self.seed % 3 * 200,
            model_ttl_ms=self.seed % 2 * 800,
            helper_percent=20,
        )
        wires = [Wire(self.network, name, True, broker.hub) for broker in self.brokers]
        return HostNode(self.clock, self._skew(), config, models, self.fate, wires, self._load)

    def _load(self, host: HostNode, model: str, name: str) -> WorkerNode | None:
        self._check_alone(host, model)
        load_ms = self.fate.choice((20, 200, 900))
        fails = model in self.broken or (not self.healed and self.fate.random() < self.flaky)
        if fails:
            self.demand.unloadable.add(model)
            out_of_memory = self.fate.random() < 0.3
            problem = "out of memory" if out_of_memory else "the file is corrupt"
            self.clock.after(load_ms, lambda: host.ended(model, None, problem, out_of_memory=out_of_memory))
            return None
        fake = FakeOptions(
            style="plain" if self.plan.style == "plain" else "wander",
            slots=self.fate.randint(1, 3),
            ttft_ms=5,
            tokens_per_s=self.fate.choice((100, 400)),
            burst=self.plan.burst,
            answer_tokens=self.answer_tokens,
            embedding_size=EMBEDDING_SIZE,
            kind=host.stored[model].kind,
        )
        config = WorkerConfig(host.config.brokers, name, model=model, fake=fake, stall_ms=1_000, drain_ms=1_000)
        wires = [Wire(self.network, name, True, broker.hub) for broker in self.brokers]
        worker = HostedWorker(self.clock, host.skew_ms, config, self.random, wires, self.history)
        worker.load_ms = load_ms
        worker.on_exit = partial(self._left, host, model, worker)
        worker.report = partial(host.watch, model, worker)
        self.workers.append(worker)
        self.clock.after(1, worker.plan_wakeup)
        return worker

    def _check_alone(self, host: HostNode, model: str) -> None:
        """Where nothing goes wrong, and there is one broker, no second host loads what another one is loading."""
        others = (other.core.loading.models.get(model) for other in self.hosts if other is not host)
        loading = [other for other in others if other is not None and other.state == "loading"]
        alone = self.plan.calm and self.plan.brokers == 1 and not self.holds
        assert not (alone and loading), f"{model} is loaded on {host.config.name} and, at the same time, elsewhere"

    def _left(self, host: HostNode, model: str, worker: WorkerNode) -> None:
        self.workers.remove(worker)
        worker.engine = None
        if host.core.loading.models[model].state == "loading":  # its engines were killed until it gave up
            self.demand.unloadable.add(model)
        self.clock.after(self.fate.randint(*REAPED_MS), lambda: host.ended(model, worker))

    def _restart_host(self, number: int) -> None:
        before = self.hosts[number]
        if not before.alive:
            self.workers = [worker for worker in self.workers if worker.alive]
            self.hosts[number] = self._host(before.config.name, len(self.hosts))
            self.hosts[number].loads, self.hosts[number].unloads = before.loads, before.unloads
            self.hosts[number].begin()

    # --- what is asked, and what goes wrong -------------------------------------------------------------

    def run(self) -> Report:
        for host in self.hosts:
            host.begin()
        if not self.plan.calm:
            for _ in range(self.fate.choice((0, 1, 3, 6))):
                at, kind = self.fate.randint(300, faults.FAULTS_END_MS - 500), self.fate.choice(HOST_INCIDENTS)
                self.clock.at(at, partial(self._host_incident, kind, self.fate.randrange(len(self.hosts))))
        for _ in range(self.holds):
            self.clock.at(self.fate.randint(100, faults.FAULTS_END_MS - 500), self._hold)
        return super().run()

    def _plan_requests(self) -> None:
        random = self.fate
        for number in range(random.randint(5, 30)):
            at, client = random.randint(150, faults.FAULTS_END_MS - 1_000), random.choice(self.clients)
            model = random.choice(self.models)
            embeds = model.kind == "embed"
            texts = msgspec.msgpack.encode([f"{number} {text}" for text in range(number % 5 + 1)])
            message = m.InferenceRequest(
                random.randbytes(16),
                model.name,
                random.choice((1, 5, 20, 60)) if not embeds else 30,
                stream=random.random() < 0.8,
                priority=random.choice(("interactive", "normal", "batch")),
                seed=random.getrandbits(62),
                task="embed" if embeds else "generate",
            )
            prompt = texts if embeds else f"prompt {number}".encode()
            self.history.wanted[message.id] = Wanted(message, prompt, self.answer_tokens)
            self.clock.at(at, partial(self._submit, client, message))
            if random.random() < 0.1:
                self.clock.at(at + random.randint(1, 800), partial(self._cancel, client, message))

    def _plan_followers(self) -> None:
        """They are about lost brokers: world.py has them."""

    def _hold(self) -> None:
        """A client holds or pins a model for a while, gives it back, or unloads it."""
        random = self.fate
        client = next((client for client in self.clients if client.alive), None)
        if client is None:
            return
        model, undo = random.choice(self.models).name, random.random() < 0.3
        order = m.HoldModel(
            random.getrandbits(40),
            model,
            holder=random.choice(("x", "y")) if not undo or random.random() < 0.5 else "",
            ttl_ms=0 if undo else random.choice((300, 3_000)),
            pin=not undo and random.random() < 0.3,
            undo=undo,
        )
        client.happen(c.CommandAsked(order))

    def _host_incident(self, kind: str, number: int) -> None:
        host = self.hosts[number]
        self.log.append(f"{self.clock.now_ms} ms: {kind} of {host.config.name}")
        if not host.alive:
            return
        match kind:
            case "crash" | "power loss":
                host.die(noticed=kind == "crash")
                self.clock.after(self.fate.choice((50, 1_000, 3_000)), partial(self._restart_host, number))
            case "freeze":
                host.freeze(self.fate.choice((300, 2_500)))
            case "engine crash":
                for worker in list(host.engines.values())[:1]:
                    if worker is not None:
                        worker.engine_dies("killed by signal 9", outside=True)
            case "cut":
                self.fate.choice(host.wires).cut()
            case "partition":
                self.fate.choice(host.wires).partition(self.fate.choice((500, 3_000)))

    def _heal(self) -> None:
        self.network.healed = self.healed = True
        for number in range(len(self.hosts)):
            self._restart_host(number)

    def _report(self, wrong: list[str]) -> Report:
        report = super()._report(wrong)
        report.loads = sum(host.loads for host in self.hosts)
        report.unloads = sum(host.unloads for host in self.hosts)
        report.refused = self.demand.refused
        return report


def _is_of_others(incident: tuple[int, str, int, int]) -> bool:
    """Of a broker or a client; those of workers are drawn anew, because these come and go."""
    return incident[1].startswith(("broker ", "client "))
