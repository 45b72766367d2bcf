"""What is always true of a broker's state. Tests check it after every event."""

from __future__ import annotations

from llambo.broker.core import BrokerCore
from llambo.broker.records.meter import TIMED
from llambo.broker.records.request import RequestState, plain
from llambo.broker.records.state import State
from llambo.mesh.wire import tokens


def check(core: BrokerCore) -> None:
    state = core.state
    _requests(state)
    _queue(state)
    _workers(state)
    _emptying(state)
    _clients(state)
    _bytes(state)
    _accounts(state)
    _meter(state)


def _requests(state: State) -> None:
    for id, request in state.requests.items():
        assert request.id == id and request.state is not RequestState.ENDED
        assert not state.archive.get(id), "a live request has a tombstone"
        if request.state is RequestState.WAITING:
            assert request.worker is None and not request.key, "a waiting request has a worker"
        else:
            assert state.running.get(request.key) is request, "a dispatched request is not behind the fence"
            assert request.worker is not None
            assert request.worker.session in state.registry.workers, "dispatched to a worker that is gone"
            assert request.key in request.worker.claims, "its worker was not given it"
        assert request.followers or request.detached, "nobody follows it, and it is not detached"
        index = request.transcript.next_index
        if request.transcript.chunks:
            first, count, _ = tokens.head(request.transcript.chunks[-1], tokens.KEY_END)
            assert first + count == index, "the transcript does not end where it says"
            before = request.transcript.chunks[-2:-1]
            ends = sum(tokens.head(before[0], tokens.KEY_END)[:2]) if before else 0
            assert first == ends, "the last chunk does not continue the one before it"
        assert not 0 <= request.suspect_at < index, "it is past the token at which an engine died, and still a suspect"
        if request.missing:
            assert request.repair_due, "tokens are missing and nobody will ask for them"
    for key, request in state.running.items():
        assert request.key == key and state.requests.get(request.id) is request


def _queue(state: State) -> None:
    waiting = [r for r in state.requests.values() if r.state is RequestState.WAITING]
    assert state.room.count == len(waiting) == sum(line.count for line in state.room.lines.values())
    assert state.room.bytes == sum(len(r.prompt) for r in waiting)
    for lane, line in state.room.lines.items():
        assert sum(1 for _ in line) == line.count
        pool = state.pools.get(lane)
        may_go = [r for r in line if r.attempt or not r.account.full]
        assert not (pool and pool.free and may_go), "somebody waits although a slot is free"


def _workers(state: State) -> None:
    for session, worker in state.registry.workers.items():
        assert worker.session == session and state.registry.worker_names[worker.name] is worker
        given = worker.claims.keys() - worker.adopted
        assert len(given) <= worker.slots, "more given to a worker than it has slots"
        for model in (*worker.models, *worker.lanes):
            pool = state.pools.get(model)
            inside = pool is not None and model in worker.position
            assert inside == (pool is not None and worker.dispatchable), "a pool does not know its worker"
            if pool is not None and inside:
                assert pool.free[worker.position[model]] is worker
                assert pool.least_loaded() is not None
        for pool in state.wary:
            fit = worker.serves(plain(pool.model)) and worker.dispatchable and not worker.wary
            assert (pool.model in worker.position) == fit, "a pool for suspects does not know its worker"
        aboard = [r for key in given if (r := state.running.get(key)) is not None and r.suspect_at >= 0]
        assert len(aboard) <= 1, "two suspects on one engine"


def _emptying(state: State) -> None:
    for worker in state.emptying.values():
        assert state.registry.workers[worker.session] is worker and worker.moving
        for request in [state.running[key] for key in worker.claims if key in state.running]:
            if request.worker is worker and request.state in (RequestState.DISPATCHED, RequestState.RUNNING):
                pool = state.pools.get(request.lane)
                assert not (pool and pool.free), "a request stays where it is to go from although a slot is free"


def _clients(state: State) -> None:
    for client in state.registry.clients.values():
        assert state.registry.topics[client.topic] is client
        for id in client.following:
            assert client.session in state.requests[id].followers


def _bytes(state: State) -> None:
    assert state.orphanage.bytes == sum(orphan.size for orphan in state.orphanage)
    for orphan in state.orphanage:
        request = state.requests.get(orphan.work.id)
        assert request is None or request.parked, "an orphan of a live request is still up for adoption"
        assert orphan.worker.session in state.registry.workers, "an orphan of a worker that is gone"
    live = sum(r.transcript.reserved + len(r.prompt) for r in state.requests.values())
    assert state.reserved == live
    held = [e.transcript.size for e in state.archive.ended.values() if e.transcript and not e.detached]
    kept = [e.transcript.size for e in state.archive.ended.values() if e.transcript and e.detached]
    assert state.archive.owed_bytes == sum(held) and state.archive.kept_bytes == sum(kept)
    assert state.archive.kept_bytes <= state.config.detached_bytes


def _accounts(state: State) -> None:
    """What is counted as it happens is what is there."""
    for name, account in state.accounts.by_name.items():
        own = [r for r in state.requests.values() if r.owner == name]
        waiting = sum(r.state is RequestState.WAITING for r in own)
        assert account.name == name and all(r.account is account for r in own)
        assert account.queued == waiting, f"{name!r} has {waiting} waiting and not {account.queued}"
        flying = len(own) - waiting
        assert account.in_flight == flying, f"{name!r} has {flying} in flight and not {account.in_flight}"
        held = sum(r.transcript.reserved + len(r.prompt) for r in own)
        assert account.bytes == held, f"{name!r} has {held} bytes and not {account.bytes}"
    for request in state.requests.values():
        assert request.owner in state.accounts.by_name, "a request that nobody is charged with"


def _meter(state: State) -> None:
    timed = sum(request.heard_at >= 0 for request in state.requests.values())
    assert state.meter.timed == timed <= TIMED, f"{timed} streams are timed, the meter knows of {state.meter.timed}"
    for request in state.requests.values():
        assert request.watched or not (request.awaited or request.heard_at >= 0), "its times are taken and nobody looks"
        assert request.counted <= request.transcript.next_index, "tokens are counted that are not there"
