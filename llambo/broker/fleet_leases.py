"""Leases: of several processes that could do something, one does it. For orchestrators of fleets, which would otherwise
work against each other.

The holder renews its lease before it is over. A broker that was restarted knows of none: for the length of the longest
one it grants leases only to a client that says it is the holder. Brokers share nothing, so where there are several, a
process that wants to be alone asks each of them.
"""

from __future__ import annotations

import msgspec

from llambo.broker.records.registry import ClientEntry, HeldLease
from llambo.broker.records.state import State
from llambo.broker.report import queries
from llambo.broker.requests import admission
from llambo.mesh.wire import limits, reports
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo


def asked(state: State, client: ClientEntry, lease: m.Lease, blob: bytes, now_ms: int) -> None:
    expire(state, now_ms)
    leases, started_at = state.registry.leases, state.wakeups.started_at
    there = leases.get(lease.name)
    if there is None and len(leases) >= limits.LEASES:
        error = ErrorInfo(Code.BUSY, f"{limits.LEASES} leases are given already", limits.LEASE_MS)
        state.to_client(client, m.Problem(error, b"", lease.query))
        return
    renewed = there is not None and there.holder == lease.holder
    restarted = started_at < 0 or now_ms - started_at < limits.LEASE_MS
    granted = renewed or (there is None and (lease.renewal or not restarted))
    if granted:
        _grant(state, client, lease, there, now_ms)
    now = leases.get(lease.name)
    answer = reports.LeaseReply(
        granted=granted and bool(lease.ms),
        by=now.holder_name if now is not None else "",
        left_ms=now.until - now_ms if now is not None else 0,
    )
    queries.send(state, client, lease.query, msgspec.msgpack.encode(answer))


def _grant(state: State, client: ClientEntry, lease: m.Lease, there: HeldLease | None, now_ms: int) -> None:
    leases, journal = state.registry.leases, state.journal
    # A question is asked again until it is answered; its events are entered once.
    answered = (client.session, lease.query)
    if there is None or there.answered != answered:
        for text in lease.events:
            journal.add(now_ms, lease.name, text)
    name = client.hello.name or "somebody"
    if not lease.ms:
        if leases.pop(lease.name, None) is not None:
            journal.add(now_ms, "lease", f"{lease.name}: {name} gives it back")
        return
    if there is None:
        journal.add(now_ms, "lease", f"{lease.name}: {name} has it")
    leases[lease.name] = HeldLease(lease.holder, name, now_ms + lease.ms, frozenset(lease.promised), answered)
    known = state.models.unserved_since
    state.models.claimed.difference_update(lease.promised)
    new = [model for model in lease.promised if model not in known]
    for model in new:
        known[model] = max(1, now_ms)
    if new:
        admission.retry_deferred(state, now_ms)


def expire(state: State, now_ms: int) -> None:
    for name, lease in list(state.registry.leases.items()):
        if now_ms >= lease.until:
            del state.registry.leases[name]
            state.journal.add(now_ms, "lease", f"{name}: {lease.holder_name} has it no more", warning=True)
        else:
            _renew_wait(state, lease, now_ms)


def _renew_wait(state: State, lease: HeldLease, now_ms: int) -> None:
    """If the promise ends, the wait for these models begins then: another orchestrator may be about to renew it."""
    known = state.models.unserved_since
    for model in lease.promised:
        if known.get(model):
            known[model] = now_ms
