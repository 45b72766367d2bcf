"""What is always true of a broker's state. Tests check it after every event."""

from __future__ import annotations

from llambo.broker.core import BrokerCore
from llambo.broker.records.meter import TIMED
from llambo.broker.records.pools import serves
from llambo.broker.records.request import RequestState
from llambo.broker.records.state import State
from llambo.mesh.wire import tokens


def check(core: BrokerCore) -> None:
    state = core.state
    _requests(state)
    _queue(state)
    _workers(state)
    _emptying(state)
    _hosts(state)
    _clients(state)
    _bytes(state)
    _accounts(state)
    _meter(state)


def _requests(state: State) -> None:
    for id, request in state.requests.items():
        assert request.id == id and request.state is not RequestState.ENDED
        assert not state.archive.get(id), "a live request has a tombstone"
        if request.state is RequestState.WAITING:
            assert request.run.worker is None and not request.run.key, "a waiting request has a worker"
        else:
            assert state.running.get(request.run.key) is request, "the key of a dispatched request is not in the fence"
            assert request.run.worker is not None
            assert request.run.worker.session in state.registry.workers, "dispatched to a worker that is gone"
            assert request.run.key in request.run.worker.claims, "its worker was not given it"
        assert request.followers or request.asked.detached, "it has no follower, and is not detached"
        index = request.transcript.next_index
        if request.transcript.chunks:
            first, count, _ = tokens.head(request.transcript.chunks[-1], tokens.KEY_END)
            assert first + count == index, "the transcript does not end where it says"
            before = request.transcript.chunks[-2:-1]
            ends = sum(tokens.head(before[0], tokens.KEY_END)[:2]) if before else 0
            assert first == ends, "the last chunk does not continue the one before it"
        assert not 0 <= request.suspicion.token < index, (
            "it is past the token at which an engine died, and still a suspect"
        )
        if request.incomplete:
            assert request.repair.due, "tokens are missing and will not be asked for"
        assert request.watched or request.transcript.stash is None, "chunks in the stash would not be released"
    for key, request in state.running.items():
        assert request.run.key == key and state.requests.get(request.id) is request


def _queue(state: State) -> None:
    waiting = [r for r in state.requests.values() if r.state is RequestState.WAITING]
    assert state.queue.count == len(waiting) == sum(line.count for line in state.queue.lines.values())
    assert state.queue.bytes == sum(len(r.prompt) for r in waiting)
    for lane, line in state.queue.lines.items():
        assert sum(1 for _ in line) == line.count
        pool = state.pools.get(lane)
        may_go = [r for r in line if r.run.attempt or not r.account.full]
        assert not (pool and pool.free and may_go), "a request waits although a slot is free"


def _workers(state: State) -> None:
    kinds = state.models.kinds
    assert kinds.keys() <= state.models.unserved_since.keys(), "the kind of a model that is forgotten"
    for session, worker in state.registry.workers.items():
        assert worker.session == session and state.registry.worker_names[worker.name] is worker
        assert not worker.backlog.wants_receipt, "much was sent, and no receipt asked for"
        given = worker.claims.keys() - worker.adopted
        assert len(given) <= worker.slots, "more given to a worker than it has slots"
        for lane, pool in state.pools.items():
            fit = serves(worker, lane) and pool.takes(worker)
            assert (pool in worker.position) == fit, "a pool does not know its worker"
            if fit:
                assert pool.free[worker.position[pool]] is worker
                assert pool.least_loaded() is not None
        suspects = [r for key in given if (r := state.running.get(key)) is not None and r.suspicion.token >= 0]
        assert len(suspects) <= 1, "two suspects on one engine"
        assert worker.state == "starting" or kinds.keys() >= set(worker.serving.models), "its model has no kind"


def _emptying(state: State) -> None:
    for worker in state.registry.emptying.values():
        assert state.registry.workers[worker.session] is worker and worker.drain.moving
        for request in [state.running[key] for key in worker.claims if key in state.running]:
            if request.run.worker is worker and request.state in (RequestState.DISPATCHED, RequestState.RUNNING):
                pool = state.pools.get(request.lane)
                assert not (pool and pool.free), "a request stays where it is to go from although a slot is free"


def _hosts(state: State) -> None:
    hosts = state.hosts
    assert {host.name: host for host in hosts.sessions.values()} == hosts.by_name
    for name, there in hosts.having.items():
        assert there, f"no host has {name}, and it is listed"
        assert name in state.models.unserved_since, f"{name} can be loaded, and is not known"
        assert all(model in hosts.by_name[host].models for host, model in there.items())
    for host in hosts.sessions.values():
        assert host.models.keys() <= host.usage.keys()
        assert all(name in hosts.having for name in host.models)
    for session, worker in state.registry.workers.items():
        assert worker.yields == (session in hosts.yielding), "a worker yields for no model"


def _clients(state: State) -> None:
    for client in state.registry.clients.values():
        assert state.registry.topics[client.topic] is client
        backlog = client.backlog
        assert not (backlog.wants_receipt and client.hello.incarnation), "much was sent, and no receipt asked for"
        for id in client.following:
            assert client.session in state.requests[id].followers


def _bytes(state: State) -> None:
    assert state.recovery.orphans.bytes == sum(orphan.size for orphan in state.recovery.orphans)
    for orphan in state.recovery.orphans:
        request = state.requests.get(orphan.work.id)
        known = request is not None and request.owner == orphan.work.owner and not request.place.awaiting_run
        assert not known, "an orphan of a live request is still up for adoption"
        assert orphan.worker.session in state.registry.workers, "an orphan of a worker that is gone"
    live = sum(r.transcript.reserved + len(r.prompt) for r in state.requests.values())
    assert state.reserved == live
    held = [e.transcript.size for e in state.archive.ended.values() if e.transcript and not e.detached]
    detached = [e.transcript.size for e in state.archive.ended.values() if e.transcript and e.detached]
    assert state.archive.owed_bytes == sum(held) and state.archive.detached_bytes == sum(detached)
    assert state.archive.detached_bytes <= state.config.bounds.detached_bytes


def _accounts(state: State) -> None:
    """What is counted as it happens is what is there."""
    for name, account in state.access.accounts.by_name.items():
        own = [r for r in state.requests.values() if r.owner == name]
        waiting = sum(r.state is RequestState.WAITING for r in own)
        assert account.name == name and all(r.account is account for r in own)
        assert account.queued == waiting, f"{name!r} has {waiting} waiting and not {account.queued}"
        flying = len(own) - waiting
        assert account.in_flight == flying, f"{name!r} has {flying} in flight and not {account.in_flight}"
        held = sum(r.transcript.reserved + len(r.prompt) for r in own)
        assert account.bytes == held, f"{name!r} has {held} bytes and not {account.bytes}"
    for request in state.requests.values():
        assert request.owner in state.access.accounts.by_name, "a request that no account is charged with"


def _meter(state: State) -> None:
    timed, known = sum(r.measured.timed_at >= 0 for r in state.requests.values()), state.measured.meter.timed
    assert known == timed <= TIMED, f"{timed} streams are timed, the meter knows of {known}"
    for request in state.requests.values():
        measured = request.measured
        assert request.watched or not (measured.first_awaited or measured.timed_at >= 0), "its chunks are not timed"
        assert measured.counted <= request.transcript.next_index, "tokens are counted that are not there"
