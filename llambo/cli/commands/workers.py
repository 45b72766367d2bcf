"""`llambo workers`, and `llambo drain`, for before a host is rebooted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
import msgspec

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, ask, query, rows_of
from llambo.cli.kit.failure import Exit
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.progress import Progress
from llambo.cli.kit.tables import (
    Row,
    busy_text,
    duration,
    number,
    show_json,
    table,
    variants_of,
    warn_of_variants,
    worker_note,
)
from llambo.mesh.wire.reports import DrainReply, WorkerRow

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client
WORKERS_EXAMPLES = """
llambo workers
llambo workers | awk '$2 != "ready"'
llambo workers --json | jq -r '.[].worker'
"""
DRAIN_EXAMPLES = """
llambo drain tiny-01            ends when it runs nothing
llambo drain tiny-01 --move     what it runs goes on elsewhere at once
llambo drain tiny-01 --no-wait  without waiting for that
llambo drain tiny-01 --undo     let it work again
"""

COLUMNS = ("worker", "state", "models", "busy", "tokens/s", "done", "heard", "up", "host", "pid", "note")
#: Columns that a narrow terminal leaves out.
SPARE = ("pid", "host", "up", "done", "heard", "note")

#: How often the broker is asked how many are left.
ASK_S = 0.2
#: A worker that was not there for so long has left. After a restart of its broker it takes a moment to be listed.
GONE_S = 3.0


@click.command(cls=Command, examples=WORKERS_EXAMPLES)
@json_option
@client_options
def workers(common: Common, as_json: bool) -> None:
    """List the workers. A narrow terminal has no room for every column; a pipe and --json have.

    \b
    ready      takes work
    loading    its engine loads the model; the note says how far it is
    joining    its token plane has not been proved yet
    slow       much slower than its peers: finishes what it runs, gets nothing new
    trial      was slow: one request at a time until its pace is known
    mending    its token plane is down: tokens come by replay, no new work
    draining   finishes what it runs and takes nothing new
    drained    runs nothing, and takes nothing new

    `3+2/8` busy: of 8 slots 3 are taken by requests of this broker and 2 by those of others (or by requests whose
    broker is gone, until one takes them over).

    A line on stderr names workers that serve the same model with another file, --ctx or --kv-type: answers cannot
    move between them.
    """
    answer = query(common, "workers")
    if as_json:
        show_json(answer)
        return
    nothing = "no worker has joined: start one with `llambo-worker` or `llambo up`"
    found = rows_of(answer, list[WorkerRow])
    table(COLUMNS, [_row(row) for row in found], nothing=nothing, fixed=2, spare=SPARE)
    warn_of_variants(variants_of(found))


def _row(row: WorkerRow) -> Row:
    return (
        row.worker,
        row.state,
        ",".join(row.plain_models),
        number(busy_text(row)),
        number(row.tokens_per_s),
        number(row.done),
        number(duration(row.heard_ms), " ago"),
        duration(row.up_ms),
        row.host,
        number(row.pid),
        worker_note(row),
    )


@click.command(cls=Command, examples=DRAIN_EXAMPLES)
@click.argument("worker", metavar="WORKER")
@click.option("--move", is_flag=True, help="What it runs goes on elsewhere, as soon as there are free slots.")
@click.option("--no-wait", is_flag=True, help="Do not wait until it runs nothing.")
@click.option("--undo", is_flag=True, help="Let it work again.")
@json_option
@client_options
def drain(common: Common, worker: str, move: bool, no_wait: bool, undo: bool, as_json: bool) -> None:
    """Give WORKER no new work, and wait until it runs nothing. It stays in the mesh until it is stopped.

    With --move its requests go on at other workers with the tokens they have. What finds no free slot there runs on
    where it is until one is free. A Ctrl-C ends the waiting only.
    """
    if undo and move:
        raise click.UsageError("--undo takes back the whole drain; it does not go with --move")
    progress = Progress(hidden=as_json)

    async def work(client: Client) -> tuple[DrainReply, bool]:
        found = await client.drain(worker, undo, move=move)
        return (found, False) if no_wait or undo else await _wait_until_empty(client, found, progress)

    try:
        found, left = ask(common, work)
    except KeyboardInterrupt:
        if progress.begun:
            text = f"{worker} is still being drained; `llambo drain {worker} --undo` takes it back"
            click.echo(f"\nllambo: interrupted; {text}", err=True)
        raise
    if as_json:
        show_json(msgspec.structs.asdict(found) | ({"left": True} if left else {}))
    elif not found.draining:
        click.echo(f"{worker} works again")
    elif found.running:
        click.echo(_still(worker, found.running))
    elif left:
        click.echo(f"{worker} has left the mesh")
    else:
        click.echo(f"{worker} takes no new work and runs nothing: it can be stopped")
    if not undo and not found.draining:  # another operator has taken it back
        click.get_current_context().exit(Exit.ERROR)


async def _wait_until_empty(client: Client, found: DrainReply, progress: Progress) -> tuple[DrainReply, bool]:
    """The last state, and whether the worker has left the mesh."""
    import asyncio

    seen_at = time.monotonic()
    while found.draining and found.running:
        progress.show(_still(found.worker, found.running))
        await asyncio.sleep(ASK_S)
        listed = await client.workers(found.worker)
        if listed:
            seen_at = time.monotonic()
            draining = listed[0].state in ("draining", "drained")
            found = msgspec.structs.replace(found, running=listed[0].busy_slots, draining=draining)
        elif time.monotonic() - seen_at > GONE_S:
            progress.end()
            return msgspec.structs.replace(found, running=0), True
    progress.end()
    return found, False


def _still(worker: str, running: int) -> str:
    which = "1 request is" if running == 1 else f"{running} requests are"
    return f"{worker} takes no new work; {which} still running there"
