"""Sessions of hosts, on the control port of workers: joining, reports of what they have, leaving.

They go by the rules of workers for keys, names, leases and goodbyes. The worker of each loaded model has a session of
its own, so a host that is lost takes none with it, and a worker that is lost leaves its host.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count

from llambo.broker.events import ToWorker
from llambo.broker.placement import files, wishes
from llambo.broker.records.backlog import Backlog
from llambo.broker.records.hosts import HostEntry, ModelUse
from llambo.broker.records.registry import Session
from llambo.broker.records.state import State
from llambo.broker.requests import admission
from llambo.broker.workers import membership
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.codec import NO_SESSION
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.identity import Identity
from llambo.mesh.wire.timers import NEVER_MS

#: Hosts at a time; more are refused as busy.
HOST_SESSIONS = 2_000
#: A load that a host tries again this soon has not failed yet. One whose next try is put off by more has failed again.
SOON_MS = 500


def joined(state: State, route: bytes, hello: m.HostHello, user: str, now_ms: int) -> None:
    """The newest session of a process replaces its older one. The name of another process that is alive is taken."""
    identity = state.access.identity(user)
    there = state.hosts.by_name.get(hello.name)
    problem = _refusal(state, hello, identity)
    if there is not None and problem is None:
        same = there.hello.incarnation == hello.incarnation and there.link.user == user
        if same and there.link.route == route:
            state.out.append(ToWorker(route, NO_SESSION, there.link.welcome))
            return
        if not same and _is_alive(state, there, now_ms):
            free = next(name for n in count(2) if (name := f"{hello.name}-{n}") not in state.hosts.by_name)
            text = f"the name {hello.name!r} is taken by a host on {there.hello.host or 'another machine'}"
            problem = ErrorInfo(Code.NAME_TAKEN, f"{text}; start this one with --name {free}")
    if problem is not None:
        state.counters.peers.problems += 1
        state.out.append(ToWorker(route, NO_SESSION, m.Problem(problem)))
        return
    assert identity is not None, "refused above"
    if there is not None:
        _lose(state, there, "said hello again", now_ms)
    config = state.config
    welcome = membership.welcome_to(state, config.tokens_in_port, b"", config.timing.lease_ms, hello.versions)
    session = Session(route, welcome, now_ms, now_ms, user, identity)
    state.hosts.add(HostEntry(hello, session, Backlog(config.bounds.backlog_bytes)))
    state.journal.add(now_ms, "host joined", f"{hello.name} on {hello.host}")
    state.out.append(ToWorker(route, NO_SESSION, welcome))


def _refusal(state: State, hello: m.HostHello, identity: Identity | None) -> ErrorInfo | None:
    if identity is None or not identity.may_serve:
        return ErrorInfo(Code.UNAUTHORIZED, "this key is not one of a worker")
    if not identity.may_be_called(hello.name):
        own = identity.name
        return ErrorInfo(Code.FORBIDDEN, f"the key {own!r} is for hosts called {own!r} or {own + '-...'!r}")
    if hello.name not in state.hosts.by_name and len(state.hosts.sessions) >= HOST_SESSIONS:
        return ErrorInfo(Code.BUSY, f"{HOST_SESSIONS} hosts are connected", 1_000)
    if hello.name not in state.hosts.by_name and (crowded := membership.crowded(state)) is not None:
        return crowded
    return membership.version_problem(hello.versions)


def _is_alive(state: State, host: HostEntry, now_ms: int) -> bool:
    return not host.link.route_gone_at and now_ms - host.link.heard_at < 3 * state.config.timing.heartbeat_ms


# --- reports ---


def reported(state: State, host: HostEntry, beat: m.HostHeartbeat, blob: bytes, now_ms: int) -> None:
    """What it has now; or, in a heartbeat without it, that it is alive and has read what was sent to it."""
    if beat.seq >= host.sent_seq:
        host.backlog.bytes = 0
    if beat.models or beat.memory:
        _take(state, host, beat, now_ms)
        files.reported(state, host, beat.files, now_ms)
    if any(host.files_sent):
        files.tell(state, host)
    wishes.confirmed(state, host, beat.seq)


def _take(state: State, host: HostEntry, beat: m.HostHeartbeat, now_ms: int) -> None:
    before, host.models = host.models, {model.name: model for model in beat.models}
    host.memory, host.revision = beat.memory, beat.revision
    for model in beat.models:
        _note_change(state, host, before.get(model.name), model, now_ms)
    for name in before.keys() - host.models.keys():
        host.usage.pop(name, None)
    if _names(before) != _names(host.models):
        index_models(state, now_ms)
        admission.retry_deferred(state, now_ms)
    state.hosts.changed = True


def _names(models: Mapping[str, m.HostedModel]) -> dict[str, list[str]]:
    return {name: model.adapters for name, model in models.items()}


def _note_change(
    state: State, host: HostEntry, before: m.HostedModel | None, model: m.HostedModel, now_ms: int
) -> None:
    usage = host.usage.setdefault(model.name, ModelUse())
    was = before.state if before is not None else ""
    if model.state == "failed" and not 0 < model.retry_ms < SOON_MS:
        retry_at = now_ms + model.retry_ms if model.retry_ms else NEVER_MS
        same = before is not None and (before.state, before.note) == ("failed", model.note)
        if not same or retry_at > usage.retry_at + SOON_MS:
            usage.failed_at, usage.retry_at = now_ms, retry_at
            text = f"{model.name} on {host.name}: {model.note}"
            state.journal.add(now_ms, "model failed", text, warning=True, worker=model.worker)
            state.measured.meter.load_failed(model.name)
    elif model.state == was:
        return
    elif model.state == "ready":
        usage.used_at, usage.failed_at, usage.retry_at = now_ms, 0, 0
        for name in host.names_of(model):
            if state.models.unserved_since.get(name):  # the wait for its worker begins now
                state.models.unserved_since[name] = now_ms
        if was:
            text = f"{model.name} on {host.name}" + (f", in {model.load_ms / 1_000:.1f} s" if model.load_ms else "")
            state.journal.add(now_ms, "model loaded", text, worker=model.worker)
            state.measured.meter.model_loaded(model.name, model.load_ms)
    elif model.state == "stored" and was in ("ready", "unloading"):
        state.journal.add(now_ms, "model unloaded", f"{model.name} on {host.name}")
        state.measured.meter.model_unloaded(model.name)


def index_models(state: State, now_ms: int) -> None:
    """Which names can be asked for. On a host of a class each model has two, as on a worker (naming.py)."""
    hosts, known = state.hosts, state.models.unserved_since
    before, hosts.having = hosts.having, {}
    for host in hosts.sessions.values():
        for model in host.models.values():
            for name in host.names_of(model):
                # A file whose own name is that of an adapter goes before it.
                if name == model.name or host.name not in hosts.having.get(name, {}):
                    hosts.having.setdefault(name, {})[host.name] = model.name
    state.models.claimed.difference_update(hosts.having)
    for name, places in hosts.having.items():
        known.setdefault(name, max(1, now_ms))
        place, stored = next(iter(places.items()))
        state.models.kinds.setdefault(name, hosts.by_name[place].models[stored].kind)
    for name in before.keys() - hosts.having.keys():
        if known.get(name):  # its requests wait for a while from now on
            known[name] = max(1, now_ms)


# --- leaving ---


def left(state: State, host: HostEntry, goodbye: m.Goodbye, blob: bytes, now_ms: int) -> None:
    _lose(state, host, f"left: {goodbye.reason or 'goodbye'}", now_ms, warning=False)


def _lose(state: State, host: HostEntry, why: str, now_ms: int, *, warning: bool = True) -> None:
    state.hosts.remove(host)
    state.journal.add(now_ms, "host lost", f"{host.name}: {why}", warning=warning)
    index_models(state, now_ms)
    state.hosts.changed = True


def route_gone(state: State, route: bytes, now_ms: int) -> None:
    sessions = state.hosts.sessions
    sessions.route_gone(route)
    host = sessions.by_route.get(route)
    if host is not None and not host.link.route_gone_at:
        host.link.route_gone_at = now_ms


def heartbeat_round(state: State, now_ms: int) -> None:
    timing = state.config.timing
    for host in list(state.hosts.sessions.values()):
        silent_ms, gone_at = now_ms - host.link.heard_at, host.link.route_gone_at
        if silent_ms >= timing.lease_ms + membership.unread_ms(state, timing.lease_ms):
            _lose(state, host, f"silent for {silent_ms} ms", now_ms)
        elif gone_at and now_ms - gone_at >= timing.reconnect_grace_ms:
            _lose(state, host, "its connection is gone", now_ms)
        else:
            if now_ms >= host.link.due_at or now_ms <= state.wakeups.probe_until:
                host.link.due_at = now_ms + timing.heartbeat_ms
                host.beats.number += 1
                host.beats.seq += 1
                state.to_host(host, m.BrokerHeartbeat(host.beats.number, host.revision, seq=host.beats.seq))
            wishes.watch_usage(state, host, now_ms)
    files.look_again(state, now_ms)


def keys_changed(state: State, identities: Mapping[str, Identity], now_ms: int) -> None:
    """The keyring has changed. Sessions of keys that are gone end now."""
    for host in list(state.hosts.sessions.values()):
        identity = identities.get(host.link.user)
        if identity is None or not (identity.may_serve and identity.may_be_called(host.name)):
            state.to_host(host, m.Problem(membership.REVOKED))
            _lose(state, host, "its key was revoked", now_ms)
        else:
            host.link.identity = identity


def say_goodbye(state: State, reason: str) -> None:
    for host in state.hosts.sessions.values():
        state.to_host(host, m.Goodbye(reason))
