"""Taking work away from a worker: before its host is rebooted, or to let it leave.

Being drained is a state and no event. The worker holds what is true, because several brokers may give it orders and
each of them may be restarted; its heartbeats tell all of them. A broker holds the orders that have not been confirmed
yet, and says them again; and it remembers by name who was drained, for a worker that is restarted meanwhile.

    drained     gets no new work, and finishes what it runs
    moving      what it runs goes on elsewhere as soon as there is a free slot, before anything that waits; what finds
                none stays and runs on, so that nobody waits longer than need be

A move is what happens when a worker is lost, only that the worker is there to be told: the fence is closed, the run is
cancelled, and the request is dispatched with the tokens it has.
"""

from __future__ import annotations

from llambo.broker.actions import ToWorker
from llambo.broker.records.registry import Drained, WorkerEntry
from llambo.broker.records.request import Request, RequestState
from llambo.broker.records.state import State
from llambo.broker.requests import dispatching
from llambo.mesh.wire import messages as m

_AT_WORK = (RequestState.DISPATCHED, RequestState.RUNNING)


def ordered(state: State, name: str, order: m.Drain, now_ms: int) -> None:
    """By an operator. The worker may be away: it will be told when it comes back."""
    registry = state.registry
    worker = registry.worker_names.get(name)
    before = registry.drained.get(name)
    move = order.move or (before is not None and before.move)  # only an undo takes that back
    if order.undo:
        registry.drained.pop(name, None)
        news, what = before is not None, "works again"
    else:
        order = m.Drain(move=move)
        registry.drained[name] = Drained(move, b"")
        news = before is None or before.move != move
        what = "takes no new work" + (", what it runs goes on elsewhere" if move else "")
    if news:
        state.happened(now_ms, "drain", f"{name}: {what}", worker=name)
    registry.orders[name] = order
    if worker is not None:
        _set(state, worker, not order.undo, order.move)
        _tell(state, worker, order)


def may_come_back(state: State, name: str, now_ms: int) -> bool:
    """Whether it makes sense to keep an undo for a worker that is not here."""
    return name in state.registry.drained or now_ms < state.started_at + state.config.young_ms


def joined(state: State, worker: WorkerEntry) -> None:
    """A session begins. Another process of that name than the one that was drained does not know of it."""
    order = state.registry.orders.get(worker.name)
    drained = state.registry.drained.get(worker.name)
    if order is None and drained is not None and drained.incarnation != worker.incarnation:
        order = state.registry.orders[worker.name] = m.Drain(move=drained.move)
    if order is not None:
        _set(state, worker, not order.undo, order.move)
        _tell(state, worker, order)
    elif drained is not None:
        _set(state, worker, True, drained.move)


def confirmed(state: State, worker: WorkerEntry, beat: m.WorkerHeartbeat, now_ms: int) -> None:
    """What the worker says counts, unless it cannot have heard yet what it was told."""
    registry = state.registry
    order = registry.orders.get(worker.name)
    if order is not None:
        # One that was otherwise when it was told, and is so now, has heard it. What comes after that was ordered
        # later, through another broker perhaps: to say ours again would undo it.
        obeyed = worker.was_otherwise and not _otherwise(beat, order)
        if beat.seq <= worker.drained_seq and not obeyed:
            return
        if _otherwise(beat, order):
            _tell(state, worker, order)
            return
        del registry.orders[worker.name]
    if beat.drained:
        registry.drained[worker.name] = Drained(beat.moving, worker.incarnation)
    else:
        registry.drained.pop(worker.name, None)
    _set(state, worker, beat.drained, beat.moving)


def _otherwise(beat: m.WorkerHeartbeat, order: m.Drain) -> bool:
    return beat.drained == order.undo or beat.moving < order.move


def _tell(state: State, worker: WorkerEntry, order: m.Drain) -> None:
    worker.was_otherwise = _otherwise(worker.last, order)
    # Control keeps its order: a beat that has seen a later number than this has heard it, or it was lost.
    worker.drained_seq = worker.seq
    state.out.append(ToWorker(worker.route, worker.session, order))


def _set(state: State, worker: WorkerEntry, drained: bool, moving: bool) -> None:
    worker.draining, worker.moving = drained, moving
    if moving:
        state.emptying[worker.session] = worker
    else:
        state.emptying.pop(worker.session, None)
    state.touch(worker)


def empty(state: State, now_ms: int) -> None:
    """After every event, before anything that waits gets a slot: whoever is to be moved and can be, is."""
    if not state.emptying or not state.touched:
        return
    for worker in state.touched.values():
        state.update_pools(worker)
    for worker in list(state.emptying.values()):
        for key in list(worker.claims):
            request = state.running.get(key)
            # What has ended there is left to be delivered.
            if request is not None and request.worker is worker and request.state in _AT_WORK:
                _move(state, request, worker, now_ms)


def _move(state: State, request: Request, worker: WorkerEntry, now_ms: int) -> None:
    state.open_lane(request.lane)
    if state.pools[request.lane].free:
        state.out.append(ToWorker(worker.route, worker.session, m.Cancel(request.id, request.dispatch)))
        dispatching.requeue(state, request, f"{worker.name} is being emptied", now_ms, what="moved")
