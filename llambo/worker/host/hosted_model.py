"""A model as its host knows it: its state, who holds it, when it was used, and whether it may be unloaded (`idle`).

stored --> loading --> ready --> unloading --> stored
              |
              +--> failed --> loading           a failed one is loaded again after a pause, which doubles
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llambo.mesh.wire import messages as m
from llambo.worker.host.host_events import StoredModel

#: Every legal step, and its reason.
MODEL_STEPS: dict[m.HostedState, dict[m.HostedState, str]] = {
    "stored": {"loading": "wanted or held, and it fits"},
    "loading": {"ready": "loaded", "failed": "its worker ended", "unloading": "the host stops"},
    "ready": {"unloading": "evicted, idle for its ttl, or the host stops", "failed": "its worker ended"},
    "unloading": {"stored": "the engine process is gone", "ready": "it was busy"},
    "failed": {"loading": "wanted or held, the pause is over, and it fits"},
}
MIB = 1024 * 1024

Sizes = dict[str, int]


def fits(needs: Sizes, free: Sizes) -> bool:
    return all(free.get(name, 0) >= size for name, size in needs.items())


def add(free: Sizes, needs: Sizes, sign: int = 1) -> None:
    for name, size in needs.items():
        free[name] = free.get(name, 0) + sign * size


def in_mib(sizes: Sizes) -> str:
    return ", ".join(f"{size // MIB} MiB of {name}" for name, size in sizes.items()) or "nothing"


@dataclass(slots=True)
class Holder:
    until_ms: int
    pin: bool


@dataclass(slots=True)
class LoadHistory:
    """When a model was loaded, and how it went."""

    loads: int = 0
    #: How long the last one took.
    took_ms: int = 0
    started_at: int = 0
    ready_at: int = 0
    #: Failures in a row, the reason of the last one, and when the model may be tried again.
    failures: int = 0
    problem: str = ""
    retry_at: int = 0
    #: Memory ran out: everything that may be unloaded has to go before it is tried again.
    make_room: bool = False


@dataclass(slots=True)
class ModelAtHost:
    stored: StoredModel
    worker: str
    state: m.HostedState = "stored"
    #: Its engine is ready. In the state `ready` it may have died and be starting again.
    up: bool = False
    percent: int = 0
    active: int = 0
    #: When it was busy last, or became ready.
    used_at: int = 0
    #: What it takes while it is loaded. The catalogue may say something else since then.
    takes: Sizes = field(default_factory=dict)
    #: Those that it was loaded with. One that is added later is served when it is loaded again.
    adapters: tuple[str, ...] = ()
    #: Of the kinds of memory that were measured while it was loaded: what this file needs, with these settings.
    measured: Sizes = field(default_factory=dict)
    #: The refusals of its worker that are known.
    refusals: int = 0
    holders: dict[str, Holder] = field(default_factory=dict)
    history: LoadHistory = field(default_factory=LoadHistory)
    #: An operator wants it to be unloaded.
    unwanted: bool = False
    #: It is not in the catalogue any more.
    removed: bool = False

    def step(self, state: m.HostedState) -> None:
        assert state in MODEL_STEPS[self.state], f"{self.name} cannot go from {self.state} to {state}"
        self.state = state

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def needs(self) -> Sizes:
        """The estimate of the catalogue until it was loaded once."""
        return {**self.stored.needs, **self.measured}

    @property
    def pinned(self) -> bool:
        return any(holder.pin for holder in self.holders.values())

    @property
    def loaded(self) -> bool:
        """It has memory, or its process may still have some."""
        return self.state in ("loading", "ready", "unloading")

    @property
    def is_helper(self) -> bool:
        return self.stored.kind != "generate"

    @property
    def idle(self) -> bool:
        return self.state == "ready" and self.active == 0 and not self.holders

    def report(self, refusal: str, now_ms: int) -> m.HostedModel:
        """`refusal`: why it can never be loaded; empty if it can."""
        history = self.history
        state: m.HostedState = self.state
        if refusal and not self.loaded:
            state = "failed"
        elif (state == "ready" and not self.up) or (state == "failed" and history.make_room):
            state = "loading"
        return m.HostedModel(
            name=self.name,
            kind=self.stored.kind,
            state=state,
            percent=self.percent if state == "loading" else 0,
            needs=self.needs,
            worker=self.worker if self.loaded else "",
            pinned=self.pinned,
            holders=list(self.holders),
            load_ms=history.took_ms,
            loads=history.loads,
            adapters=list(self.adapters if self.loaded else self.stored.adapters),
            note=(refusal or history.problem)[:256],
            # 0 would mean that it can never be loaded.
            retry_ms=max(1, history.retry_at - now_ms) if state == "failed" and not refusal else 0,
        )
