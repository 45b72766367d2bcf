"""What is true of a worker core between any two events. Tests and the simulator check it after each."""

from __future__ import annotations

from llambo.worker.agent.core import WorkerCore
from llambo.worker.agent.runs import RunState


def check(core: WorkerCore) -> None:
    runs = core.runs.runs
    active = sum(run.active for run in runs.values())
    assert core.runs.active == active, f"{core.runs.active} runs are counted active, {active} are"
    streams = sum(run.active and run.published for run in runs.values())
    assert core.runs.streams == streams, f"{core.runs.streams} runs are counted as streams, {streams} are"
    assert sum(run.suspect for run in runs.values()) <= 1, "two suspects are aboard"
    ready = core.engine.ready
    assert not active or (ready is not None and active <= ready.slots), f"{active} runs have slots"
    assert not active or core.engine.is_ready, "runs are active in an engine that is not ready"
    resend = {key for _, key in core.delivery.waiting_ends()}
    for key, run in runs.items():
        assert key == run.key
        assert run.state is not RunState.GONE, "a run that is gone is still held"
        assert (run.end is not None) == (run.state is RunState.ENDED), "END and state of a run disagree"
        assert run.end is None or run.end.count == run.tokens.end, "an END counts other tokens than are held"
        assert run.end is None or run.orphan_at or key in resend, "an END would never be said again"
