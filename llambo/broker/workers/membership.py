"""Joining, staying and leaving: sessions, heartbeats, leases, and what a worker claims to run."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from itertools import chain, count, islice

from llambo.broker.config import Intervals
from llambo.broker.events import Publish, ToClient, ToWorker
from llambo.broker.records.backlog import Backlog
from llambo.broker.records.registry import ClientEntry, Serving, Session, WorkerEntry
from llambo.broker.records.request import Lane, RequestState
from llambo.broker.records.state import State
from llambo.broker.requests import admission, delivery, dispatching, following, model_names, same_model
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
#: A worker without runs may miss so many heartbeats before it is lost.
IDLE_LEASE_BEATS = 4
#: From the end of a connection until libzmq refuses to send there.
PROBE_MS = 5
#: Requests that one round of heartbeats to clients is about, of all of them together, and places in the queue; so many
#: of each client at least. Those of one client take turns if it has more.
REQUESTS_SHOWN, LEAST_SHOWN = 10_000, 10
PLACES = 1_000
#: Notes in one heartbeat to a client, on its oldest requests.
NOTES = 256
REVOKED = ErrorInfo(Code.UNAUTHORIZED, "this key is not valid any more")


class Loss(enum.Enum):
    """Why a worker's session is over."""

    LEFT = "left"
    JOINED_AGAIN = "said hello again"
    SILENT = "silent"
    DISCONNECTED = "its connection is gone"
    REVOKED = "its key was revoked"


# --- workers ---


def worker_hello(state: State, route: bytes, hello: m.WorkerHello, user: str, now_ms: int) -> None:
    """The newest session of a process replaces its older one. The name of another process that is alive is taken."""
    identity = state.access.identity(user)
    problem = version_problem(hello.versions)
    if identity is None or not identity.may_serve:
        problem = ErrorInfo(Code.UNAUTHORIZED, "this key is not one of a worker")
    elif not identity.may_be_called(hello.name):
        own = identity.name
        text = f"the key {own!r} is for workers called {own!r} or {own + '-...'!r}, as in --name {own}-{hello.name}"
        problem = ErrorInfo(Code.FORBIDDEN, text)
    there = state.registry.worker_names.get(hello.name)
    if problem is None and there is None and len(state.registry.workers) >= WORKER_SESSIONS:
        problem = ErrorInfo(Code.BUSY, f"{WORKER_SESSIONS} workers are connected", 1_000)
    if problem is None and there is None:
        problem = crowded(state)
    if there is not None and problem is None:
        same = there.hello.incarnation == hello.incarnation and there.link.user == user
        if same and there.link.route == route:
            state.out.append(ToWorker(route, NO_SESSION, there.link.welcome))
            return
        if not same and _is_alive(state, there, now_ms):
            free = next(name for n in count(2) if (name := f"{hello.name}-{n}") not in state.registry.worker_names)
            text = f"the name {hello.name!r} is taken by a worker on {there.hello.host or 'another host'}"
            problem = ErrorInfo(Code.NAME_TAKEN, f"{text}; start this one with --name {free}")
            delivery.heartbeat_worker(state, there)  # if that one is gone, this shows it
    if problem is not None:
        state.counters.peers.problems += 1
        state.out.append(ToWorker(route, NO_SESSION, m.Problem(problem)))
        return
    assert identity is not None, "refused above"
    if there is not None:
        lose_worker(state, there, Loss.JOINED_AGAIN, now_ms)
    _add_worker(state, hello, route, user, identity, now_ms)


def _add_worker(state: State, hello: m.WorkerHello, route: bytes, user: str, identity: Identity, now_ms: int) -> None:
    config = state.config
    idle_ms = state.pace.idle_ms if hello.paced else 0
    welcome = welcome_to(state, config.tokens_in_port, b"", config.timing.lease_ms, hello.versions, idle_ms)
    session = Session(route, welcome, now_ms, now_ms, user, identity, idle_ms=state.pace.idle_ms)
    worker = WorkerEntry(hello, session, Backlog(config.bounds.backlog_bytes))
    worker.speed.fresh_until = now_ms + config.faults.settle_ms
    state.registry.add_worker(worker)
    _serves_models(state, worker, now_ms)
    loading = ", still loading" if worker.state == "starting" else ""
    text = f"{worker.name} on {hello.host}: {worker.slots} slots{loading}"
    state.journal.add(now_ms, "worker joined", text, worker=worker.name)
    same_model.note_different(state, worker, now_ms)
    state.out.append(ToWorker(route, NO_SESSION, welcome))
    draining.joined(state, worker)
    admission.retry_deferred(state, now_ms)


def _serves_models(state: State, worker: WorkerEntry, now_ms: int) -> None:
    state.measured.meter.learn(worker)
    for model in worker.serving.models:
        state.models.unserved_since[model] = 0
    state.models.claimed.difference_update(worker.serving.models)
    if worker.state != "starting":
        state.models.served.update(worker.serving.models)
    model_names.learn_kinds(state, worker, now_ms)


def _is_alive(state: State, worker: WorkerEntry, now_ms: int) -> bool:
    """Whether a hello under its name must come from another process."""
    interval_ms = worker.link.idle_ms if worker.hello.paced else state.config.timing.heartbeat_ms
    return not worker.link.route_gone_at and now_ms - worker.link.heard_at < 3 * interval_ms


def worker_heartbeat(state: State, worker: WorkerEntry, beat: m.WorkerHeartbeat, blob: bytes, now_ms: int) -> None:
    """What it claims is compared with what it was given; both kinds of difference are settled here."""
    loaded = worker.state == "starting" != beat.state
    if beat.models and (beat.models, beat.slots) != (worker.serving.infos, worker.slots):
        _serves_others(state, worker, beat, now_ms)
    worker.last = beat
    if loaded:
        state.models.served.update(worker.serving.models)
        worker.speed.fresh_until = now_ms + state.config.faults.settle_ms
    worker.state = beat.state
    if loaded:
        model_names.learn_kinds(state, worker, now_ms)
    worker.beats.beat = max(worker.beats.beat, beat.beat)
    worker.adopted &= worker.claims.keys()
    worker.refusing = worker.yields
    if beat.pace:
        speed.measured(worker, beat.pace, now_ms)
    draining.confirmed(state, worker, beat, now_ms)
    _requeue_unclaimed(state, worker, beat, now_ms)
    for key, index in beat.claims.items():
        request = state.running.get(key)
        if request is None or request.run.worker is not worker:
            # A run that no request needs: stop it. The END it answers with is acknowledged.
            id, dispatch = key[: limits.REQUEST_ID_BYTES], key[limits.REQUEST_ID_BYTES :]
            state.to_worker(worker, m.Cancel(id, dispatch))
        else:
            if request.state is RequestState.DISPATCHED:  # its accept was lost
                request.step(RequestState.RUNNING)
            if index > request.transcript.next_index:
                delivery.repair_until(state, request, index, now_ms)
    state.pools.touch(worker)


def _serves_others(state: State, worker: WorkerEntry, beat: m.WorkerHeartbeat, now_ms: int) -> None:
    """Its model has been loaded, and now it is known what it is; or its engine came back with another one."""
    before = worker.serving.models
    worker.state = "gone"
    state.pools.refresh(worker)
    worker.state = beat.state
    worker.serving = Serving(beat.models, max(beat.slots, 1))
    worker.speed.weigh(worker.speed.level, worker.slots)
    _serves_models(state, worker, now_ms)
    _note_unserved(state, before, now_ms)
    text = f"{worker.name}: {', '.join(worker.serving.models)}, {worker.slots} slots"
    state.journal.add(now_ms, "worker serves", text, worker=worker.name)
    same_model.note_different(state, worker, now_ms)
    same_model.note_waiting(state, (*before, *worker.serving.models), now_ms)


def _note_unserved(state: State, models: tuple[str, ...], now_ms: int) -> None:
    """Of these models, those without a worker are unserved from now on. One that never was served is forgotten."""
    for model in models:
        if not any(model in worker.serving.models for worker in state.registry.workers.values()):
            state.models.unserved_since[model] = max(1, now_ms)
            if is_forgettable(state, model) and model not in state.models.served:
                forget_model(state, model)


def is_forgettable(state: State, model: str) -> bool:
    """No worker serves it, no host has it, no request waits for it, and no orchestrator has promised workers."""
    there = not state.models.unserved_since[model] or Lane(model) in state.queue.lines
    return not there and not state.is_promised(model) and model not in state.hosts.having


def forget_model(state: State, model: str) -> None:
    state.models.forget(model)
    state.pools.close(Lane(model))


def _requeue_unclaimed(state: State, worker: WorkerEntry, beat: m.WorkerHeartbeat, now_ms: int) -> None:
    """Given to it, received by it (its sequence number says so), and yet not claimed: it does not run it."""
    gone = [key for key, seq in worker.claims.items() if seq <= beat.seq and key not in beat.claims]
    for key in gone:
        del worker.claims[key]
    if gone:
        state.pools.refresh(worker)
    for key in gone:
        request = state.running.get(key)
        if request is not None and request.run.worker is worker:
            dispatching.requeue(state, request, f"{worker.name} does not run it", now_ms, what="lost")


def worker_left(state: State, worker: WorkerEntry, goodbye: m.Goodbye, blob: bytes, now_ms: int) -> None:
    lose_worker(state, worker, Loss.LEFT, now_ms, f"left: {goodbye.reason or 'goodbye'}")


def lose_worker(state: State, worker: WorkerEntry, loss: Loss, now_ms: int, detail: str = "") -> None:
    """Its session is over. Everything it ran continues elsewhere."""
    why = detail or loss.value
    state.registry.remove_worker(worker)
    keys = list(worker.claims)
    worker.claims.clear()
    worker.state = "gone"
    state.recovery.orphans.forget_worker(worker)
    state.pools.refresh(worker)
    state.counters.peers.workers_lost += 1
    text = f"{worker.name}: {why} ({len(keys)} of its requests move)"
    state.journal.add(now_ms, "worker lost", text, warning=loss is not Loss.LEFT, worker=worker.name)
    _note_unserved(state, worker.serving.models, now_ms)
    same_model.note_waiting(state, worker.serving.models, now_ms)
    for key in keys:
        request = state.running.get(key)
        if request is not None and request.run.worker is worker:
            dispatching.requeue(state, request, f"worker {worker.name}: {why}", now_ms, what="lost")


def route_gone(state: State, route: bytes, to_worker: bool, now_ms: int) -> None:
    """For a client this means nothing yet; a worker has a moment to come back."""
    (state.registry.workers if to_worker else state.registry.clients).route_gone(route)
    worker = state.registry.workers.by_route.get(route) if to_worker else None
    if worker is not None and not worker.link.route_gone_at:
        worker.link.route_gone_at = now_ms
        due = now_ms + state.config.timing.reconnect_grace_ms
        state.wakeups.worker_round_at = min(state.wakeups.worker_round_at, due)


def extend_leases(state: State, late_ms: int, now_ms: int) -> None:
    """This round comes late: the broker, or its whole machine, stood still. Its peers were not silent meanwhile."""
    if late_ms < state.config.timing.heartbeat_ms or not state.wakeups.worker_round_at:
        return
    state.journal.add(now_ms, "stood still", f"this broker did nothing for {late_ms} ms", warning=late_ms >= 1_000)
    registry = state.registry
    links = [worker.link for worker in registry.workers.values()]
    links += [client.link for client in registry.clients.values()]
    links += [host.link for host in state.hosts.sessions.values()]
    for link in links:
        link.heard_at = min(now_ms, link.heard_at + late_ms)
        if link.route_gone_at:
            link.route_gone_at = min(now_ms, link.route_gone_at + late_ms)


def find_disconnected(state: State, now_ms: int) -> None:
    """Connections have ended. To send is to find out which: it fails at once, or a moment later."""
    wakeups, ping_ms = state.wakeups, state.config.timing.ping_ms
    wakeups.probe_until = now_ms + 2 * ping_ms
    soon = max(now_ms + PROBE_MS, wakeups.probed_at + ping_ms)
    wakeups.worker_round_at = min(wakeups.worker_round_at, soon)


def unread_ms(state: State, lease_ms: int) -> int:
    """A message of a peer may be among those that are not read yet. Twice its lease is the most, whatever others send.

    Sockets take turns among their connections, so a peer that sends without an end does not hide what others send.
    """
    return min(state.measured.load.unread_ms, lease_ms)


def worker_round(state: State, now_ms: int) -> None:
    """Heartbeats to the workers for which they are due. Sending is also how a dead one is found: its route is gone.

    One with runs gets them often, and is lost when it was silent for `lease_ms`. For one without runs both take longer
    the more sessions there are, since all of them together would take more time than the requests do.
    """
    timing, wakeups = state.config.timing, state.wakeups
    state.pace = pace = timing.pace(state.sessions)
    probe = now_ms <= wakeups.probe_until
    probe_idle = probe and now_ms >= wakeups.idle_probed_at + max(timing.ping_ms, state.sessions)
    if probe:
        wakeups.probed_at = now_ms
    if probe_idle:
        wakeups.idle_probed_at = now_ms
    for worker in list(state.registry.workers.values()):
        link = worker.link
        silent_ms, gone_at = now_ms - link.heard_at, link.route_gone_at
        busy = bool(worker.claims) or bool(worker.backlog.receipt)
        if not busy:
            link.busy_at = 0
        elif not link.busy_at:
            link.busy_at, link.due_at = now_ms, min(link.due_at, now_ms + pace.ping_ms)
        if silent_ms >= timing.lease_ms and _lease_is_out(state, worker, now_ms):
            lose_worker(state, worker, Loss.SILENT, now_ms, f"silent for {silent_ms} ms")
        elif gone_at and now_ms - gone_at >= timing.reconnect_grace_ms:
            lose_worker(state, worker, Loss.DISCONNECTED, now_ms)
        elif now_ms >= link.due_at or probe_idle or (probe and busy):
            _heartbeat_worker(state, worker, pace, now_ms)


def _lease_is_out(state: State, worker: WorkerEntry, now_ms: int) -> bool:
    """With runs its lease is short, from when it got the first of them at the earliest."""
    lease_ms, link = state.config.timing.lease_ms, worker.link
    if worker.hello.paced and not worker.claims:
        lease_ms = max(lease_ms, IDLE_LEASE_BEATS * link.idle_ms)
    return now_ms - max(link.heard_at, link.busy_at) >= lease_ms + unread_ms(state, lease_ms)


def _heartbeat_worker(state: State, worker: WorkerEntry, pace: Intervals, now_ms: int) -> None:
    """Its idle interval changes by a factor of two at most each time: one lost heartbeat then ends no lease."""
    link = worker.link
    link.idle_ms = min(max(pace.idle_ms, link.idle_ms // 2), 2 * link.idle_ms)
    quiet_ms = link.idle_ms if worker.hello.paced else state.config.timing.heartbeat_ms
    link.due_at = now_ms + (pace.ping_ms if link.busy_at else quiet_ms)
    delivery.heartbeat_worker(state, worker)
    if worker.backlog.receipt:
        state.ask_worker(worker)


# --- clients ---


def client_hello(state: State, route: bytes, hello: m.ClientHello, user: str, now_ms: int) -> None:
    config, registry = state.config, state.registry
    identity = state.access.identity(user)
    problem = version_problem(hello.versions)
    if identity is None or not identity.may_ask:
        problem = ErrorInfo(Code.UNAUTHORIZED, "this key is not one of a client")
    if problem is None and len(registry.clients) >= CLIENT_SESSIONS:
        problem = ErrorInfo(Code.BUSY, f"{CLIENT_SESSIONS} clients are connected", 1_000)
    if problem is None and route not in registry.clients.by_route:
        problem = crowded(state)
    if problem is not None:
        state.counters.peers.problems += 1
        state.out.append(ToClient(route, NO_SESSION, m.Problem(problem)))
        return
    assert identity is not None, "refused above"
    there = registry.clients.by_route.get(route)
    if there is not None and there.link.user != user:
        # A peer may choose its route. The client that had this one is gone, and its answers must not go here.
        lose_client(state, there, now_ms)
        there = None
    if there is not None:
        state.out.append(ToClient(route, NO_SESSION, there.link.welcome))
        return
    topic = state.random_bytes(limits.TOPIC_BYTES)
    welcome = welcome_to(state, config.tokens_out_port, topic, config.timing.client_lease_ms, hello.versions)
    session = Session(route, welcome, now_ms, now_ms, user, identity)
    registry.add_client(ClientEntry(hello, session, Backlog(config.bounds.backlog_bytes)))
    state.out.append(ToClient(route, NO_SESSION, welcome))


def client_heartbeat(state: State, client: ClientEntry, beat: m.ClientHeartbeat, blob: bytes, now_ms: int) -> None:
    client.beats.echo = beat.echo
    if not client.hello.incarnation:
        client.backlog.heartbeat(client.beats.number)


def subscribed(state: State, topic: bytes, now_ms: int) -> None:
    """Its subscription is in force: a beat at once shows it to the client."""
    client = state.registry.topics.get(topic)
    if client is not None:
        _heartbeat_client(state, client)


def _heartbeat_client(state: State, client: ClientEntry) -> None:
    """On both planes, with the progress of each of its requests, so that a lost tail is always noticed."""
    beats = client.beats
    beats.number += 1
    places = max(1, PLACES // len(state.registry.clients))
    progress: dict[bytes, int] = {}
    waiting: dict[bytes, int] = {}
    notes: dict[bytes, str] = {}
    for id in () if client.backlog.full else _in_turn(client, places):
        request = state.requests[id]
        if request.state is RequestState.WAITING:
            if len(waiting) == places:
                continue
            waiting[id] = state.queue.ahead(request)
        elif request.stream:
            progress[id] = request.transcript.next_index
    for id in islice(client.following, NOTES) if state.hosts.waits and not client.backlog.full else ():
        request = state.requests[id]
        if request.state is RequestState.WAITING and (note := state.hosts.note(request.model)):
            notes[id] = note
    state.out.append(Publish([client.topic + tokens.encode_beat(beats.number, client.session)]))
    state.to_client(client, m.BrokerHeartbeat(beats.number, beats.echo, progress, waiting, notes=notes))


def _in_turn(client: ClientEntry, places: int) -> Iterable[bytes]:
    """The requests that this heartbeat is about: all of them, unless they are very many."""
    following = client.following
    if len(following) <= places:
        return following
    # Another part comes first each time, so that each of them has its turn.
    at = client.beats.number * places % len(following)
    shown = min(len(following), max(LEAST_SHOWN, REQUESTS_SHOWN * places // PLACES))
    return list(islice(chain(islice(following, at, None), following), shown))


def client_left(state: State, client: ClientEntry, goodbye: m.Goodbye, blob: bytes, now_ms: int) -> None:
    lose_client(state, client, now_ms)


def lose_client(state: State, client: ClientEntry, now_ms: int) -> None:
    state.registry.remove_client(client)
    following.unfollow_all(state, client, now_ms)


def client_round(state: State, now_ms: int) -> None:
    for client in list(state.registry.clients.values()):
        lease_ms = state.config.timing.client_lease_ms
        if now_ms - client.link.heard_at >= lease_ms + unread_ms(state, lease_ms):
            state.counters.peers.clients_lost += 1
            lose_client(state, client, now_ms)
        else:
            following.send_late_ends(state, client, now_ms)
            _heartbeat_client(state, client)
            if client.backlog.receipt:
                state.ask_client(client)


# --- both ---


def keys_changed(state: State, identities: Mapping[str, Identity], now_ms: int) -> None:
    """The keyring has changed. Sessions of keys that are gone end now; the others go by what it allows them."""
    access = state.access
    access.identities = identities
    access.accounts.allow(identities)
    state.queue.eased |= access.accounts.by_name
    for client in list(state.registry.clients.values()):
        identity = identities.get(client.link.user)
        if identity is None or not identity.may_ask or identity.name != client.identity.name:
            state.to_client(client, m.Problem(REVOKED))
            state.journal.add(now_ms, "key revoked", f"client {client.identity.name} has to leave")
            lose_client(state, client, now_ms)
        else:
            client.link.identity = identity
    for worker in list(state.registry.workers.values()):
        identity = identities.get(worker.link.user)
        if identity is None or not (identity.may_serve and identity.may_be_called(worker.name)):
            state.to_worker(worker, m.Problem(REVOKED))
            lose_worker(state, worker, Loss.REVOKED, now_ms)
        else:
            worker.link.identity = identity


def welcome_to(
    state: State, port: int, topic: bytes, lease_ms: int, versions: tuple[int, int], idle_ms: int = 0
) -> m.Welcome:
    return m.Welcome(
        session=state.random_bytes(limits.SESSION_ID_BYTES),
        token_port=port,
        topic=topic,
        version=min(m.VERSIONS[1], versions[1]),
        broker=state.config.name,
        heartbeat_ms=state.config.timing.heartbeat_ms,
        lease_ms=lease_ms,
        pull=state.access.identities is not None,
        idle_ms=idle_ms,
    )


def crowded(state: State) -> ErrorInfo | None:
    """Why there is no room for another peer: it would need descriptors, and libzmq is silent when there are none."""
    if not (limit := state.measured.load.crowded):
        return None
    text = f"most of the {limit} descriptors that this broker may have are in use"
    return ErrorInfo(Code.BUSY, text, 1_000, "raise its limit (ulimit -Hn, or LimitNOFILE= of its unit)")


def version_problem(versions: tuple[int, int]) -> ErrorInfo | None:
    low, high = m.VERSIONS
    if versions[0] <= high and versions[1] >= low:
        return None
    text = f"protocol {versions[0]} to {versions[1]} is spoken there, {low} to {high} here"
    return ErrorInfo(Code.BAD_VERSION, text)


def say_goodbye(state: State, reason: str) -> None:
    """So that no peer has to wait for a lease to find out that this broker is gone."""
    for worker in state.registry.workers.values():
        state.to_worker(worker, m.Goodbye(reason))
    for client in state.registry.clients.values():
        state.to_client(client, m.Goodbye(reason))
