"""From the queue to a worker, and back to the queue when the worker is lost.

A request that moves goes with its prompt and the tokens it has, so that the next worker continues it. Every
dispatch has a fresh id: what the last worker still sends under the old one does not count. Only an adoption puts a key
into the fence again: the worker is back while the request waits, and the same run goes on (recovery.py).

Nothing bounds how often a request moves because workers are lost. Refusals and deaths of engines are bounded.
"""

from __future__ import annotations

from llambo.broker.records import seals
from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.request import Lane, Repair, Request, RequestState
from llambo.broker.records.state import State
from llambo.broker.requests import ending, same_model
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tokens, transfer

#: A request that is refused more often than this in its life, by any workers, is given up.
MAX_REFUSALS = 100


def enqueue(state: State, request: Request, now_ms: int) -> None:
    """If its lane is empty and a slot is free, straight to a worker: most requests never see the queue.

    One that comes back from a worker is not held back by the limit of its identity: it was dispatched once.
    """
    lane = request.lane
    pool = state.pools.get(lane) or state.open_lane(lane)
    if lane not in state.queue.lines and (not request.account.full or request.run.attempt):
        worker = state.policy(request, pool)
        if worker is not None:
            request.place.queued_at, before = now_ms, request.run.fingerprint
            _dispatch(state, request, worker, now_ms)
            if request.run.attempt > 1 and request.run.fingerprint != before:
                ending.announce_model(state, request)  # a first run is announced by the answer to the submit
            return
    state.queue.put(request, now_ms)
    pump(state, lane, now_ms)
    if request.state is RequestState.WAITING:
        if same_model.is_missing(state, lane):
            same_model.note_wait(state, request, lane, now_ms)
        if lane.model in state.hosts.waits:
            request.note(now_ms, "waits", state.hosts.waits[lane.model].text)


def pump(state: State, lane: Lane, now_ms: int) -> None:
    """Dispatch all that can be dispatched in this lane."""
    while (request := state.queue.first(lane)) is not None:
        pool = state.pools.get(lane)
        worker = state.policy(request, pool) if pool is not None else None
        if worker is None:
            return
        _dispatch(state, request, worker, now_ms)
        state.queue.left(request)
        if request.run.fingerprint:
            ending.announce_model(state, request)


def settle(state: State, now_ms: int) -> None:
    """After every event: workers that became free get what waits, and requests that were held back may go."""
    readmitted = state.queue.readmit() if state.queue.eased else []
    touched = state.pools.touched
    while touched:
        _, worker = touched.popitem()
        state.pools.refresh(worker)
        if state.queue.count:
            for lane in state.pools.lanes_of(worker):
                pump(state, lane, now_ms)
    for lane in readmitted:
        pump(state, lane, now_ms)


def _dispatch(state: State, request: Request, worker: WorkerEntry, now_ms: int) -> None:
    prefix = request.transcript.ids() if request.transcript.chunks else []
    run, asked, id, name = request.run, request.asked, request.id, worker.hello.name
    request.step(RequestState.DISPATCHED)
    request.place.queued_ms += now_ms - request.place.queued_at
    run.attempt += 1
    dispatch = run.attempt.to_bytes(4, "big") + state.random_bytes(4)
    run.key = id + dispatch
    run.worker, run.worker_name = worker, name
    if prefix and run.attempt == 1:  # its tokens are from another broker, and the worker that made them has not come
        _count_move(state, request)
    if not prefix:  # otherwise it is the one its tokens are from, and stays
        run.fingerprint = worker.serving.fingerprints.get(request.model, "")
    state.mark_running(request)
    worker.turn = state.pools.next_turn()
    worker.beats.seq += 1
    worker.claims[run.key] = worker.beats.seq
    suspect = request.suspicion.token if request.suspicion.token >= 0 else None
    if suspect is not None:
        worker.add_suspect(run.key, request)
    state.pools.refresh(worker)
    state.counters.requests.dispatched += 1
    state.measured.meter.dispatched(request, worker.hello.node_class, now_ms)
    request.note(now_ms, "dispatched", f"to {name}, attempt {run.attempt}, from token {len(prefix)}")
    # The worker gets what exists with its text, so that it can give back all of it should this broker be gone.
    blob, prompt_bytes = transfer.pack(request.prompt, request.transcript.chunks) if prefix else (request.prompt, 0)
    deadline_ms = max(1, request.deadline_at - now_ms) if asked.deadline_ms else 0
    marks_key = state.config.marks_key
    # (Python passes more than 30 words in a dict of their own, which costs as much as the rest of this function.)
    message = m.Dispatch(
        id,
        dispatch,
        worker.beats.seq,
        request.model,
        asked.max_tokens,
        request.seed,
        prefix,
        prompt_bytes,
        deadline_ms,
        stream=request.stream,
        priority=asked.priority,
        detached=asked.detached,
        sampling=asked.sampling,
        logprobs=asked.logprobs,
        task=asked.task,
        suspect=suspect,
        owner=request.account.name,
        seal=seals.seal_of(marks_key, request.proof, dispatch, name, deadline_ms) if marks_key else b"",
    )
    state.to_worker(worker, message, blob)


def requeue(state: State, request: Request, why: str, now_ms: int, *, what: str) -> None:
    """Its worker will not finish it: its key leaves the fence, and another worker continues, at once if one is free.

    An END of that worker whose tokens are not all here is forgotten, an error in it as well. If the last token is here,
    the request ends instead.
    """
    state.leave_fence(request)
    request.note(now_ms, what, why)
    run = request.run
    run.worker, run.key, run.end = None, b"", None
    request.repair = Repair(asked=request.repair.asked)
    request.transcript.stash = None
    request.update_watched()
    state.measured.meter.count(request)
    if request.task != "generate" and not request.transcript.final:
        # A result is not continued: two workers need not agree in the last digit. No client has seen a part of it.
        request.transcript.clear()
    elif finish_complete(state, request, now_ms):
        return
    if what != "refused":  # a refusal loses no work
        _count_move(state, request)
    request.step(RequestState.WAITING)
    enqueue(state, request, now_ms)


def _count_move(state: State, request: Request) -> None:
    state.counters.requests.moved += 1
    state.measured.meter.moved(request)
    request.run.moves += 1


def finish_complete(state: State, request: Request, now_ms: int) -> bool:
    """The last token is here; only the END was lost, with the worker or the broker that would have sent it.

    What only that END said is lost: usage, and which stop string it was.
    """
    done = request.transcript
    if not done.final and (done.next_index < request.asked.max_tokens or request.task != "generate"):
        return False
    ending.finish(state, request, "stop" if done.final & tokens.STOPPED else "length", now_ms)
    return True


def accepted(state: State, worker: WorkerEntry, accept: m.Accept, blob: bytes, now_ms: int) -> None:
    request = state.running.get(accept.id + accept.dispatch)
    if request is not None and request.state is RequestState.DISPATCHED:
        request.step(RequestState.RUNNING)
        request.note(now_ms, "accepted")


def rejected(state: State, worker: WorkerEntry, reject: m.Reject, blob: bytes, now_ms: int) -> None:
    key = reject.id + reject.dispatch
    worker.claims.pop(key, None)
    request = state.running.get(key)
    if not reject.final:
        worker.refusing = True
    state.pools.refresh(worker)
    state.pools.touch(worker)
    if request is None or request.run.worker is not worker:
        return
    request.run.refusals += 1
    if reject.final or request.run.refusals > MAX_REFUSALS:
        ending.finish(state, request, "error", now_ms, reject.error)
    elif not state.models.retries.spend(request.model, now_ms):
        state.counters.faults.retries_denied += 1
        why = f"{worker.name} refused: {reject.error.text}"
        ending.finish(state, request, "error", now_ms, state.models.retries.denied(request.model, why))
    else:
        requeue(state, request, f"by {worker.name}: {reject.error.text}", now_ms, what="refused")
