"""The life of the engine child as the agent sees it: spawned, loading, ready, killed when it stalls, spawned again."""

from __future__ import annotations

import enum

from llambo.worker.agent.actions import Action, KillEngine, Log, SpawnEngine
from llambo.worker.agent.events import EngineReady
from llambo.worker.config import WorkerConfig


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

#: The pause before a new engine: doubles from this to the worker's `backoff_ms`, and starts over after a good while.
BACKOFF_MS = 250
GOOD_MS = 30_000
NEVER_MS = 2**62
#: An agent that is woken so late was stopped, or its machine was.
STOOD_STILL_MS = 300


class EngineLife:
    """Its owner passes on what the engine says, and says how many runs the engine has."""

    def __init__(self, config: WorkerConfig, out: list[Action]) -> None:
        self.state = EngineState.DOWN
        self.ready: EngineReady | None = None
        self.note = ""
        self.restarts = 0
        #: Of the model, while it loads.
        self.percent = 0
        self._config = config
        self._out = out
        self._spawns = 0
        #: Why the engine cannot load, in its own words.
        self._problem = ""
        self._stalled = False
        #: An engine died while it was loading: from then on all of them are told to be careful.
        self._safe = False
        self._spawn_at = 0
        self._backoff = min(BACKOFF_MS, config.backoff_ms)
        self._ready_ms = 0
        self._heard_ms = 0

    @property
    def is_ready(self) -> bool:
        return self.state is EngineState.READY

    @property
    def heard_ms(self) -> int:
        """When it spoke last, or was given work after having had none."""
        return self._heard_ms

    def goes_on(self, now_ms: int, busy: bool) -> bool:
        """Nothing here is stuck: what it has is being decoded, and one that was killed is gone."""
        return self.state is not EngineState.DYING and now_ms < self._stalled_at(busy)

    # --- what happened -------------------------------------------------------------------------------

    def on_word(self, now_ms: int) -> None:
        """It said something, so it lives; or it was just given something to do, so it may be silent again."""
        self._heard_ms = now_ms

    def pardon(self, late_ms: int) -> None:
        """We are woken so much later than we wanted: this agent stood still, and has heard nobody meanwhile."""
        if late_ms >= STOOD_STILL_MS:
            self._heard_ms += late_ms

    def on_progress(self, note: str, problem: str, percent: int, now_ms: int) -> None:
        self._heard_ms = now_ms
        if self.state is EngineState.LOADING:
            self.note, self._problem = note, problem
            self.percent = min(percent, 100) if percent >= 0 else self.percent

    def on_ready(self, ready: EngineReady, now_ms: int) -> bool:
        """False: this engine is one that was ordered to die."""
        if self.state is not EngineState.LOADING:
            return False
        self._step(EngineState.READY)
        self.ready, self.note = ready, ready.note
        self._heard_ms = self._ready_ms = now_ms
        return True

    def on_died(self, text: str, now_ms: int) -> str:
        """Why there is no use in trying again; mostly empty: a new engine is tried."""
        if self.state is EngineState.DOWN:
            return ""
        if self.is_ready and now_ms - self._ready_ms >= GOOD_MS:
            self._backoff = min(BACKOFF_MS, self._config.backoff_ms)
        stalled = self.state is EngineState.DYING and self._stalled
        loading = self.state is EngineState.LOADING
        self._step(EngineState.DOWN)
        if loading and not self._problem and not self._safe:
            # It did not say what is wrong: it may have met an instruction that this machine does not have.
            self._safe = True
            self._spawn_at = now_ms
            self.note = f"{text} while loading; trying again with safe settings"
            self._out.append(Log(f"engine: {self.note}", warning=True))
            return ""
        if self.ready is None:
            # Never was it ready, and neither patience nor safe settings will change the file.
            careful = " while loading, with safe settings too" if loading else ""
            return self._problem or (self.note if stalled else f"{text}{careful}")
        self._spawn_at = now_ms + self._backoff
        where = " while loading" if loading else ""
        self.note = f"{self._problem or text + where}; a new engine in {self._backoff} ms"
        self._out.append(Log(f"engine: {self.note}", warning=True))
        self._backoff = min(self._backoff * 2, self._config.backoff_ms)
        return ""

    def kill(self) -> None:
        if self.state in (EngineState.LOADING, EngineState.READY):
            self._step(EngineState.DYING)
            self._out.append(KillEngine())

    # --- time ----------------------------------------------------------------------------------------

    def tick(self, now_ms: int, busy: bool) -> bool:
        """True when a stalled engine was just ordered to die."""
        if self.state is EngineState.DOWN and now_ms >= self._spawn_at:
            self._step(EngineState.LOADING)
            self._heard_ms = now_ms
            self.restarts, self._spawns = self._spawns, self._spawns + 1
            self._problem, self._stalled, self.percent = "", False, 0
            careful = ", with safe settings" if self._safe else ""
            self._out.append(Log(f"engine: starting{careful}"))
            self._out.append(SpawnEngine(self._safe))
        elif now_ms >= self._stalled_at(busy):
            doing = "loading" if self.state is EngineState.LOADING else "decoding"
            self.note = f"the engine stalled: silent for {now_ms - self._heard_ms} ms while {doing}"
            self._out.append(Log(self.note, warning=True))
            self._stalled = True
            self.kill()
            return True
        return False

    def next_wakeup_ms(self, busy: bool) -> int:
        return self._spawn_at if self.state is EngineState.DOWN else self._stalled_at(busy)

    # --- inside --------------------------------------------------------------------------------------

    def _stalled_at(self, busy: bool) -> int:
        if self.state is EngineState.LOADING:
            return self._heard_ms + self._config.load_ms
        if self.is_ready and busy:
            return self._heard_ms + self._config.stall_ms
        return NEVER_MS

    def _step(self, state: EngineState) -> None:
        assert state in ENGINE_STEPS[self.state], f"engine cannot go from {self.state} to {state}"
        self.state = state
