"""What `decide` finds, as state: wishes of hosts, what waiting requests are shown, and the end of those without hope.

Placement is decided again after an event that may change it, but not more often than every `DECIDE_MS`, and while a
model is asked for also every `AGAIN_MS`: only time shows that a model is idle. Nothing here is done for a token, and
nothing for a request unless it is the first or the last to wait in its lane.

A wish is not an event that could be lost. It is sent when it changes, and again with each heartbeat of its host until
the host reports the model as loading, or no request waits for it any more.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from llambo.broker.placement.decide import Asked, Decision, HostView, could_have, decide
from llambo.broker.records.hosts import HostEntry, ModelUse, PendingHold, Wait, Wishes
from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.request import Request
from llambo.broker.records.state import State
from llambo.broker.requests import ending, same_model
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.timers import NEVER_MS

DECIDE_MS = 20
AGAIN_MS = 100
#: A model that has waited for so long may have the memory of models that are in use: their workers get no new requests
#: for three of four such times, until they are idle. In the fourth they get some: another broker may not let them rest.
TURN_MS = 10_000
TURNS = 4
MIB = 2**20


def settle(state: State, now_ms: int) -> None:
    """After every event, while a host is connected or a request waits for one."""
    hosts, wakeups = state.hosts, state.wakeups
    if now_ms < wakeups.placement_at and not hosts.changed and not state.queue.turned:
        return
    if now_ms < hosts.decided_at + DECIDE_MS:
        wakeups.placement_at = hosts.decided_at + DECIDE_MS
        return
    reconsider(state, now_ms)


def reconsider(state: State, now_ms: int) -> None:
    hosts = state.hosts
    hosts.changed = state.queue.turned = False
    hosts.decided_at = now_ms
    _drop_old_holds(state, now_ms)
    asked, holds = _asked_by_requests(state, now_ms), _asked_by_holds(state)
    everything = [*asked, *holds]
    views = [_view(state, host, now_ms) for host in hosts.sessions.values()] if everything else []
    decision = decide(everything, views)
    for host in hosts.sessions.values():
        host.wishes = decision.wishes.get(host.name, Wishes())
        if host.wishes != host.sent:
            _send_wishes(state, host)
    _hold_back(state, decision)
    for each, pending in holds.items():
        for hold in pending:
            _settle_hold(state, hold, decision.places.get(each, ""), each in decision.hopeless, now_ms)
    _show(state, decision, now_ms)
    for each in asked:
        if not each.served:
            _give_up(state, each, each in decision.hopeless, now_ms)
    state.wakeups.placement_at = now_ms + AGAIN_MS if everything or hosts.holds else NEVER_MS


# --- what is asked for ---


def _asked_by_requests(state: State, now_ms: int) -> list[Asked]:
    """The models of all lanes in which requests wait although no worker could take one now."""
    hosts, found = state.hosts, dict[str, bool]()
    for lane in state.queue.lines:
        if lane.model in hosts.having and not ((pool := state.pools.get(lane)) and pool.free):
            missing = same_model.is_missing(state, lane)
            if missing and any(model.state == "ready" for _, model in hosts.at(lane.model)):
                continue  # what is loaded is another file of that name, and more copies of it would not help
            served = not missing and not state.models.unserved_since.get(lane.model, 1)
            found[lane.model] = found.get(lane.model, True) and served
    hosts.asked_since = {model: hosts.asked_since.get(model, now_ms) for model in found}
    asked = []
    for model, served in found.items():
        turns = (now_ms - hosts.asked_since[model]) // TURN_MS
        may_evict = _may_evict(state, model)
        asked.append(Asked(model, hosts.asked_since[model], served=served, due=turns % TURNS > 0, may_evict=may_evict))
    return asked


def _may_evict(state: State, model: str) -> Callable[[str], bool]:
    identities = state.access.identities
    if identities is None or not any(identity.models for identity in identities.values()):
        return lambda other: True
    askers = {request.account for request in _waiting(state, model)}
    return lambda other: any(account.who.may_use(other) for account in askers)


def _asked_by_holds(state: State) -> dict[Asked, list[PendingHold]]:
    """Orders of clients that are not confirmed, and models that are held where they are not loaded."""
    hosts, found = state.hosts, dict[Asked, list[PendingHold]]()
    for hold in hosts.holds:
        if not hold.undo and hold.model in hosts.having:
            asked = Asked(hold.model, hold.since, False, at=hold.host, may_evict=hold.who.may_use)
            found.setdefault(asked, []).append(hold)
    for host in hosts.sessions.values():
        for model in host.models.values():
            if (model.holders or model.pinned) and model.state in ("stored", "failed"):
                found.setdefault(Asked(model.name, 0, False, at=host.name, may_evict=_holders_may(state, model)), [])
    return found


def _holders_may(state: State, held: m.HostedModel) -> Callable[[str], bool]:
    identities = state.access.identities
    if identities is None or held.pinned:  # only admins pin
        return lambda other: True
    names = {holder.partition("/")[0] for holder in held.holders}
    askers = [identity for identity in identities.values() if identity.name in names]
    return lambda other: any(identity.may_use(other) for identity in askers)


def _waiting(state: State, model: str) -> chain[Request]:
    return chain.from_iterable(line for lane, line in state.queue.lines.items() if lane.model == model)


# --- what is there ---


def worker_of(state: State, host: HostEntry, model: m.HostedModel) -> WorkerEntry | None:
    """The worker of a loaded model, if it has joined. A host names only workers of its own key."""
    worker = state.registry.worker_names.get(model.worker)
    return worker if worker is not None and worker.link.user == host.link.user else None


def watch_usage(state: State, host: HostEntry, now_ms: int) -> None:
    """Which of its models were used since the last time, by this broker or by others."""
    for model in host.models.values():
        if model.state == "ready" and (worker := worker_of(state, host, model)) is not None:
            usage = host.usage.setdefault(model.name, ModelUse(now_ms))
            if worker.claims or worker.busy or worker.turn != usage.turn:
                usage.used_at, usage.turn = now_ms, worker.turn


def _view(state: State, host: HostEntry, now_ms: int) -> HostView:
    watch_usage(state, host, now_ms)
    names = {name: model for model in host.models.values() for name in host.names_of(model)}
    view = HostView(host.name, names, host.memory, wished=frozenset(host.wishes.load))
    view.failed = frozenset(name for name, usage in host.usage.items() if usage.retry_at > now_ms)
    in_use = []
    for model in host.models.values():
        if model.state == "ready":
            worker = worker_of(state, host, model)
            if worker is None or worker.claims or worker.busy:  # not joined: another broker may use it
                in_use.append(model.name)
            else:
                view.idle_since[model.name] = host.usage[model.name].used_at
    view.in_use = frozenset(in_use)
    return view


# --- wishes ---


def _send_wishes(state: State, host: HostEntry) -> None:
    if host.backlog.full:
        return  # it does not read; its next heartbeat shows when it does
    host.beats.seq += 1
    host.sent, host.sent_seq, host.sent_route = host.wishes, host.beats.seq, host.link.route
    state.to_host(host, m.PlaceModels(host.beats.seq, list(host.wishes.load), list(host.wishes.evict)))


def confirmed(state: State, host: HostEntry, seq: int) -> None:
    """A heartbeat of it: it has read everything up to `seq`. What it does not report yet is sent again."""
    moved = host.sent_route not in (b"", host.link.route)
    read = seq >= host.sent_seq or moved
    unmet = any(host.models[name].state not in ("loading", "ready") for name in host.wishes.load if name in host.models)
    if host.wishes != host.sent or moved or (unmet and read):
        _send_wishes(state, host)
    for hold in [hold for hold in state.hosts.holds if hold.host == host.name and seq >= hold.seq]:
        if _is_done(state, host, hold):
            state.hosts.holds.remove(hold)
        else:
            send_hold(state, hold)


def send_hold(state: State, hold: PendingHold) -> None:
    host = state.hosts.by_name.get(hold.host)
    name = state.hosts.having.get(hold.model, {}).get(hold.host)
    if host is None or name is None or host.backlog.full:
        return
    host.beats.seq += 1
    hold.seq = host.beats.seq
    state.to_host(host, m.Hold(hold.seq, name, hold.holder, hold.ttl_ms, hold.pin, hold.undo))


def _settle_hold(state: State, hold: PendingHold, place: str, hopeless: bool, now_ms: int) -> None:
    """Now it is known which host it is for; or that there is none."""
    if hold.host:
        return
    if place:
        hold.host = place
        send_hold(state, hold)
    elif hopeless:
        state.hosts.holds.remove(hold)
        if hold.since < now_ms:  # otherwise the answer says so
            state.journal.add(now_ms, "model not held", error_of(state, hold.model, now_ms).text, warning=True)


def _is_done(state: State, host: HostEntry, hold: PendingHold) -> bool:
    name = state.hosts.having.get(hold.model, {}).get(host.name)
    if name is None:
        return True  # it has no such model any more
    model = host.models[name]
    if not hold.undo and hold.holder not in model.holders:
        return len(model.holders) >= limits.HOLDERS_PER_MODEL  # it takes no more
    if not hold.undo:
        return hold.seq > 0 and (model.pinned or not hold.pin)
    if hold.holder:
        return hold.holder not in model.holders
    return not model.holders and not model.pinned and model.state not in ("ready", "loading")


def _drop_old_holds(state: State, now_ms: int) -> None:
    """No host has carried them out in time, or the one they are for is gone."""
    hosts, longest_ms = state.hosts, state.config.bounds.queue_ms
    for hold in list(hosts.holds):
        if hold.host not in hosts.by_name and not hold.undo and not hold.named:
            hold.host, hold.seq = "", 0
        if now_ms - hold.since >= min(hold.ttl_ms or longest_ms, longest_ms) or (
            hold.undo and hold.host not in hosts.by_name
        ):
            hosts.holds.remove(hold)


def _hold_back(state: State, decision: Decision) -> None:
    """Workers of models that are to make room get no new requests; others that had to, do again."""
    hosts, found = state.hosts, dict[bytes, WorkerEntry]()
    for name, models in decision.yields.items():
        host = hosts.by_name[name]
        for model in models:
            if (worker := worker_of(state, host, host.models[model])) is not None:
                found[worker.session] = worker
    for session, worker in hosts.yielding.items():
        if session not in found and state.registry.workers.get(session) is worker:
            worker.yields = worker.refusing = False
            state.pools.touch(worker)
    for session, worker in found.items():
        if session not in hosts.yielding:
            worker.yields = worker.refusing = True
            state.pools.refresh(worker)
    hosts.yielding = found


# --- what waiting requests are shown, and how they end ---


def _show(state: State, decision: Decision, now_ms: int) -> None:
    before, state.hosts.waits = state.hosts.waits, decision.waits
    for model, wait in decision.waits.items():
        if before.get(model, Wait("")).text != wait.text:
            for request in _waiting(state, model):
                request.note(now_ms, "waits", wait.text)


def _give_up(state: State, asked: Asked, hopeless: bool, now_ms: int) -> None:
    """End the requests that no host can serve: none may try now, or each has failed since the request came."""
    able = [(host, model) for host, model in state.hosts.at(asked.name) if could_have(model, host.memory)]
    since = min((host.usage[model.name].failed_at for host, model in able), default=0)
    if not hopeless and not since:
        return
    error = error_of(state, asked.name, now_ms)
    for request in list(_waiting(state, asked.name)):
        if hopeless or request.place.queued_at <= since:
            ending.finish(state, request, "error", now_ms, error)


def error_of(state: State, model: str, now_ms: int) -> ErrorInfo:
    """Why no host can load it, and when the next one tries."""
    reasons, retries = [], []
    for host, there in state.hosts.at(model):
        reasons.append(f"on {host.name}: {_reason(host, there)}")
        retry_at = host.usage[there.name].retry_at if there.name in host.usage else 0
        if now_ms < retry_at < NEVER_MS:
            retries.append(retry_at - now_ms)
    text = f"{model!r} could not be loaded {'; '.join(sorted(reasons)[:4])}"
    if retries:
        text += f"; the next try is in {max(1, round(min(retries) / 1_000))} s"
    hint = "`llambo models` shows why each host cannot load it; the log of the host has more"
    return ErrorInfo(Code.ENGINE_FAILED, text[:1_000], min(retries, default=0), hint)


def _reason(host: HostEntry, model: m.HostedModel) -> str:
    if model.note:
        return model.note
    if not could_have(model, host.memory):
        name, amount = next(
            (name, amount)
            for name, amount in model.needs.items()
            if name not in host.memory or amount > host.memory[name].bytes
        )
        budget = host.memory[name].bytes if name in host.memory else 0
        return f"it needs {amount // MIB} MiB of {name}, and the budget is {budget // MIB} MiB"
    return "the load failed"
