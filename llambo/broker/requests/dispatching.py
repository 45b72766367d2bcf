"""From the queue to a worker, and back to the queue when the worker is lost.

A request that moves goes with its prompt and the tokens it has, so that the next worker continues it. Every
dispatch has a fresh id: whatever the last worker still says under the old one does not count.
"""

from __future__ import annotations

import msgspec

from llambo.broker.actions import ToWorker
from llambo.broker.records import retry_budget, schedule
from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.request import Request, RequestState, plain
from llambo.broker.records.state import State
from llambo.broker.requests import ending
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tokens, transfer

#: A request that this many workers have refused is given up.
MAX_REFUSALS = 100


def enqueue(state: State, request: Request, now_ms: int) -> None:
    """Where nobody waits and a slot is free, straight to a worker: most requests never see the queue.

    One that comes back from a worker is not held back by what its identity may have at work: it was let go once.
    """
    lane = request.lane
    if lane not in state.pools:
        state.open_lane(lane)
    if lane not in state.room.lines and (not request.account.full or request.attempt):
        worker = schedule.choose(state.policy, request, state.pools.get(lane))
        if worker is not None:
            request.queued_at = now_ms
            _dispatch(state, request, worker, now_ms)
            return
    state.room.put(request, now_ms)
    pump(state, lane, now_ms)


def pump(state: State, lane: str, now_ms: int) -> None:
    """Give out whatever can be given out in this lane."""
    while (request := state.room.first(lane)) is not None:
        worker = schedule.choose(state.policy, request, state.pools.get(lane))
        if worker is None:
            return
        _dispatch(state, request, worker, now_ms)
        state.room.left(request)
        if request.fingerprint:
            ending.confirm(state, request)


def settle(state: State, now_ms: int) -> None:
    """After every event: workers that became free get what waits, and who was held back may go."""
    eased: list[str] = []
    while state.eased:
        name, account = state.eased.popitem()
        if not account.full:
            eased += state.room.ease(name)
    while state.touched:
        _, worker = state.touched.popitem()
        state.update_pools(worker)
        if state.room.count:
            # Those who were interrupted go first.
            suspects = [pool.model for pool in state.wary if worker.serves(plain(pool.model))]
            for lane in (*suspects, *worker.lanes, *worker.models):
                pump(state, lane, now_ms)
    for lane in eased:
        pump(state, lane, now_ms)


def _dispatch(state: State, request: Request, worker: WorkerEntry, now_ms: int) -> None:
    prefix = request.transcript.ids() if request.transcript.chunks else []
    request.attempt += 1
    request.step(RequestState.DISPATCHED)
    request.queued_ms += now_ms - request.queued_at
    request.key = request.id + request.attempt.to_bytes(4, "big") + state.chance(4)
    request.worker = worker
    if not prefix:  # otherwise it is the one its tokens are from, and stays
        request.fingerprint = worker.fingerprints.get(request.model, "")
    request.blame = worker.name
    state.take_off(request)
    state.turns += 1
    worker.turn = state.turns
    worker.seq += 1
    worker.claims[request.key] = worker.seq
    if request.suspect_at >= 0:
        worker.suspect = request.key, request
    state.update_pools(worker)
    state.counters.dispatched += 1
    state.meter.dispatched(request, worker.hello.node_class, now_ms)
    request.note(now_ms, "dispatched", f"to {worker.name}, attempt {request.attempt}, from token {len(prefix)}")
    # The worker gets what exists with its text, so that it can give back all of it should this broker be gone.
    blob, prompt_bytes = transfer.pack(request.prompt, request.transcript.chunks) if prefix else (request.prompt, 0)
    message = m.Dispatch(
        request.id,
        request.dispatch,
        worker.seq,
        request.model,
        request.max_tokens,
        request.seed,
        prefix,
        prompt_bytes,
        max(1, request.deadline_at - now_ms) if request.deadline_at else 0,
        request.stream,
        request.priority,
        request.detached,
        msgspec.Raw(request.sampling),
        request.logprobs,
        request.task,
        request.suspect_at if request.suspect_at >= 0 else None,
        request.owner,
    )
    state.out.append(ToWorker(worker.route, worker.session, message, blob))


def requeue(state: State, request: Request, why: str, now_ms: int, *, what: str = "lost") -> None:
    """Its worker will not finish it: close the fence, and let another one continue."""
    state.land(request)
    request.note(now_ms, what, why)
    request.worker, request.key = None, b""
    request.stash, request.end, request.wanted, request.repair_due = None, None, 0, 0
    request.watch()
    state.meter.count(request)
    if request.task != "generate" and not request.transcript.final:
        # A result is not continued: two workers need not agree in the last digit. Nobody has seen a part of it.
        request.transcript.clear()
    elif finish_complete(state, request, now_ms):
        return
    if what != "refused":  # that cost nobody anything
        state.counters.moved += 1
        state.meter.moved(request)
        request.moves += 1
    request.step(RequestState.WAITING)
    enqueue(state, request, now_ms)


def finish_complete(state: State, request: Request, now_ms: int) -> bool:
    """The last token is here; only the END was lost, with the worker or the broker that would have said it."""
    done = request.transcript
    if not done.final and (done.next_index < request.max_tokens or request.task != "generate"):
        return False
    ending.finish(state, request, "stop" if done.final & tokens.STOPPED else "length", now_ms)
    return True


def accepted(state: State, worker: WorkerEntry, accept: m.Accept, now_ms: int) -> None:
    request = state.running.get(accept.id + accept.dispatch)
    if request is not None and request.state is RequestState.DISPATCHED:
        request.step(RequestState.RUNNING)
        request.note(now_ms, "accepted")


def rejected(state: State, worker: WorkerEntry, reject: m.Reject, now_ms: int) -> None:
    key = reject.id + reject.dispatch
    worker.claims.pop(key, None)
    request = state.running.get(key)
    if not reject.final:
        worker.closed = True
    state.update_pools(worker)
    state.touch(worker)
    if request is None or request.worker is not worker:
        return
    request.refusals += 1
    if reject.final or request.refusals > MAX_REFUSALS:
        ending.finish(state, request, "error", now_ms, reject.error)
    elif not retry_budget.spend(state, request.model, now_ms):
        why = f"{worker.name} refused: {reject.error.text}"
        ending.finish(state, request, "error", now_ms, retry_budget.denied(state, request, why))
    else:
        requeue(state, request, f"by {worker.name}: {reject.error.text}", now_ms, what="refused")
