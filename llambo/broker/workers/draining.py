"""Taking work away from a worker: before its host is rebooted, or to let it leave.

Being drained is a state and no event. The worker holds the truth, because several brokers may give it orders and each
of them may be restarted; its heartbeats bring it to all of them. A broker holds the orders that have not been confirmed
yet, and sends them again; and it remembers the names of drained workers, for a worker that is restarted meanwhile.

    drained     gets no new work, and finishes what it runs
    moving      what it runs goes on elsewhere as soon as there is a free slot, before anything that waits; what finds
                none stays and runs on, so that no client waits longer than it must

A move is what happens when a worker is lost, only that this worker gets a message: the run's key leaves the fence, the
run is cancelled, and the request is dispatched with the tokens it has.
"""

from __future__ import annotations

import msgspec

from llambo.broker.records.registry import ClientEntry, Drained, WorkerEntry
from llambo.broker.records.request import Request, RequestState
from llambo.broker.records.state import State
from llambo.broker.report import queries
from llambo.broker.requests import dispatching
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import reports
from llambo.mesh.wire.errors import Code, ErrorInfo

_RUNNING = (RequestState.DISPATCHED, RequestState.RUNNING)


def asked(state: State, client: ClientEntry, message: m.DrainWorker, blob: bytes, now_ms: int) -> None:
    """An operator's order."""
    worker = state.registry.worker_names.get(message.worker)
    if worker is None and not (message.undo and _may_come_back(state, message.worker, now_ms)):
        error = ErrorInfo(Code.UNKNOWN_WORKER, f"no worker is called {message.worker!r}")
        state.to_client(client, m.Problem(error, b"", message.query))
        return
    moving = message.move and not message.undo
    _order(state, message.worker, m.Drain(message.undo, moving), now_ms)
    # What it runs for other brokers has to go as well before it is empty.
    running = len(worker.claims) + worker.busy if worker is not None else 0
    answer = reports.DrainReply(worker=message.worker, draining=not message.undo, moving=moving, running=running)
    queries.send(state, client, message.query, msgspec.msgpack.encode(answer))


def _may_come_back(state: State, name: str, now_ms: int) -> bool:
    """Whether to remember an undo for a worker that is not here."""
    return name in state.registry.drained or now_ms < state.wakeups.started_at + state.config.timing.startup_grace_ms


def _order(state: State, name: str, order: m.Drain, now_ms: int) -> None:
    """The worker may be away: the order is sent when it comes back."""
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
        state.journal.add(now_ms, "drain", f"{name}: {what}", worker=name)
    registry.orders[name] = order
    if worker is not None:
        _set(state, worker, not order.undo, order.move)
        _send(state, worker, order)


def joined(state: State, worker: WorkerEntry) -> None:
    """A session begins. If another process of that name was drained, this one does not know of it.

    Unless another broker has reached it before, perhaps with the end of that drain: then its heartbeat says what holds.
    """
    order = state.registry.orders.get(worker.name)
    drained = state.registry.drained.get(worker.name)
    knows = worker.hello.ordered or (drained is not None and drained.incarnation == worker.hello.incarnation)
    if order is None and drained is not None and not knows:
        order = state.registry.orders[worker.name] = m.Drain(move=drained.move)
    if order is not None:
        _set(state, worker, not order.undo, order.move)
        _send(state, worker, order)
    elif drained is not None:
        _set(state, worker, True, drained.move)


def confirmed(state: State, worker: WorkerEntry, beat: m.WorkerHeartbeat, now_ms: int) -> None:
    """What the worker says counts, unless it cannot have received the order yet."""
    registry = state.registry
    order = registry.orders.get(worker.name)
    if order is not None:
        # A worker that differed from the order when it was sent, and does not now, has received it. What comes after
        # that was ordered later, through another broker perhaps: to send ours again would undo it.
        obeyed = worker.drain.differed and not _differs(beat, order)
        if beat.seq <= worker.drain.sent_seq and not obeyed:
            return
        if _differs(beat, order):
            _send(state, worker, order)
            return
        del registry.orders[worker.name]
    if beat.drained:
        registry.drained[worker.name] = Drained(beat.moving, worker.hello.incarnation)
    else:
        registry.drained.pop(worker.name, None)
    _set(state, worker, beat.drained, beat.moving)


def _differs(beat: m.WorkerHeartbeat, order: m.Drain) -> bool:
    return beat.drained == order.undo or beat.moving < order.move


def _send(state: State, worker: WorkerEntry, order: m.Drain) -> None:
    worker.drain.differed = _differs(worker.last, order)
    # Control is in order: a worker whose beat has a later number than this has received the order, or it was lost.
    worker.drain.sent_seq = worker.beats.seq
    worker.link.due_at = 0  # which gives it a later number soon
    state.to_worker(worker, order)


def _set(state: State, worker: WorkerEntry, drained: bool, moving: bool) -> None:
    worker.drain.drained, worker.drain.moving = drained, moving
    if moving:
        state.registry.emptying[worker.session] = worker
    else:
        state.registry.emptying.pop(worker.session, None)
    state.pools.touch(worker)


def empty(state: State, now_ms: int) -> None:
    """After every event, before anything that waits gets a slot: move what is to be moved and can be."""
    if not state.registry.emptying or not state.pools.touched:
        return
    for worker in state.pools.touched.values():
        state.pools.refresh(worker)
    for worker in list(state.registry.emptying.values()):
        for key in list(worker.claims):
            request = state.running.get(key)
            # What has ended there is left to be delivered.
            if request is not None and request.run.worker is worker and request.state in _RUNNING:
                _move(state, request, worker, now_ms)


def _move(state: State, request: Request, worker: WorkerEntry, now_ms: int) -> None:
    state.open_lane(request.lane)
    if state.pools[request.lane].free:
        state.to_worker(worker, m.Cancel(request.id, request.run.dispatch))
        dispatching.requeue(state, request, f"{worker.name} is being emptied", now_ms, what="moved")
