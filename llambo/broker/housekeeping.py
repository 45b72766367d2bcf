"""Once a second: requests that have waited too long, results that expire, models that are gone, rates, a sample.

Requests that have waited `queue_ms` (queue.py finds them) or `hold_ms` end here.
"""

from __future__ import annotations

from llambo.broker import fleet_leases
from llambo.broker.placement import wishes
from llambo.broker.records.request import AWAITING_RUN, Lane, Request
from llambo.broker.records.state import State
from llambo.broker.report import history
from llambo.broker.requests import admission, ending, same_model
from llambo.broker.workers import membership, speed
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.reports import waiting

SWEEP_MS = 1_000
#: Models remembered, with or without a worker.
MODELS_KNOWN = 1_000


def sweep(state: State, now_ms: int) -> None:
    for request in state.queue.expired(now_ms):
        text = f"waited {state.config.bounds.queue_ms} ms for a worker"
        if note := state.hosts.note(request.model):
            text += f"; last {waiting(note)}"
        ending.finish(state, request, "error", now_ms, ErrorInfo(Code.QUEUE_TIMEOUT, text, 1_000))
    speed.compare(state, now_ms)
    fleet_leases.expire(state, now_ms)
    _give_up_on_lanes(state, now_ms)
    admission.retry_deferred(state, now_ms)
    state.access.accounts.sweep(now_ms)
    state.recovery.orphans.expire(now_ms)
    _close_lanes(state)
    state.archive.expire(now_ms)
    _forget_models(state, now_ms)
    state.measured.end_rate.measure(state.counters.requests.ended, now_ms)
    history.take(state, now_ms)
    state.measured.load.begin_second()


def _give_up_on_lanes(state: State, now_ms: int) -> None:
    """End requests that no worker can run, if none came in time."""
    if state.hosts.sessions and (state.hosts.changed or state.queue.turned):
        wishes.reconsider(state, now_ms)  # until then `waits` does not have what a host is to load
    for lane, line in list(state.queue.lines.items()):
        if lane == AWAITING_RUN or (not lane.fingerprint and state.is_promised(lane.model)):
            continue  # an orchestrator sees that a promised model is asked for, and starts its workers
        if (wait := state.hosts.waits.get(lane.model)) is not None and not wait.joins:
            continue  # a host is to load it; if none can, its requests have ended (placement/wishes.py)
        since = state.models.unserved_since.get(lane.model, 1)  # (a name that was forgotten meanwhile has no worker)
        if lane.fingerprint and not since:
            if not same_model.is_missing(state, lane):
                continue
            since = 1  # others have the model, but not the very same: what counts is how long the request waits
        for request in list(line) if since else ():
            waited_ms = now_ms - _missing_since(request, lane, since)
            if waited_ms >= state.config.bounds.hold_ms:
                _give_up(state, request, lane, waited_ms, now_ms)


def _missing_since(request: Request, lane: Lane, since: int) -> int:
    """When the wait for a worker began. A new request joins the wait that goes on already, and does not begin another.

    One that was dispatched before, or that had a broker before, gets the whole time.
    """
    begun = lane.fingerprint or request.run.attempt or request.asked.resume
    return max(since, request.place.queued_at) if begun else since


def _give_up(state: State, request: Request, lane: Lane, waited_ms: int, now_ms: int) -> None:
    text = f"no worker serves {lane.model!r}: it was missing for {waited_ms} ms"
    missing = ErrorInfo(Code.NO_WORKER, text, 1_000)
    error = same_model.missing_too_long(state, lane, waited_ms) if lane.fingerprint else missing
    ending.finish(state, request, "error", now_ms, error)


def _close_lanes(state: State) -> None:
    """Pools for requests that moved, or are suspects, where none waits any more."""
    pools = state.pools
    for lane in [lane for lane in pools if (lane.fingerprint or lane.isolated) and lane not in state.queue.lines]:
        pools.close(lane)


def _forget_models(state: State, now_ms: int) -> None:
    """Names that no worker ever served; and of too many names, those that are gone for longest.

    (A name whose only worker left while it loaded was forgotten then: membership.py.)
    """
    known, served = state.models.unserved_since, state.models.served
    gone = [(since, model) for model, since in known.items() if membership.is_forgettable(state, model)]
    hold_ms = state.config.bounds.hold_ms
    never = [model for since, model in gone if model not in served and now_ms - since >= hold_ms]
    excess = len(known) - len(never) - MODELS_KNOWN
    oldest = sorted(pair for pair in gone if pair[1] not in never)[: max(0, excess)]
    for model in [*never, *(model for _, model in oldest)]:
        membership.forget_model(state, model)
