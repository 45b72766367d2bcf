"""The engine child as the core sees it: started, loading, ready, killed when it stalls, started again.

An engine that dies while it loads may have used an instruction that this machine does not have: the next one is started
with safe settings. An engine that was never ready and fails with safe settings as well ends the worker; one that was
ready is started again after a back-off, for as long as it takes.
"""

from __future__ import annotations

import enum

from llambo.mesh.wire.timers import NEVER_MS
from llambo.worker.agent.events import Action, KillEngine, Log, SpawnEngine
from llambo.worker.config import WorkerConfig
from llambo.worker.engine.protocol import Progress, Ready


class EngineState(enum.Enum):
    DOWN = "down"
    LOADING = "loading"
    READY = "ready"
    DYING = "dying"


#: Every legal step. The diagram in ARCHITECTURE.md is drawn from this table.
ENGINE_STEPS: dict[EngineState, dict[EngineState, str]] = {
    EngineState.DOWN: {EngineState.LOADING: "back-off over"},
    EngineState.LOADING: {
        EngineState.READY: "loaded",
        EngineState.DYING: "silent for load_ms, or the worker leaves",
        EngineState.DOWN: "died",
    },
    EngineState.READY: {
        EngineState.DYING: "silent for stall_ms with sequences, or the worker leaves",
        EngineState.DOWN: "died",
    },
    EngineState.DYING: {EngineState.DOWN: "the process is gone"},
}

#: The pause before a new engine doubles from this up to the worker's `backoff_ms`.
BACKOFF_MS = 250
#: An engine that was ready for this long resets the pause.
GOOD_MS = 30_000
#: An agent that is woken this late was stopped, or its machine was.
SUSPENDED_MS = 300


class EngineLife:
    """The owner passes on what the engine sends; `busy` in its calls means that the engine has runs."""

    def __init__(self, config: WorkerConfig, out: list[Action]) -> None:
        self.state = EngineState.DOWN
        self.ready: Ready | None = None
        self.note = ""
        self.restarts = 0
        #: Of the model, while it loads.
        self.percent = 0
        self._config = config
        self._out = out
        self._spawns = 0
        #: What the engine has reported about its loading, last.
        self._said = Progress()
        self._stalled = False
        #: An engine died while it was loading: all later ones are started with safe settings.
        self._safe = False
        self._spawn_at = 0
        self._backoff = min(BACKOFF_MS, config.backoff_ms)
        self._ready_ms = 0
        #: When it last sent something, or got its first run after being idle; later if this agent was suspended.
        self.last_alive_ms = 0

    @property
    def is_ready(self) -> bool:
        return self.state is EngineState.READY

    @property
    def out_of_memory(self) -> bool:
        """The last engine ended while it was loading, and had too little memory, as far as is known: it has said so, or
        it was killed from outside without a word, as the kernel does then."""
        return self._said.out_of_memory

    def is_responsive(self, now_ms: int, busy: bool) -> bool:
        """False: it is stalled, or it was killed and is not gone yet."""
        return self.state is not EngineState.DYING and now_ms < self._stalled_at(busy)

    # What happened.

    def on_alive(self, now_ms: int) -> None:
        """It has sent something, or it was idle and gets its first run: it may be silent for `stall_ms` from now."""
        self.last_alive_ms = now_ms

    def on_late_wakeup(self, late_ms: int) -> None:
        """This agent was suspended and could not read what the engine sent: that time does not count as silence."""
        if late_ms >= SUSPENDED_MS:
            self.last_alive_ms += late_ms

    def on_progress(self, progress: Progress, now_ms: int) -> None:
        self.last_alive_ms = now_ms
        if self.state is EngineState.LOADING:
            self.note, self._said = progress.note, progress
            self.percent = min(progress.percent, 100) if progress.percent >= 0 else self.percent

    def on_ready(self, ready: Ready, now_ms: int) -> bool:
        """False: this engine was killed before it was ready."""
        if self.state is not EngineState.LOADING:
            return False
        self._step(EngineState.READY)
        self.ready, self.note = ready, ready.note
        self.last_alive_ms = self._ready_ms = now_ms
        return True

    def on_died(self, text: str, now_ms: int, *, outside: bool = False) -> str:
        """Why starting another engine is useless; mostly empty: a new one is started."""
        if self.state is EngineState.DOWN:
            return ""
        if self.is_ready and now_ms - self._ready_ms >= GOOD_MS:
            self._backoff = min(BACKOFF_MS, self._config.backoff_ms)
        stalled = self.state is EngineState.DYING and self._stalled
        loading = self.state is EngineState.LOADING
        if loading and outside and not self._said.problem:
            self._said = Progress(out_of_memory=True)
        self._step(EngineState.DOWN)
        if loading and not self._said.problem and not self._safe:
            # It reported no reason: it may have used an instruction that this machine does not have.
            self._safe = True
            self._spawn_at = now_ms
            self.note = f"{text} while loading; trying again with safe settings"
            self._out.append(Log(f"engine: {self.note}", warning=True))
            return ""
        if self.ready is None:
            # It was never ready, and neither time nor safe settings change the model file.
            where = " while loading, with safe settings too" if loading else ""
            return self._said.problem or (self.note if stalled else f"{text}{where}")
        self._spawn_at = now_ms + self._backoff
        where = " while loading" if loading else ""
        self.note = f"{self._said.problem or text + where}; a new engine in {self._backoff} ms"
        self._out.append(Log(f"engine: {self.note}", warning=True))
        self._backoff = min(self._backoff * 2, self._config.backoff_ms)
        return ""

    def kill(self) -> None:
        if self.state in (EngineState.LOADING, EngineState.READY):
            self._step(EngineState.DYING)
            self._out.append(KillEngine())

    # Time.

    def tick(self, now_ms: int, busy: bool) -> bool:
        """True when a stalled engine was just killed."""
        if self.state is EngineState.DOWN and now_ms >= self._spawn_at:
            self._step(EngineState.LOADING)
            self.last_alive_ms = now_ms
            self.restarts, self._spawns = self._spawns, self._spawns + 1
            self._said, self._stalled, self.percent = Progress(), False, 0
            settings = ", with safe settings" if self._safe else ""
            self._out.append(Log(f"engine: starting{settings}"))
            self._out.append(SpawnEngine(self._safe))
        elif now_ms >= self._stalled_at(busy):
            doing = "loading" if self.state is EngineState.LOADING else "decoding"
            self.note = f"the engine stalled: silent for {now_ms - self.last_alive_ms} ms while {doing}"
            self._out.append(Log(self.note, warning=True))
            self._stalled = True
            self.kill()
            return True
        return False

    def next_wakeup_ms(self, busy: bool) -> int:
        return self._spawn_at if self.state is EngineState.DOWN else self._stalled_at(busy)

    def _stalled_at(self, busy: bool) -> int:
        if self.state is EngineState.LOADING:
            return self.last_alive_ms + self._config.load_ms
        if self.is_ready and busy:
            return self.last_alive_ms + self._config.stall_ms
        return NEVER_MS

    def _step(self, state: EngineState) -> None:
        assert state in ENGINE_STEPS[self.state], f"engine cannot go from {self.state} to {state}"
        self.state = state
