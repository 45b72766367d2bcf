"""Which request kills engines.

An engine that dies ends its whole batch, and one request of that batch may be the cause. Which one?

    suspected   an engine died while it ran it. It goes on elsewhere, but no engine is given two suspects at a time
                (`records/pools.py:takes`)
    cleared     it has got past the token at which that engine died
    proved      another engine died before that, and it was the only suspect there: it is ended

So a request that kills every engine costs two engines and no more, and the others of its batches go on. A request that
is no suspect may share an engine with one. If that engine dies they are suspects in their turn; two different killers
at the same moment can so end a third request, which is the price of not giving every suspect an engine of its own.

Only deaths of engines count. An agent or a host that is lost, an engine that was ended from outside, or that had not
read the request yet, proves nothing. Workers do not mix suspects of different brokers, either. A suspect that waits
when its broker dies is none for the next broker.
"""

from __future__ import annotations

from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.request import Request
from llambo.broker.records.state import State
from llambo.broker.requests import dispatching, ending
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo


def engine_lost(state: State, worker: WorkerEntry, lost: m.EngineLost, blob: bytes, now_ms: int) -> None:
    state.counters.faults.engine_deaths += 1
    made = dict(zip(lost.runs, lost.made, strict=False))
    # A run that is named twice has died once.
    runs = dict.fromkeys(lost.runs)
    batch = [r for key in runs if (r := state.running.get(key)) is not None and r.run.worker is worker]
    cause = ", from outside" if lost.outside else ""
    text = f"{worker.name}: {lost.text}{cause} ({len(batch)} of its requests move)"
    state.journal.add(now_ms, "engine lost", text, warning=True, worker=worker.name)
    for key in lost.runs:
        worker.claims.pop(key, None)
    # Its load is least now, and it would refuse everything: its next heartbeat says when it can work again.
    worker.refusing = True
    worker.speed.measurements = 0  # the next engine has to show its speed
    state.pools.refresh(worker)
    state.pools.touch(worker)
    charged = not lost.outside
    for request in batch:
        if 0 <= request.suspicion.token < made.get(request.run.key, 0):
            clear(state, request, now_ms)  # it was further than what has arrived here
    suspects = [request for request in batch if request.suspicion.token >= 0]
    # One death is one failure, for any number of requests: those that only shared a batch are to be answered.
    retries = state.models.retries
    paid = {model: not charged or _spend(state, model, now_ms) for model in {r.model for r in batch}}
    for request in batch:
        request.suspicion.failures += 1
        request.note(now_ms, "engine died", f"that of {worker.name}{cause}: {lost.text}")
        if charged and [request] == suspects:
            _end_killer(state, request, worker, lost, now_ms)
        elif request.suspicion.failures >= state.config.faults.engine_failures:
            text = f"{request.suspicion.failures} engines died while they ran this request,"
            text = f"{text} the last of {worker.name}: {lost.text}"
            ending.finish(state, request, "error", now_ms, ErrorInfo(Code.ENGINE_FAILED, text))
        elif not paid[request.model]:
            why = f"the engine of {worker.name} died: {lost.text}"
            ending.finish(state, request, "error", now_ms, retries.denied(request.model, why))
        else:
            if charged:
                _suspect(state, request, worker, lost, made.get(request.run.key, 0), now_ms)
            dispatching.requeue(state, request, f"the engine of {worker.name} died", now_ms, what="lost")


def _spend(state: State, model: str, now_ms: int) -> bool:
    paid = state.models.retries.spend(model, now_ms)
    state.counters.faults.retries_denied += not paid
    return paid


def _suspect(state: State, request: Request, worker: WorkerEntry, lost: m.EngineLost, made: int, now_ms: int) -> None:
    """`made`: how far its worker had come, which may be further than what has arrived here."""
    state.counters.faults.suspected += 1
    suspicion = request.suspicion
    # Nothing of a result is saved when it moves, so it is begun again.
    suspicion.token = max(made, request.transcript.next_index) if request.task == "generate" else 0
    suspicion.text = f"that of {worker.name} ({lost.text})"
    request.note(now_ms, "suspected", f"until it is past token {suspicion.token}")


def clear(state: State, request: Request, now_ms: int) -> None:
    """It has got past the token at which the engine died: it was not the cause."""
    request.note(now_ms, "cleared", f"it has token {request.suspicion.token}")
    request.suspicion.token = -1
    request.update_watched()
    if request.run.worker is not None:
        state.pools.touch(request.run.worker)


def _end_killer(state: State, request: Request, worker: WorkerEntry, lost: m.EngineLost, now_ms: int) -> None:
    state.counters.faults.killers += 1
    suspicion = request.suspicion
    text = f"this request kills engines: {suspicion.text}, and then that of {worker.name} ({lost.text})"
    text += f", both at token {suspicion.token}" if request.task == "generate" else ""
    state.journal.add(now_ms, "poison", f"request {request.id.hex()[:8]}: {text}", warning=True, request=request.id)
    ending.finish(state, request, "error", now_ms, ErrorInfo(Code.ENGINE_FAILED, text))
