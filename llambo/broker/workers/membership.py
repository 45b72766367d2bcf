"""Joining, staying and going: sessions, heartbeats, leases, and what a worker claims to run."""

from __future__ import annotations

from collections.abc import Mapping

from llambo.broker.actions import Publish, ToClient, ToWorker
from llambo.broker.records.registry import ClientEntry, WorkerEntry
from llambo.broker.records.request import RequestState
from llambo.broker.records.state import State
from llambo.broker.requests import admission, delivery, dispatching, ending
from llambo.broker.workers import draining, speed
from llambo.mesh.wire import limits, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.codec import NO_SESSION
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.identity import Identity

#: Client sessions at a time; more are refused as busy.
CLIENT_SESSIONS = 10_000
#: Workers at a time; more are refused as busy.
WORKER_SESSIONS = 20_000
_REVOKED = ErrorInfo(Code.UNAUTHORIZED, "this key is not valid any more")


# --- workers -------------------------------------------------------------------------------------------


def worker_hello(state: State, route: bytes, hello: m.WorkerHello, now_ms: int, user: str = "") -> None:
    """Newest wins, unless the one with that name is alive and another process."""
    identity = state.identity(user)
    problem = _version_problem(hello.versions)
    if identity is None or not identity.may_serve:
        problem = ErrorInfo(Code.UNAUTHORIZED, "this key is not one of a worker")
    elif not identity.may_be_called(hello.name):
        own = identity.name
        problem = ErrorInfo(Code.FORBIDDEN, f"this key is for a worker called {own!r} or {own + '-...'!r}")
    there = state.registry.worker_names.get(hello.name)
    if problem is None and there is None and len(state.registry.workers) >= WORKER_SESSIONS:
        problem = ErrorInfo(Code.BUSY, f"{WORKER_SESSIONS} workers are connected", 1_000)
    if there is not None and problem is None:
        if there.route == route and there.incarnation == hello.incarnation and there.user == user:
            state.out.append(ToWorker(route, NO_SESSION, there.welcome))
            return
        if (there.incarnation != hello.incarnation or there.user != user) and _alive(state, there, now_ms):
            problem = ErrorInfo(Code.NAME_TAKEN, f"another worker is called {hello.name!r}, from {there.hello.host}")
    if problem is not None:
        state.counters.problems += 1
        state.out.append(ToWorker(route, NO_SESSION, m.Problem(problem)))
        return
    assert identity is not None, "that would be a problem"
    if there is not None:
        lose_worker(state, there, "said hello again", now_ms)
    welcome = _welcome(state, state.config.tokens_in_port, b"", state.config.lease_ms, hello.versions)
    worker = WorkerEntry(hello, welcome, route, now_ms, user, identity)
    state.registry.add_worker(worker)
    state.meter.learn(worker)
    for model in worker.models:
        state.models[model] = 0
    loading = ", still loading" if worker.state == "starting" else ""
    text = f"{worker.name} on {hello.host}: {worker.slots} slots{loading}"
    state.happened(now_ms, "worker joined", text, worker=worker.name)
    state.out.append(ToWorker(route, NO_SESSION, welcome))
    draining.joined(state, worker)
    admission.ask_again(state, now_ms)


def _alive(state: State, worker: WorkerEntry, now_ms: int) -> bool:
    """Whether a hello under its name has to be someone else's."""
    return not worker.route_gone_at and now_ms - worker.heard_at < 3 * state.config.heartbeat_ms


def worker_heartbeat(state: State, worker: WorkerEntry, beat: m.WorkerHeartbeat, now_ms: int) -> None:
    """What it claims is compared with what it was given; both kinds of difference are settled here."""
    if beat.models and (beat.models, beat.slots) != (worker.serving, worker.slots):
        _serves(state, worker, beat, now_ms)
    worker.last = beat
    worker.state = beat.state
    worker.beat = max(worker.beat, beat.beat)
    worker.busy = beat.busy
    worker.adopted &= worker.claims.keys()
    worker.closed = False
    if beat.pace:
        speed.measured(worker, beat.pace, now_ms)
    draining.confirmed(state, worker, beat, now_ms)
    _forget_unclaimed(state, worker, beat, now_ms)
    for key, index in beat.claims.items():
        request = state.running.get(key)
        if request is None or request.worker is not worker:
            # It runs what nobody waits for: stop it. The END it answers with is acknowledged.
            id, dispatch = key[: limits.REQUEST_ID_BYTES], key[limits.REQUEST_ID_BYTES :]
            state.out.append(ToWorker(worker.route, worker.session, m.Cancel(id, dispatch)))
        else:
            _claimed(state, request.id, index, now_ms)
    state.touch(worker)


def _serves(state: State, worker: WorkerEntry, beat: m.WorkerHeartbeat, now_ms: int) -> None:
    """Its model has been loaded, and now it is known what it is; or its engine came back with another one."""
    before = worker.models
    worker.state = "gone"
    state.update_pools(worker)
    worker.serve(beat.models, max(beat.slots, 1))
    state.meter.learn(worker)
    for model in worker.models:
        state.models[model] = 0
    _note_unserved(state, before, now_ms)
    text = f"{worker.name}: {', '.join(worker.models)}, {worker.slots} slots"
    state.happened(now_ms, "worker serves", text, worker=worker.name)


def _note_unserved(state: State, models: tuple[str, ...], now_ms: int) -> None:
    """Of these, whatever nobody serves any more is gone since now."""
    for model in models:
        if not any(model in worker.models for worker in state.registry.workers.values()):
            state.models[model] = max(1, now_ms)


def _forget_unclaimed(state: State, worker: WorkerEntry, beat: m.WorkerHeartbeat, now_ms: int) -> None:
    """Given to it, received by it (its sequence number says so), and yet not claimed: it does not run it."""
    gone = [key for key, seq in worker.claims.items() if seq <= beat.seq and key not in beat.claims]
    for key in gone:
        del worker.claims[key]
    if gone:
        state.update_pools(worker)
    for key in gone:
        request = state.running.get(key)
        if request is not None and request.worker is worker:
            dispatching.requeue(state, request, f"{worker.name} does not run it", now_ms)


def _claimed(state: State, id: bytes, index: int, now_ms: int) -> None:
    request = state.requests[id]
    if request.state is RequestState.DISPATCHED:  # its accept was lost, but here it is
        request.step(RequestState.RUNNING)
    if index > request.transcript.next_index:
        delivery.want(state, request, index, now_ms)


def lose_worker(state: State, worker: WorkerEntry, why: str, now_ms: int) -> None:
    """It is gone, as far as this session goes. Everything it ran continues elsewhere."""
    state.registry.remove_worker(worker)
    keys = list(worker.claims)
    worker.claims.clear()
    worker.state = "gone"
    state.orphanage.forget_worker(worker)
    state.emptying.pop(worker.session, None)
    state.update_pools(worker)
    state.counters.workers_lost += 1
    text = f"{worker.name}: {why} ({len(keys)} of its requests move)"
    left = why.startswith("left: ")  # it said goodbye
    state.happened(now_ms, "worker lost", text, warning=not left, worker=worker.name)
    _note_unserved(state, worker.models, now_ms)
    for key in keys:
        request = state.running.get(key)
        if request is not None and request.worker is worker:
            dispatching.requeue(state, request, f"worker {worker.name}: {why}", now_ms)


def pardon(state: State, late_ms: int, now_ms: int) -> None:
    """This round comes late: the broker, or its whole machine, stood still. Nobody else was silent meanwhile."""
    if late_ms < state.config.heartbeat_ms or not state.worker_round_at:
        return
    state.happened(now_ms, "stood still", f"this broker did nothing for {late_ms} ms", warning=late_ms >= 1_000)
    for worker in state.registry.workers.values():
        worker.heard_at = min(now_ms, worker.heard_at + late_ms)
        if worker.route_gone_at:
            worker.route_gone_at = min(now_ms, worker.route_gone_at + late_ms)
    for client in state.registry.clients.values():
        client.heard_at = min(now_ms, client.heard_at + late_ms)


def worker_round(state: State, now_ms: int) -> None:
    """A heartbeat to each worker. Sending is also how a dead one is found: the route is gone at once."""
    for worker in list(state.registry.workers.values()):
        if now_ms - worker.heard_at >= state.config.lease_ms:
            lose_worker(state, worker, f"silent for {now_ms - worker.heard_at} ms", now_ms)
        elif worker.route_gone_at and now_ms - worker.route_gone_at >= state.config.reconnect_grace_ms:
            lose_worker(state, worker, "its connection is gone", now_ms)
        else:
            delivery.heartbeat_worker(state, worker)


# --- clients -------------------------------------------------------------------------------------------


def client_hello(state: State, route: bytes, hello: m.ClientHello, now_ms: int, user: str = "") -> None:
    identity = state.identity(user)
    problem = _version_problem(hello.versions)
    if identity is None or not identity.may_ask:
        problem = ErrorInfo(Code.UNAUTHORIZED, "this key is not one of a client")
    if problem is None and len(state.registry.clients) >= CLIENT_SESSIONS:
        problem = ErrorInfo(Code.BUSY, f"{CLIENT_SESSIONS} clients are connected", 1_000)
    if problem is not None:
        state.counters.problems += 1
        state.out.append(ToClient(route, NO_SESSION, m.Problem(problem)))
        return
    assert identity is not None, "that would be a problem"
    there = state.registry.client_routes.get(route)
    if there is not None and there.user != user:
        # A peer may choose its route. Whoever had this one is not there any more, and what is for him must not go here.
        lose_client(state, there, now_ms)
        there = None
    if there is not None:
        state.out.append(ToClient(route, NO_SESSION, there.welcome))
        return
    topic = state.chance(limits.TOPIC_BYTES)
    welcome = _welcome(state, state.config.tokens_out_port, topic, state.config.client_lease_ms, hello.versions)
    state.registry.add_client(ClientEntry(hello, welcome, route, now_ms, user, identity))
    state.out.append(ToClient(route, NO_SESSION, welcome))


def subscribed(state: State, topic: bytes, now_ms: int) -> None:
    """Its subscription is in force: a beat at once tells the client so."""
    client = state.registry.topics.get(topic)
    if client is not None:
        heartbeat_client(state, client)


def heartbeat_client(state: State, client: ClientEntry) -> None:
    """On both planes, with the progress of each of its requests, so that a lost tail is always noticed."""
    client.number += 1
    progress: dict[bytes, int] = {}
    waiting: dict[bytes, int] = {}
    for id in client.following:
        request = state.requests[id]
        if request.state is RequestState.WAITING:
            waiting[id] = state.room.ahead(request)
        elif request.stream:
            progress[id] = request.transcript.next_index
    beat = m.BrokerHeartbeat(client.number, client.echo, progress, waiting)
    state.out.append(Publish([client.topic + tokens.encode_beat(client.number, client.session)]))
    state.out.append(ToClient(client.route, client.session, beat))


def lose_client(state: State, client: ClientEntry, now_ms: int) -> None:
    state.registry.remove_client(client)
    admission.unfollow(state, client, now_ms)


def client_round(state: State, now_ms: int) -> None:
    for client in list(state.registry.clients.values()):
        if now_ms - client.heard_at >= state.config.client_lease_ms:
            state.counters.clients_lost += 1
            lose_client(state, client, now_ms)
        else:
            ending.remind(state, client, now_ms)
            heartbeat_client(state, client)


# --- both ----------------------------------------------------------------------------------------------


def keys_changed(state: State, identities: Mapping[str, Identity], now_ms: int) -> None:
    """The keyring is another one. Sessions of keys that are gone end now; the others go by what it says of them."""
    state.identities = identities
    state.accounts.allow(identities)
    state.eased |= state.accounts.by_name
    for client in list(state.registry.clients.values()):
        identity = identities.get(client.user)
        if identity is None or not identity.may_ask or identity.name != client.identity.name:
            state.out.append(ToClient(client.route, client.session, m.Problem(_REVOKED)))
            state.happened(now_ms, "key revoked", f"client {client.identity.name} has to leave")
            lose_client(state, client, now_ms)
        else:
            client.identity = identity
    for worker in list(state.registry.workers.values()):
        identity = identities.get(worker.user)
        if identity is None or not (identity.may_serve and identity.may_be_called(worker.name)):
            state.out.append(ToWorker(worker.route, worker.session, m.Problem(_REVOKED)))
            lose_worker(state, worker, "its key was revoked", now_ms)
        else:
            worker.identity = identity


def _welcome(state: State, port: int, topic: bytes, lease_ms: int, versions: tuple[int, int]) -> m.Welcome:
    session = state.chance(limits.SESSION_ID_BYTES)
    version = min(m.VERSIONS[1], versions[1])
    pull = state.identities is not None
    return m.Welcome(session, port, topic, version, state.config.name, state.config.heartbeat_ms, lease_ms, pull)


def _version_problem(versions: tuple[int, int]) -> ErrorInfo | None:
    low, high = m.VERSIONS
    if versions[0] <= high and versions[1] >= low:
        return None
    return ErrorInfo(Code.BAD_VERSION, f"protocol {versions[0]} to {versions[1]} is spoken there, {low} to {high} here")


def say_goodbye(state: State, reason: str) -> None:
    """Nobody has to find out by a lease that this broker is gone."""
    for worker in state.registry.workers.values():
        state.out.append(ToWorker(worker.route, worker.session, m.Goodbye(reason)))
    for client in state.registry.clients.values():
        state.out.append(ToClient(client.route, client.session, m.Goodbye(reason)))
