"""Who kills engines.

An engine that dies takes its whole batch along, and one request of that batch may be the cause. Which one?

    suspected   an engine died with it aboard. It goes on elsewhere, but no engine is given two suspects at a time
    cleared     it has got past the token at which that engine died
    convicted   another engine died with it aboard before that, and it was the only suspect there: it is ended

So a request that kills whatever runs it costs two engines and no more, and those that were aboard with it go on.
Who is no suspect may share an engine with one. If that dies they are suspects in their turn; two different killers
at the same moment can so convict a bystander, which is the price of not giving every suspect an engine of its own.

Only deaths of engines count. An agent or a host that is lost, an engine that was ended from outside, or that had not
read the request yet, says nothing about it. Workers keep suspects of different brokers apart, too. A suspect that waits
when its broker dies is none for the next broker.
"""

from __future__ import annotations

from llambo.broker.records import retry_budget
from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.request import Request
from llambo.broker.records.state import State
from llambo.broker.requests import dispatching, ending
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo


def engine_lost(state: State, worker: WorkerEntry, lost: m.EngineLost, now_ms: int) -> None:
    """An engine died with these aboard."""
    state.counters.engine_deaths += 1
    made = dict(zip(lost.runs, lost.made, strict=False))
    # What is named twice has died once.
    runs = dict.fromkeys(lost.runs)
    aboard = [r for key in runs if (r := state.running.get(key)) is not None and r.worker is worker]
    cause = ", from outside" if lost.outside else ""
    text = f"{worker.name}: {lost.text}{cause} ({len(aboard)} of its requests move)"
    state.happened(now_ms, "engine lost", text, warning=True, worker=worker.name)
    for key in lost.runs:
        worker.claims.pop(key, None)
    # Its load is least now, and it would refuse everything: its next heartbeat tells when it can work again.
    worker.closed = True
    worker.paced = 0  # the next engine has to show what it can do
    state.update_pools(worker)
    state.touch(worker)
    charged = not lost.outside
    for request in aboard:
        if 0 <= request.suspect_at < made.get(request.key, 0):
            clear(state, request, now_ms)  # it was further than what has arrived here
    suspects = [request for request in aboard if request.suspect_at >= 0]
    # One death is one failure, however many were aboard: those who only shared a batch are to be answered.
    paid = {model: not charged or retry_budget.spend(state, model, now_ms) for model in {r.model for r in aboard}}
    for request in aboard:
        request.failures += 1
        request.note(now_ms, "engine died", f"that of {worker.name}{cause}: {lost.text}")
        if charged and [request] == suspects:
            _convict(state, request, worker, lost, now_ms)
        elif request.failures >= state.config.engine_failures:
            text = f"{request.failures} engines died with this request aboard, the last of {worker.name}: {lost.text}"
            ending.finish(state, request, "error", now_ms, ErrorInfo(Code.ENGINE_FAILED, text))
        elif not paid[request.model]:
            why = f"the engine of {worker.name} died: {lost.text}"
            ending.finish(state, request, "error", now_ms, retry_budget.denied(state, request, why))
        else:
            if charged:
                _suspect(state, request, worker, lost, made.get(request.key, 0), now_ms)
            dispatching.requeue(state, request, f"the engine of {worker.name} died", now_ms)


def _suspect(state: State, request: Request, worker: WorkerEntry, lost: m.EngineLost, made: int, now_ms: int) -> None:
    """`made`: how far its worker had come, which may be further than what has arrived here."""
    state.counters.suspected += 1
    # Nothing of a result is kept when it moves, so it is begun again.
    request.suspect_at = max(made, request.transcript.next_index) if request.task == "generate" else 0
    request.suspicion = f"that of {worker.name} ({lost.text})"
    request.note(now_ms, "suspected", f"until it is past token {request.suspect_at}")


def clear(state: State, request: Request, now_ms: int) -> None:
    """It has got past the token at which the engine died: whatever the cause was, it is not that."""
    request.note(now_ms, "cleared", f"it has token {request.suspect_at}")
    request.suspect_at = -1
    request.watch()
    if request.worker is not None:
        state.touch(request.worker)


def _convict(state: State, request: Request, worker: WorkerEntry, lost: m.EngineLost, now_ms: int) -> None:
    state.counters.convicted += 1
    text = f"this request kills engines: {request.suspicion}, and then that of {worker.name} ({lost.text})"
    text += f", both at token {request.suspect_at}" if request.task == "generate" else ""
    state.happened(now_ms, "poison", f"request {request.id.hex()[:8]}: {text}", warning=True, request=request.id)
    ending.finish(state, request, "error", now_ms, ErrorInfo(Code.ENGINE_FAILED, text))
