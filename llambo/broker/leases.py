"""Leases: that of several who could do something, one does it. For orchestrators of fleets, of which two would quarrel.

Whoever has one asks again before it is over. A broker that has just begun knows of none: for the length of the
longest one it gives leases only to who says that he has it. Brokers share nothing, so where there are several the one
who wants to be alone asks each of them.
"""

from __future__ import annotations

import msgspec

from llambo.broker.actions import ToClient
from llambo.broker.records.registry import ClientEntry
from llambo.broker.records.state import Lease, State
from llambo.broker.report import queries
from llambo.broker.requests import admission
from llambo.mesh.wire import limits, reports
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo


def asked(state: State, client: ClientEntry, said: m.Lease, now_ms: int) -> None:
    expire(state, now_ms)
    there = state.leases.get(said.name)
    if there is None and len(state.leases) >= limits.LEASES:
        text = f"{limits.LEASES} leases are given already"
        problem = m.Problem(ErrorInfo(Code.BUSY, text, limits.LEASE_MS), b"", said.query)
        state.out.append(ToClient(client.route, client.session, problem))
        return
    mine = there is not None and there.holder == said.holder
    young = state.started_at < 0 or now_ms - state.started_at < limits.LEASE_MS
    granted = mine or (there is None and (said.renewal or not young))
    if granted:
        _grant(state, client, said, there, now_ms)
    now = state.leases.get(said.name)
    answer = reports.LeaseReply(
        granted=granted and bool(said.ms),
        by=now.by if now is not None else "",
        left_ms=now.until - now_ms if now is not None else 0,
    )
    queries.send(state, client, said.query, msgspec.msgpack.encode(answer))


def _grant(state: State, client: ClientEntry, said: m.Lease, there: Lease | None, now_ms: int) -> None:
    # A question is asked again until it is answered; what it tells is told once.
    seen = (client.session, said.query)
    if there is None or there.seen != seen:
        for text in said.events:
            state.happened(now_ms, said.name, text)
    by = client.hello.name or "somebody"
    if not said.ms:
        if state.leases.pop(said.name, None) is not None:
            state.happened(now_ms, "lease", f"{said.name}: {by} gives it back")
        return
    if there is None:
        state.happened(now_ms, "lease", f"{said.name}: {by} has it")
    state.leases[said.name] = Lease(said.holder, by, now_ms + said.ms, frozenset(said.promised), seen)
    new = [model for model in said.promised if model not in state.models]
    for model in new:
        state.models[model] = max(1, now_ms)
    if new:
        admission.ask_again(state, now_ms)


def expire(state: State, now_ms: int) -> None:
    for name, lease in list(state.leases.items()):
        if now_ms >= lease.until:
            del state.leases[name]
            state.happened(now_ms, "lease", f"{name}: {lease.by} has it no more", warning=True)
