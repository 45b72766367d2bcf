"""`llambo top`: the mesh, live."""

from __future__ import annotations

import asyncio
import importlib.util
import sys

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, connect
from llambo.cli.kit.failure import Exit, Failure, missing
from llambo.cli.kit.flags import Duration, client_options, settings_options

EXAMPLES = """
llambo top
llambo top --every 2s
llambo --broker tcp://box:7330 top
"""


@click.command(cls=Command, examples=EXAMPLES)
@click.option(
    "--every",
    "every_ms",
    type=Duration(),
    default="500ms",
    show_default=True,
    help="Refresh at this interval.",
)
@settings_options(["connect_ms"])
@client_options
def top(common: Common, every_ms: int) -> None:
    """Watch workers, requests, queue and throughput, and drain or cancel with a key.

    \b
    1 2 3, Tab   workers, requests, events
    w, Enter     the story of a request       c   cancel it
    d            drain a worker               u   let it work again
    s, r         sort by the next column, reverse the order
    /, Esc       show only rows with these words; show all
    p            pause
    ?, q         all keys; leave

    Under the curves is a line for each host that loads models on demand: its memory, and what is in it.

    A key that changes something asks first. Needs the extra `top`.
    """
    if importlib.util.find_spec("textual") is None:
        raise missing("Textual, which llambo top needs,", "top")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Failure("llambo top needs a terminal", "`llambo status` and `llambo workers` write to pipes", Exit.USAGE)
    asyncio.run(_run(common, every_ms))


async def _run(common: Common, every_ms: int) -> None:
    from llambo.cli.top.top_app import Top

    # Connecting comes first, so that its errors are printed as those of any command.
    async with connect(common) as client:
        app = Top(client, every_s=every_ms / 1_000)
        await app.run_async()
        if app.failure is not None:
            raise app.failure
