"""`llambo status`: the mesh in numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from llambo.cli.commands.models import show_models
from llambo.cli.kit.ask import address_of, ask, key_of
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.tables import facts, number, show_json, size, table

if TYPE_CHECKING:
    from llambo.mesh.wire.reports import AccountRow, MeshStatus

EXAMPLES = """
llambo status
llambo status --json | jq .running
"""

IDENTITY_COLUMNS = ("identity", "in flight", "queued", "bytes", "submitted", "tokens", "refused")
#: Of the workers that are loading, so many have their percent shown.
SHOWN = 4


@click.command(cls=Command, examples=EXAMPLES)
@json_option
@client_options
@pass_common
def status(common: Common, as_json: bool) -> None:
    """Show the mesh in numbers: workers, slots, queue, speed, models, and what each identity has of that.

    Of several brokers any will do for workers, slots and speed. Clients, requests and the counters are those of
    the broker that is asked; `--broker` says which. With keys an admin sees all identities, everybody else his own.
    """
    if as_json:
        show_json(ask(common, lambda client: client.query("status")))
        return
    found = ask(common, lambda client: client.status())
    facts(mesh_facts(found, address_of(common.settings, key_of(common.settings))))
    if found.models:
        click.echo()
        show_models(found.models)
    if found.identities:
        click.echo()
        show_identities(found.identities)


def show_identities(found: list[AccountRow]) -> None:
    """What each has here, of what it may have."""
    rows = [
        (
            row.identity,
            _of(row.in_flight, row.max_in_flight, str),
            _of(row.queued, row.max_queued, str),
            _of(row.bytes, row.max_bytes, size),
            number(row.submitted),
            number(row.tokens),
            _refused(row.refused_for),
        )
        for row in found
    ]
    table(IDENTITY_COLUMNS, rows, nothing="")


def _of(value: int, limit: int, shown: Callable[[int], str]) -> str:
    return f"{shown(value)}/{shown(limit)}" if limit else shown(value)


def _refused(reasons: dict[str, int]) -> str:
    listed = ", ".join(f"{reasons[reason]} {reason}" for reason in sorted(reasons))
    return f"{sum(reasons.values())}: {listed}" if listed else "0"


def mesh_facts(found: MeshStatus, address: str) -> list[tuple[str, Any]]:
    counters = found.counters
    return [
        ("broker", f"{found.broker} at {address}"),
        ("workers", f"{_ready(found)}, {_busy(found)}"),
        ("clients", found.clients),
        ("requests", f"{found.running} running, {found.waiting} waiting ({size(found.waiting_bytes)})"),
        ("speed", f"{found.tokens_per_s} tokens/s, {found.requests_per_s} requests/s"),
        ("memory", f"{size(found.transcript_bytes)} of tokens, {size(found.detached_bytes)} of detached results"),
        ("so far", ", ".join(f"{counters[name]} {name}" for name in ("submitted", "ended", "failed", "moved", "refused")
                             if name in counters)),
        ("policy", found.policy),
    ]  # fmt: skip


def _busy(found: MeshStatus) -> str:
    """Of all slots; this broker knows of those that others have given away no more than their number."""
    others = f" ({found.busy_elsewhere} through other brokers)" if found.busy_elsewhere else ""
    return f"{found.busy_slots} of {found.slots} slots busy{others}"


def _ready(found: MeshStatus) -> str:
    """How many, and how far those are that load their model."""
    loading = [f"{percent} %" for percent in sorted(found.loading.values(), reverse=True)]
    more = ", ..." if len(loading) > SHOWN else ""
    note = f", loading {', '.join(loading[:SHOWN])}{more}" if loading else ""
    slow = f", slow: {', '.join(found.slow[:SHOWN])}" if found.slow else ""
    return f"{found.ready} ready of {found.workers}{note}{slow}"
