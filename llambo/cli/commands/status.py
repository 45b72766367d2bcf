"""`llambo status`, `events`, `metrics`: what the mesh reports about itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click

from llambo.cli.commands.models import show_models
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, ask, query, rows_of, where
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.tables import duration, facts, number, show_json, size, table
from llambo.mesh.wire.reports import AccountRow, EventRow, MeshStatus

STATUS_EXAMPLES = """
llambo status
llambo status --json | jq .running
"""
EVENTS_EXAMPLES = """
llambo events
llambo events --since 17
llambo events --json | jq -r '.[] | select(.kind == "worker lost") | .text'
"""
METRICS_EXAMPLES = """
llambo metrics
llambo metrics | grep queue_seconds
llambo metrics > /var/lib/node_exporter/llambo.prom   from a file
"""

IDENTITY_COLUMNS = ("identity", "in flight", "queued", "bytes", "submitted", "tokens", "refused")
SHOWN_COUNTERS = ("submitted", "ended", "failed", "moved", "refused")
#: Of the workers that are loading, so many have their percent shown.
SHOWN = 4


@click.command(cls=Command, examples=STATUS_EXAMPLES)
@json_option
@client_options
def status(common: Common, as_json: bool) -> None:
    """Show the mesh in numbers: workers, slots, queue, speed, models, and what each identity has of that.

    Of several brokers any will do for workers, slots and speed. Clients, requests and the counters are those of
    the broker that is asked; `--broker` says which. With keys an admin sees all identities, and others see their own.
    """
    answer = query(common, "status")
    if as_json:
        show_json(answer)
        return
    found = rows_of(answer, MeshStatus)
    facts(mesh_facts(found, where(common)[0]))
    if found.models:
        click.echo()
        show_models(found.models)
    if found.identities:
        click.echo()
        show_identities(found.identities)


def show_identities(found: Sequence[AccountRow]) -> None:
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
    table(IDENTITY_COLUMNS, rows)


def _of(value: int, limit: int, shown: Callable[[int], str]) -> str:
    return f"{shown(value)}/{shown(limit)}" if limit else shown(value)


def _refused(reasons: dict[str, int]) -> str:
    listed = ", ".join(f"{reasons[reason]} {reason}" for reason in sorted(reasons))
    return f"{sum(reasons.values())}: {listed}" if listed else "0"


def mesh_facts(found: MeshStatus, address: str) -> list[tuple[str, object]]:
    counters = found.counters
    return [
        ("broker", f"{found.broker} at {address}"),
        ("workers", f"{_ready(found)}, {_busy(found)}"),
        ("clients", found.clients),
        ("requests", f"{found.running} running, {found.waiting} waiting ({size(found.waiting_bytes)})"),
        ("speed", f"{found.tokens_per_s} tokens/s, {found.requests_per_s} requests/s"),
        ("memory", f"{size(found.transcript_bytes)} of tokens, {size(found.detached_bytes)} of detached results"),
        ("so far", ", ".join(f"{counters[name]} {name}" for name in SHOWN_COUNTERS if name in counters)),
        ("policy", found.policy),
    ]


def _busy(found: MeshStatus) -> str:
    """Of all slots; this broker knows only the number of those that other brokers have filled."""
    others = f" ({found.busy_elsewhere} through other brokers)" if found.busy_elsewhere else ""
    return f"{found.busy_slots} of {found.slots} slots busy{others}"


def _ready(found: MeshStatus) -> str:
    """How many, and how far those are that load their model."""
    loading = [f"{percent} %" for percent in sorted(found.loading.values(), reverse=True)]
    more = ", ..." if len(loading) > SHOWN else ""
    note = f", loading {', '.join(loading[:SHOWN])}{more}" if loading else ""
    slow = f", slow: {', '.join(found.slow[:SHOWN])}" if found.slow else ""
    return f"{found.ready} ready of {found.workers}{note}{slow}"


@click.command(cls=Command, examples=EVENTS_EXAMPLES)
@click.option("--since", type=click.IntRange(min=0), default=0, metavar="NUMBER", help="Only what came after this one.")
@json_option
@client_options
def events(common: Common, since: int, as_json: bool) -> None:
    """Show what happened in the mesh: workers that joined or were lost, engines that died. The latest comes last."""
    answer = query(common, "events", str(since))
    if as_json:
        show_json(answer)
        return
    rows = [
        (number(event.number), number(duration(event.age_ms), " ago"), event.kind, event.text)
        for event in rows_of(answer, list[EventRow])
        if event.matters
    ]
    table(["number", "when", "what", "detail"], rows, nothing="nothing has happened" + (" since" if since else ""))


@click.command(cls=Command, examples=METRICS_EXAMPLES)
@client_options
def metrics(common: Common) -> None:
    """Print the broker's metrics as Prometheus reads them.

    With keys that takes an admin's. `llambo-broker --metrics` serves the same over HTTP; docs/metrics.md explains
    each of them.
    """
    click.echo(ask(common, lambda client: client.metrics()), nl=False)
