"""`llambo drain WORKER`: before a host is rebooted."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from llambo.cli.kit.ask import ask
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.exits import Exit
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.output import show_json
from llambo.cli.kit.views import CLEAR_LINE

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client

EXAMPLES = """
llambo drain tiny-01            ends when it runs nothing
llambo drain tiny-01 --move     what it runs goes on elsewhere at once
llambo drain tiny-01 --no-wait  without waiting for that
llambo drain tiny-01 --undo     let it work again
"""

#: How often the broker is asked how many are left.
ASK_S = 0.2
#: How often a count is said again where no line can be rewritten, if it has changed.
SAY_S = 5.0
#: A worker that was not there for so long has left. After a restart of its broker it takes a moment to be listed.
GONE_S = 3.0


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("worker", metavar="WORKER")
@click.option("--move", is_flag=True, help="What it runs goes on elsewhere, as soon as there are free slots.")
@click.option("--no-wait", is_flag=True, help="Do not wait until it runs nothing.")
@click.option("--undo", is_flag=True, help="Let it work again.")
@json_option
@client_options
@pass_common
def drain(common: Common, worker: str, move: bool, no_wait: bool, undo: bool, as_json: bool) -> None:
    """Give WORKER no new work, and wait until it runs nothing. It stays in the mesh until it is stopped.

    With --move its requests go on at other workers with the tokens they have. What finds no free slot there runs on
    where it is until one is free. A Ctrl-C ends the waiting only.
    """
    if undo and move:
        raise click.UsageError("--undo takes back the whole drain; it does not go with --move")
    waiting = _Waiting(no_wait or undo, as_json)
    try:
        found = ask(common, lambda client: _drain(client, worker, move, undo, waiting))
    except KeyboardInterrupt:
        if waiting.begun:
            text = f"{worker} is still being drained; `llambo drain {worker} --undo` takes it back"
            click.echo(f"\nllambo: interrupted; {text}", err=True)
        raise
    if as_json:
        show_json(found)
    elif not found["draining"]:
        click.echo(f"{worker} works again")
    elif found["running"]:
        click.echo(_still(worker, found["running"]))
    elif found.get("left"):
        click.echo(f"{worker} has left the mesh")
    else:
        click.echo(f"{worker} takes no new work and runs nothing: it can be stopped")
    if not undo and not found["draining"]:  # somebody else has taken it back
        click.get_current_context().exit(Exit.ERROR)


async def _drain(client: Client, worker: str, move: bool, undo: bool, waiting: _Waiting) -> dict[str, Any]:
    import asyncio

    import msgspec

    found = msgspec.structs.asdict(await client.drain(worker, undo, move=move))
    seen_at = time.monotonic()
    while found["draining"] and found["running"] and not waiting.skipped:
        waiting.begun = True
        waiting.left(worker, found["running"])
        await asyncio.sleep(ASK_S)
        listed = await client.workers(worker)
        if listed:
            seen_at = time.monotonic()
            found["running"] = listed[0].busy_slots
            found["draining"] = listed[0].state in ("draining", "drained")
        elif time.monotonic() - seen_at > GONE_S:
            found |= {"running": 0, "left": True}
    waiting.done()
    return found


def _still(worker: str, running: int) -> str:
    which = "1 request is" if running == 1 else f"{running} requests are"
    return f"{worker} takes no new work; {which} still running there"


class _Waiting:
    """On stderr: a line that changes on a terminal, a line now and then elsewhere, nothing beside --json."""

    def __init__(self, skipped: bool, as_json: bool) -> None:
        self.skipped = skipped
        self.begun = False
        self._shown = not as_json
        self._terminal = sys.stderr.isatty()
        self._said = -1
        self._said_at = 0.0

    def left(self, worker: str, running: int) -> None:
        now = time.monotonic()
        if not self._shown or running == self._said or (not self._terminal and now - self._said_at < SAY_S):
            return
        self._said, self._said_at = running, now
        text = _still(worker, running)
        click.echo(f"{CLEAR_LINE}{text}" if self._terminal else text, nl=not self._terminal, err=True)

    def done(self) -> None:
        if self._shown and self._terminal and self._said >= 0:
            click.echo(CLEAR_LINE, nl=False, err=True)
