"""Housekeeping that nobody waits for: old queue entries, expired results, models that are gone, rates."""

from __future__ import annotations

from llambo.broker import leases
from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.request import PARKED, plain
from llambo.broker.records.state import State
from llambo.broker.report import history
from llambo.broker.requests import admission, ending
from llambo.broker.workers import speed
from llambo.mesh.wire.errors import Code, ErrorInfo

#: How often.
SWEEP_MS = 1_000
#: Models remembered, with or without a worker.
MODELS_KNOWN = 1_000


def _forget_models(state: State) -> None:
    """Of too many names, those go that no worker serves and nobody waits for, the longest gone first."""
    excess = len(state.models) - MODELS_KNOWN
    if excess <= 0:
        return
    gone = [
        (since, model)
        for model, since in state.models.items()
        if since and model not in state.room.lines and not state.is_promised(model)
    ]
    for _, model in sorted(gone)[:excess]:
        del state.models[model]
        state.pools.pop(model, None)


def _may_serve(worker: WorkerEntry, model: str, lane: str) -> bool:
    """It has this very model; or one of that name is being loaded, which may turn out to be the same."""
    if lane in worker.lanes:
        return True
    return worker.state == "starting" and any(m.name == model and not m.fingerprint for m in worker.serving)


def _give_up_on_lanes(state: State, now_ms: int) -> None:
    """Nobody is there to run these, and nobody came in time."""
    for lane, line in list(state.room.lines.items()):
        if lane == PARKED:
            continue
        model, _, fingerprint = plain(lane).partition("\0")
        if not fingerprint and state.is_promised(model):
            continue  # whoever is to start its workers sees that it is asked for
        since = state.models.get(model, 0)
        if fingerprint and not since:
            if any(_may_serve(worker, model, plain(lane)) for worker in state.registry.workers.values()):
                continue
            since = 1  # others have the model, but not the very same: what counts is how long the request waits
        for request in list(line) if since else ():
            if now_ms - max(since, request.queued_at) >= state.config.hold_ms:
                which = "the very same model" if fingerprint else "it"
                text = f"no worker serves {model!r}: {which} was missing for {now_ms - request.queued_at} ms"
                ending.finish(state, request, "error", now_ms, ErrorInfo(Code.NO_WORKER, text, 1_000))


def sweep(state: State, now_ms: int) -> None:
    """What nobody waits for: ages, retention, and the pace on which retry-after is based."""
    config = state.config
    for request in state.room.expired(now_ms):
        text = f"waited {config.queue_ms} ms for a worker"
        ending.finish(state, request, "error", now_ms, ErrorInfo(Code.QUEUE_TIMEOUT, text, 1_000))
    speed.compare(state, now_ms)
    leases.expire(state, now_ms)
    _give_up_on_lanes(state, now_ms)
    admission.ask_again(state, now_ms)
    state.accounts.sweep(now_ms)
    state.orphanage.expire(now_ms)
    state.close_lanes()
    state.archive.expire(now_ms)
    _forget_models(state)
    ended, at = state.rate_mark
    if now_ms > at:
        pace = (state.counters.ended - ended) * 1_000 / (now_ms - at)
        state.rate = pace if not at else 0.5 * state.rate + 0.5 * pace
    state.rate_mark = (state.counters.ended, now_ms)
    history.take(state, now_ms)
