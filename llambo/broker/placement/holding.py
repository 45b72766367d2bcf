"""Holding a model: a client wants it to be loaded, apart from requests.

The host has the holders, because it outlives brokers, and several brokers may bring it some. A broker passes an order
on, and again until the host reports it as carried out. The name of a holder begins with the identity of its client, so
no client can give back what another one holds.
"""

from __future__ import annotations

import msgspec

from llambo.broker.placement import wishes
from llambo.broker.records.hosts import HostEntry, PendingHold
from llambo.broker.records.registry import ClientEntry
from llambo.broker.records.state import State
from llambo.broker.report import queries
from llambo.mesh.wire import limits, reports
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.identity import Identity

#: Orders that wait for a host, of all clients and of one key that is no admin's; more are refused as busy.
PENDING, PENDING_OF_ONE = 1_000, 100
#: So many of the holders that a host takes of a model may be of one key that is no admin's.
HOLDERS_OF_ONE = limits.HOLDERS_PER_MODEL // 2
#: The holder of a client without a key that names none.
NO_NAME = "anyone"
#: Between the name of a key and what its client calls the holder. No name of a key has it.
SEPARATOR = "/"


def asked(state: State, client: ClientEntry, order: m.HoldModel, blob: bytes, now_ms: int) -> None:
    error = _refusal(state, order)
    if error is not None:
        state.to_client(client, m.Problem(error, b"", order.query))
        return
    there = _hosts(state, order)
    holder = _holder(client.identity, order, there)
    error = None if order.undo else _too_many(state, client.identity, order, holder, there)
    if error is not None:
        state.to_client(client, m.Problem(error, b"", order.query))
        return
    if order.undo:
        _give_back(state, client.identity, order, holder, there, now_ms)
        answer = reports.HoldReply(model=order.model, host=order.host, state=_state(there), holder=holder)
    else:
        answer = _hold(state, client.identity, order, holder, now_ms)
    queries.send(state, client, order.query, msgspec.msgpack.encode(answer))


def _refusal(state: State, order: m.HoldModel) -> ErrorInfo | None:
    hosts = state.hosts
    if order.host and order.host not in hosts.by_name:
        known = ", ".join(sorted(hosts.by_name)[:20]) or "none"
        return ErrorInfo(Code.UNKNOWN_WORKER, f"no host is called {order.host!r}; there is: {known}")
    if order.model not in hosts.having and state.models.unserved_since.get(order.model) != 0:
        return ErrorInfo(Code.UNKNOWN_MODEL, f"no host has {order.model!r}", hint="`llambo models` lists what there is")
    if order.host and order.host not in hosts.having.get(order.model, {}):
        where = ", ".join(sorted(hosts.having.get(order.model, {}))[:20]) or "no host"
        return ErrorInfo(Code.UNKNOWN_MODEL, f"{order.host} does not have {order.model!r}; {where} has")
    if len(hosts.holds) >= PENDING:
        return ErrorInfo(Code.BUSY, f"{PENDING} orders for models wait for their hosts", 1_000)
    return None


def _too_many(
    state: State, who: Identity, order: m.HoldModel, holder: str, there: list[tuple[HostEntry, m.HostedModel]]
) -> ErrorInfo | None:
    """No key may take all that there is for holders, so that others have none."""
    if len(holder) > limits.NAME_CHARS:
        text = f"with the name of its key the holder has {len(holder)} characters; {limits.NAME_CHARS} are allowed"
        return ErrorInfo(Code.BAD_REQUEST, text)
    limited = bool(who.name) and not who.may_manage
    own = [hold for hold in state.hosts.holds if limited and hold.who.name == who.name]
    if len(own) >= PENDING_OF_ONE and not any((hold.model, hold.holder) == (order.model, holder) for hold in own):
        return ErrorInfo(Code.BUSY, f"{len(own)} orders of {who.name} wait for their hosts", 1_000)
    asked = {hold.holder for hold in state.hosts.holds if hold.model == order.model and not hold.undo}
    for host, model in there:
        holders = asked.union(model.holders)
        mine = sum(name == who.name or name.startswith(who.name + SEPARATOR) for name in holders)
        room = len(holders) < limits.HOLDERS_PER_MODEL and not (limited and mine >= HOLDERS_OF_ONE)
        if room or holder in holders:
            return None
        text = f"{model.name} on {host.name} has {len(holders)} holders" + (
            f", {mine} of them yours" if limited else ""
        )
    return ErrorInfo(Code.BUSY, f"{text}; it takes no more", 1_000, "give one back") if there else None


def _hosts(state: State, order: m.HoldModel) -> list[tuple[HostEntry, m.HostedModel]]:
    return [(host, model) for host, model in state.hosts.at(order.model) if order.host in ("", host.name)]


def _holder(who: Identity, order: m.HoldModel, there: list[tuple[HostEntry, m.HostedModel]]) -> str:
    """Empty: all of them, which only an admin may give back. An admin may also name one of another client in full."""
    if order.undo and who.may_manage and not order.holder:
        return ""
    if not who.name:
        return order.holder or NO_NAME
    full = order.holder == who.name or order.holder.startswith(who.name + SEPARATOR)  # as in a `HoldReply`
    own = order.holder if full else f"{who.name}{SEPARATOR}{order.holder}" if order.holder else who.name
    if order.undo and who.may_manage and not any(own in model.holders for _, model in there):
        return order.holder
    return own


def _hold(state: State, who: Identity, order: m.HoldModel, holder: str, now_ms: int) -> reports.HoldReply:
    hosts, ttl_ms = state.hosts, order.ttl_ms
    if not who.may_manage:
        ttl_ms = min(ttl_ms or limits.HOLD_MS, limits.HOLD_MS)
    loaded = any(model.state in ("ready", "loading") for _, model in hosts.at(order.model))
    if not order.host and not loaded and state.models.unserved_since.get(order.model) == 0:
        note = "workers without a host serve it: it is always loaded"
        return reports.HoldReply(model=order.model, state="ready", holder=holder, ttl_ms=ttl_ms, note=note)
    _forget(state, order, holder)
    held = next((host.name for host, model in _hosts(state, order) if holder in model.holders), order.host)
    hold = PendingHold(order.model, holder, now_ms, who, ttl_ms, order.pin, host=held, named=bool(order.host))
    hosts.holds.append(hold)
    if hold.host:
        wishes.send_hold(state, hold)
    wishes.reconsider(state, now_ms)
    note = hosts.note(order.model)
    if hold not in hosts.holds:
        note = wishes.error_of(state, order.model, now_ms).text
    model = hosts.by_name[hold.host].models[hosts.having[order.model][hold.host]] if hold.host else None
    return reports.HoldReply(
        model=order.model,
        host=hold.host,
        state=model.state if model is not None else "failed" if hold not in hosts.holds else "stored",
        percent=model.percent if model is not None else 0,
        holder=holder,
        ttl_ms=ttl_ms,
        note=model.note if model is not None and model.state == "failed" else note,
    )


def _give_back(
    state: State,
    who: Identity,
    order: m.HoldModel,
    holder: str,
    there: list[tuple[HostEntry, m.HostedModel]],
    now_ms: int,
) -> None:
    sent = {hold.host for hold in _forget(state, order, holder) if hold.host}
    for host, model in there:
        if (not holder) or holder in model.holders or host.name in sent:
            hold = PendingHold(order.model, holder, now_ms, who, undo=True, host=host.name)
            state.hosts.holds.append(hold)
            wishes.send_hold(state, hold)
    state.hosts.changed = True


def _forget(state: State, order: m.HoldModel, holder: str) -> list[PendingHold]:
    """Earlier orders of this holder: the last one counts. A hold also ends an order to drop all holders."""
    earlier = [
        hold
        for hold in state.hosts.holds
        if hold.model == order.model
        and (hold.holder == holder or not holder or not (order.undo or hold.holder))
        and order.host in ("", hold.host)
    ]
    for hold in earlier:
        state.hosts.holds.remove(hold)
    return earlier


def _state(there: list[tuple[HostEntry, m.HostedModel]]) -> str:
    """The best of them."""
    states = {model.state for _, model in there}
    return next((each for each in ("ready", "loading", "unloading", "failed") if each in states), "stored")
