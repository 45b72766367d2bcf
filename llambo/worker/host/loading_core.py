"""Which models of a host are loaded: the rules that hold whatever brokers want.

Brokers decide what is loaded where. Each sends what it wants here, and what may be evicted for that (`BrokerWish`).
This core follows them in turn, as far as these rules allow:

    budget      what is loaded, being loaded or being unloaded fits the budget of each kind of memory, and is at most
                `LOADED_PER_HOST` models. Memory is free when the engine process is gone, and not before
    one flight  a model is loaded once, however many ask for it
    busy        a model whose worker runs something is not unloaded. The worker has the last word: it refuses to stop
                if a request has arrived in the meantime
    held        nor is one that somebody holds, or that is pinned
    young       nor one that became ready a moment ago: within `STAY_LOADS` times as long as its load took, at most
                `min_loaded_ms`. So models that take turns are being loaded for a sixth of the time at most
    helpers     nor a model for embeddings or reranking for one that generates, as long as those have no more than
                their share of the budget
    no waste    a model is evicted only if the one that is wanted fits then

A load that runs out of memory is tried once more when everything that may be unloaded is gone. Until then brokers see
it as loading, and its requests wait.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.timers import NEVER_MS
from llambo.worker.agent.events import Log
from llambo.worker.config import RAM, HostConfig
from llambo.worker.host.host_events import (
    HostAction,
    StartWorker,
    StopWorker,
    StoredModel,
    UnloadWorker,
    WorkerChanged,
    WorkerEnded,
)
from llambo.worker.host.hosted_model import MIB, Holder, ModelAtHost, Sizes, add, fits, in_mib

#: The pause after a load that failed doubles from the first to the last.
RETRY_MS = (5_000, 300_000)
#: How many times as long as its load took a model stays at least.
STAY_LOADS = 5
#: The number of loaded models is limited like a kind of memory of this name, of which each takes one.
_PLACES = ""
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._@-]+")


@dataclass(slots=True)
class BrokerWish:
    """What one broker wants, until it says otherwise or has not repeated it for a while."""

    load: tuple[str, ...]
    evict: tuple[str, ...]
    until_ms: int


class Loading:
    """The models of one host. Its owner passes on what happens, then calls `settle`; actions are appended to `out`."""

    def __init__(self, config: HostConfig, out: list[HostAction]) -> None:
        self.models: dict[str, ModelAtHost] = {}
        self.stopping = False
        #: Something that brokers should know has changed: `now`, or with the next heartbeat.
        self.changed = False
        self.changed_now = False
        self.next_wakeup_ms = NEVER_MS
        self.config = config
        self._out = out
        self._wishes: dict[int, BrokerWish] = {}
        #: Since when each model waits: of two brokers the one that has waited longer comes first.
        self._since: dict[str, int] = {}

    # --- what has happened -------------------------------------------------------------------------

    def on_found(self, found: Iterable[StoredModel]) -> None:
        names = set()
        for stored in found:
            names.add(stored.name)
            model = self.models.get(stored.name)
            if model is None:
                self.models[stored.name] = ModelAtHost(stored, self._worker_name(stored.name))
            else:
                if model.stored.needs != stored.needs:
                    model.measured = {}  # it is another file
                model.stored, model.removed = stored, False
        for name, model in list(self.models.items()):
            if name not in names:
                model.removed = True
                self._forget(model)
        self._report()

    def on_place(self, broker: int, place: m.PlaceModels, until_ms: int) -> None:
        self._wishes[broker] = BrokerWish(tuple(place.load), tuple(place.evict), until_ms)

    def on_broker_lost(self, broker: int) -> None:
        """Holders remain: they belong to clients, which may ask another broker."""
        self._wishes.pop(broker, None)

    def on_hold(self, hold: m.Hold, now_ms: int) -> None:
        model = self.models.get(hold.model)
        if model is None:
            self._out.append(Log(f"{hold.holder or 'an operator'} asks for {hold.model}, which is not here"))
            return
        before = dict(model.holders)
        if not hold.undo:
            if hold.holder not in model.holders and len(model.holders) >= limits.HOLDERS_PER_MODEL:
                self._out.append(Log(f"{model.name} has {len(model.holders)} holders; no more are taken", warning=True))
                return
            until_ms = now_ms + hold.ttl_ms if hold.ttl_ms else NEVER_MS
            model.holders[hold.holder] = Holder(until_ms, hold.pin)
            model.unwanted = False
        elif hold.holder:
            model.holders.pop(hold.holder, None)
        else:
            model.holders.clear()
            model.unwanted = model.state in ("ready", "loading")
        if before.keys() != model.holders.keys() or any(before[name].pin != model.holders[name].pin for name in before):
            model.used_at = max(model.used_at, now_ms)  # the ttl of a model counts from its last holder as well
            self._report()

    def on_worker(self, change: WorkerChanged, now_ms: int) -> None:
        model = self.models.get(change.model)
        if model is None or not model.loaded:
            return
        if model.active and not change.active:
            model.used_at = now_ms
        model.active = change.active
        if model.percent != change.percent:
            model.percent = change.percent
            self.changed = True
        if change.ready and not model.up:
            if change.memory_bytes:
                self._measured(model, change.memory_bytes)
            self._on_ready(model, now_ms)
        elif model.up and not change.ready:
            model.up = False
            self._report()
        if change.refusals > model.refusals:
            model.refusals = change.refusals
            if model.state == "unloading" and not self.stopping:
                self._step(model, "ready")

    def _measured(self, model: ModelAtHost, memory_bytes: int) -> None:
        """What was estimated is corrected, for as long as the file and its settings are the same. The budget has the
        last word: a model that needs more than there is left is counted with what is left until it is unloaded."""
        room = self._free(self.loaded).get(RAM, 0) + model.takes.get(RAM, 0)
        if memory_bytes > self.config.budget.get(RAM, 0):
            return  # the estimate was within it, and the model is loaded
        if memory_bytes > room:
            text = f"{model.name} needs {memory_bytes // MIB} MiB of {RAM}, more than was expected"
            self._out.append(Log(text, warning=True))
        model.measured = {RAM: memory_bytes}
        model.takes[RAM] = min(memory_bytes, room)

    def _on_ready(self, model: ModelAtHost, now_ms: int) -> None:
        history = model.history
        model.up = True
        model.used_at = history.ready_at = now_ms
        history.loads += 1
        history.failures, history.problem, history.make_room = 0, "", False
        if model.state == "loading":
            history.took_ms = now_ms - history.started_at
            self._step(model, "ready")
        self._report()

    def on_ended(self, ended: WorkerEnded, now_ms: int) -> None:
        model = self.models.get(ended.model)
        if model is None or not model.loaded:
            return
        model.up, model.active, model.percent, model.takes, model.refusals = False, 0, 0, {}, 0
        model.unwanted = False
        if model.state == "unloading":
            self._step(model, "stored")
        else:
            self._on_failed(model, ended, now_ms)
        self._forget(model)

    def _on_failed(self, model: ModelAtHost, ended: WorkerEnded, now_ms: int) -> None:
        history = model.history
        history.problem = ended.problem or "its worker has ended"
        history.failures += 1
        # Once in a row of failures: a model that needs more than it says must not unload the others each time.
        first = ended.out_of_memory and history.failures == 1
        history.make_room = first and (bool(self._idle_for(model)) or self._unloading)
        pause_ms = min(RETRY_MS[0] << min(history.failures - 1, 16), RETRY_MS[1])
        history.retry_at = now_ms if history.make_room else now_ms + pause_ms
        again = "when idle models are unloaded" if history.make_room else f"in {pause_ms // 1000} s, if it is wanted"
        self._out.append(Log(f"{model.name} was not loaded: {history.problem}; tried again {again}", warning=True))
        self._step(model, "failed")

    def stop(self) -> None:
        """Stop all workers when their runs have ended; the second time at once."""
        self.stopping = True
        for model in self.models.values():
            if model.loaded:
                if model.state != "unloading":
                    self._step(model, "unloading")
                self._out.append(StopWorker(model.name))

    @property
    def loaded(self) -> list[ModelAtHost]:
        return [model for model in self.models.values() if model.loaded]

    # --- what follows ------------------------------------------------------------------------------

    def settle(self, now_ms: int) -> None:
        """Load and unload what the rules allow."""
        self.next_wakeup_ms = NEVER_MS
        self._expire(now_ms)
        if self.stopping:
            return
        self._unload_idle(now_ms)
        free = self._free(self.loaded)
        # What is free when everything that is being unloaded is gone, less what is promised to models that wait for it.
        soon = self._free(model for model in self.loaded if model.state != "unloading")
        for model in self._wanted(now_ms):
            needs = _with_place(model.needs)
            wait = False
            if model.history.make_room:
                idle = self._idle_for(model)
                victims = [other for other in idle if self._is_old(other, now_ms)]
                wait = bool(idle) or self._unloading
            else:
                victims = self._victims(model, needs, soon, now_ms)
            for victim in victims:
                self._unload(victim, f"for {model.name}")
                add(soon, victim.takes)
            if not fits(needs, soon):
                continue
            add(soon, needs, -1)
            if not wait and fits(needs, free):
                add(free, needs, -1)
                self._load(model, needs, now_ms)

    def _wanted(self, now_ms: int) -> list[ModelAtHost]:
        """Models to load, the first one first.

        These are the ones that have run out of memory and for which room is made; what brokers want, the first wish of
        each before any second one; what is held.
        """
        ranks: dict[str, int] = {}
        for wish in self._wishes.values():
            for rank, name in enumerate(wish.load):
                ranks[name] = min(rank, ranks.get(name, rank))
        for model in self.models.values():
            if model.history.make_room:
                ranks[model.name] = -1
            elif model.holders:
                ranks.setdefault(model.name, limits.MODELS_PER_HOST)
        # One that is loaded does not wait: when it is evicted, the one that it is evicted for has waited longer.
        waiting = [name for name in ranks if name in self.models and not self.models[name].loaded]
        self._since = {name: self._since.get(name, now_ms) for name in waiting}
        wanted = []
        for name in sorted(waiting, key=lambda name: (ranks[name], self._since[name])):
            model = self.models[name]
            if model.removed or self.refusal(model):
                continue
            if now_ms < model.history.retry_at:
                self._wake(model.history.retry_at)
                continue
            wanted.append(model)
        return wanted

    def _victims(self, model: ModelAtHost, needs: Sizes, soon: Sizes, now_ms: int) -> list[ModelAtHost]:
        """The first of those that may be evicted for it, as many as are needed; none if all of them are not enough."""
        room, victims = dict(soon), []
        for victim in self._evictable(model.name):
            if fits(needs, room):
                break
            if victim.idle and not self._protected(victim, model) and self._is_old(victim, now_ms):
                victims.append(victim)
                add(room, victim.takes)
        return victims if fits(needs, room) else []

    def _evictable(self, name: str) -> Iterator[ModelAtHost]:
        """Each once, in the order of the brokers that want this model."""
        seen = {name}
        for wish in self._wishes.values():
            for victim in wish.evict if name in wish.load else ():
                if victim in self.models and victim not in seen:
                    seen.add(victim)
                    yield self.models[victim]

    def _idle_for(self, model: ModelAtHost) -> list[ModelAtHost]:
        """What may be unloaded for it, now or when it is not young any more."""
        return [
            other for other in self.loaded if other is not model and other.idle and not self._protected(other, model)
        ]

    @property
    def _unloading(self) -> bool:
        return any(model.state == "unloading" for model in self.loaded)

    def _is_old(self, model: ModelAtHost, now_ms: int) -> bool:
        old_at = self._old_at(model)
        if now_ms < old_at:
            self._wake(old_at)
        return now_ms >= old_at

    def _old_at(self, model: ModelAtHost) -> int:
        history = model.history
        return history.ready_at + min(self.config.min_loaded_ms, STAY_LOADS * history.took_ms)

    def _protected(self, helper: ModelAtHost, model: ModelAtHost) -> bool:
        """A helper is not evicted for a model that generates while all helpers are within their share."""
        if not helper.is_helper or model.is_helper:
            return False
        used = self._used(model for model in self.loaded if model.is_helper)
        return all(size <= self._share(name) for name, size in used.items())

    def _unload_idle(self, now_ms: int) -> None:
        """Those that were idle for their ttl, and those that an operator wants to be unloaded."""
        ttl_ms = self.config.model_ttl_ms
        for model in self.models.values():
            if not model.idle:
                continue
            if model.unwanted:
                self._unload(model, "as an operator wants")
            elif ttl_ms:
                due = max(model.used_at + ttl_ms, self._old_at(model))
                if now_ms >= due:
                    self._unload(model, f"idle for {(now_ms - model.used_at) // 1000} s")
                else:
                    self._wake(due)

    def _expire(self, now_ms: int) -> None:
        for broker, wish in list(self._wishes.items()):
            if now_ms >= wish.until_ms:
                del self._wishes[broker]
            else:
                self._wake(wish.until_ms)
        for model in self.models.values():
            for name, holder in list(model.holders.items()):
                if now_ms >= holder.until_ms:
                    del model.holders[name]
                    model.used_at = max(model.used_at, now_ms)
                    self._report()
                else:
                    self._wake(holder.until_ms)

    def _load(self, model: ModelAtHost, takes: Sizes, now_ms: int) -> None:
        self._step(model, "loading")
        model.takes, model.history.started_at = takes, now_ms
        model.adapters = model.stored.adapters
        self._out.append(Log(f"{model.name}: loading, {in_mib(model.needs)}"))
        self._out.append(StartWorker(model.name, model.worker))

    def _unload(self, model: ModelAtHost, why: str) -> None:
        self._step(model, "unloading")
        self._out.append(Log(f"{model.name}: unloading, {why}"))
        self._out.append(UnloadWorker(model.name))

    # --- what brokers are sent -----------------------------------------------------------------------

    def hosted(self, now_ms: int) -> list[m.HostedModel]:
        return [model.report(self.refusal(model), now_ms) for model in self.models.values()]

    def memory(self) -> dict[str, m.Memory]:
        used = self._used(self.loaded)
        return {name: m.Memory(size, used.get(name, 0), self._share(name)) for name, size in self.config.budget.items()}

    def _share(self, name: str) -> int:
        """What helpers have for themselves of this kind of memory."""
        return self.config.budget.get(name, 0) * self.config.helper_percent // 100

    def refusal(self, model: ModelAtHost) -> str:
        """Why it can never be loaded here; empty if it can."""
        needs, budget = model.needs, self.config.budget
        if model.stored.refusal or fits(needs, budget):
            return model.stored.refusal
        return f"it needs {in_mib(needs)}, and the budget is {in_mib(budget)}"

    # --- inside --------------------------------------------------------------------------------------

    def _used(self, models: Iterable[ModelAtHost]) -> Sizes:
        used: Sizes = {}
        for model in models:
            add(used, model.takes)
        used.pop(_PLACES, None)
        return used

    def _free(self, taking: Iterable[ModelAtHost]) -> Sizes:
        free = self.config.budget | {_PLACES: limits.LOADED_PER_HOST}
        for model in taking:
            add(free, model.takes, -1)
        return free

    def _worker_name(self, model: str) -> str:
        """What the key of this host allows: its name, and more after a dash. Unique among the models of this host."""
        word = f"{self.config.name}-{_NOT_IN_NAMES.sub('-', model)}"[: limits.NAME_CHARS - 4]
        taken = {other.worker for other in self.models.values()}
        return next(name for n in range(len(taken) + 1) if (name := f"{word}-{n + 1}" if n else word) not in taken)

    def _forget(self, model: ModelAtHost) -> None:
        if model.removed and not model.loaded:
            del self.models[model.name]
            self._report()

    def _wake(self, at_ms: int) -> None:
        self.next_wakeup_ms = min(self.next_wakeup_ms, at_ms)

    def _report(self) -> None:
        self.changed = self.changed_now = True

    def _step(self, model: ModelAtHost, state: m.HostedState) -> None:
        model.step(state)
        self._report()


def _with_place(needs: Sizes) -> Sizes:
    return {**needs, _PLACES: 1}


def check_loading(loading: Loading) -> None:
    """What is true between any two events. Tests and the simulator check it after each."""
    for name, memory in loading.memory().items():
        assert memory.used <= loading.config.budget[name], f"{memory.used} of {memory.bytes} bytes of {name} are used"
    assert len(loading.loaded) <= limits.LOADED_PER_HOST, f"{len(loading.loaded)} models are loaded"
    for model in loading.models.values():
        assert bool(model.takes) == model.loaded, f"{model.name} is {model.state} and takes {model.takes}"
        assert model.loaded or not (model.up or model.active), f"{model.name} is {model.state} and has a worker"
