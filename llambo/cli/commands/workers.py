"""`llambo workers`: who does the work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llambo.cli.kit.ask import ask
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.tables import Row, duration, number, show_json, table

if TYPE_CHECKING:
    from llambo.mesh.wire.reports import WorkerRow

EXAMPLES = """
llambo workers
llambo workers | awk '$2 != "ready"'
llambo workers --json | jq -r '.[].worker'
"""

COLUMNS = ("worker", "state", "models", "busy", "tokens/s", "done", "heard", "up", "host", "pid", "note")
#: What a narrow terminal does without.
SPARE = ("pid", "host", "up", "done", "heard", "note")


@click.command(cls=Command, examples=EXAMPLES)
@json_option
@client_options
@pass_common
def workers(common: Common, as_json: bool) -> None:
    """List the workers. A narrow terminal has no room for every column; a pipe and --json have.

    \b
    ready      takes work
    loading    its engine loads the model; the note says how far it is
    joining    its token plane has not been proved yet
    slow       much slower than its peers: finishes what it runs, gets nothing new
    trial      was slow: one request at a time until its pace is known
    mending    its token plane is down; it works, served by replay
    draining   finishes what it runs and takes nothing new
    drained    runs nothing, and takes nothing new

    `3+2/8` busy: of 8 slots 3 are taken by requests of this broker and 2 by those of others (or by requests whose
    broker is gone, until one takes them over).
    """
    if as_json:
        show_json(ask(common, lambda client: client.query("workers")))
    else:
        rows = [_row(worker) for worker in ask(common, lambda client: client.workers())]
        nothing = "no worker has joined: start one with `llambo-worker` or `llambo up`"
        table(COLUMNS, rows, nothing=nothing, fixed=2, spare=SPARE)


def _row(worker: WorkerRow) -> Row:
    restarts = worker.engine_restarts
    slow = f"slow: {worker.slow}" if worker.slow else ""
    notes = [worker.node_class, slow, worker.note, f"engine restarted {restarts} times" if restarts else ""]
    elsewhere = f"+{worker.busy_elsewhere}" if worker.busy_elsewhere else ""
    return (
        worker.worker,
        worker.state,
        ",".join(worker.models),
        number(f"{worker.busy}{elsewhere}/{worker.slots}"),
        number(worker.tokens_per_s),
        number(worker.done),
        number(duration(worker.heard_ms), " ago"),
        duration(worker.up_ms),
        worker.host,
        number(worker.pid),
        ", ".join(filter(None, notes)),
    )
