"""`llambo fleet rolling-restart`, `rollback` and `drain`: workers begun again, taken back, or left without new work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from llambo.cli.fleet.fleet import make_it_so
from llambo.cli.fleet.fleet_site import fleet_options, run, site
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.exits import Exit
from llambo.cli.kit.failure import Failure
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.output import show_json
from llambo.cli.kit.standard import tell
from llambo.mesh.wire.errors import printable

if TYPE_CHECKING:
    from typing import Any

    from llambo.cli.fleet.fleet_site import Site

RESTART_EXAMPLES = """
llambo fleet rolling-restart
llambo fleet rolling-restart --class tiny --max-unavailable 2
"""
ROLLBACK_EXAMPLES = """
llambo fleet rollback
llambo fleet rollback --class tiny
llambo fleet rollback --class tiny --undo    try the file's settings again
"""
DRAIN_EXAMPLES = """
llambo fleet drain tiny-0001
llambo fleet drain tiny-0001 --undo
"""


@click.command("rolling-restart", cls=Command, examples=RESTART_EXAMPLES)
@click.option("--class", "node_class", metavar="CLASS", help="Only this one.  [default: all]")
@click.option(
    "--max-unavailable", metavar="NUMBER", type=click.IntRange(1), help="At a time.  [default: as the file says]"
)
@fleet_options
@json_option
@client_options
@pass_common
def rolling_restart(
    common: Common, node_class: str | None, max_unavailable: int | None, file: Path, state: Path | None, as_json: bool
) -> None:
    """Begin all workers again, a few at a time, one class after the other.

    What they run goes on elsewhere. The next one goes when the one before it works and has answered; the first bad one
    ends it. After a Ctrl-C the next `apply` goes on.
    """
    here = site(common, file, state)
    with here.versions().changing() as book:
        for name in _classes(here, node_class):
            book.restart(name, max_unavailable or 0)
    _carry_out(here, as_json)


@click.command(cls=Command, examples=ROLLBACK_EXAMPLES)
@click.option("--class", "node_class", metavar="CLASS", help="Only this one.  [default: all]")
@click.option("--undo", is_flag=True, help="Have what the file says again.")
@fleet_options
@json_option
@client_options
@pass_common
def rollback(
    common: Common, node_class: str | None, undo: bool, file: Path, state: Path | None, as_json: bool
) -> None:  # fmt: skip
    """Go back to the settings that were in force before the last update.

    The file stays as it is; what it says of the class is left aside until it says something else.
    """
    here = site(common, file, state)
    names = _classes(here, node_class)
    with here.versions().changing() as book:
        if undo:
            for name in names:
                book.of(name).refused = ""
        elif not [name for name in names if book.take_back(name)]:
            raise Failure("there is nothing to go back to", "no update has changed these settings", Exit.ERROR)
    _carry_out(here, as_json)


@click.command(cls=Command, examples=DRAIN_EXAMPLES)
@click.argument("node", metavar="NODE")
@click.option("--undo", is_flag=True, help="Let it work again.")
@fleet_options
@json_option
@client_options
@pass_common
def drain(common: Common, node: str, undo: bool, file: Path, state: Path | None, as_json: bool) -> None:
    """Give a node no new work; what it runs goes elsewhere. It stays, and the next `apply` sees to it.

    `llambo drain` waits until it runs nothing.
    """
    here = site(common, file, state)
    found = run(_drain(here, node, undo))
    if as_json:
        show_json(found)
    else:
        _say(f"{node} takes no new work" if found["draining"] else f"{node} works again")


async def _drain(here: Site, node: str, undo: bool) -> dict[str, Any]:
    keeper = here.keeper(_say)
    await keeper.processes.refresh()
    if not any(record.name == node and record.node_class != "broker" for record in keeper.processes.records()):
        raise Failure(f"there is no worker {node!r} in this fleet", "`llambo fleet status` lists them", Exit.ERROR)
    async with keeper.mesh() as client:
        return msgspec.structs.asdict(await client.drain(node, undo, move=not undo))


def _classes(here: Site, one: str | None) -> list[str]:
    return [here.node_class(one).name] if one else list(here.fleet.classes)


def _carry_out(here: Site, as_json: bool) -> None:
    if pid := here.orchestrator():
        _say(f"told to the orchestrator, pid {pid}: `llambo fleet status` shows how far it is")
        return
    make_it_so(here, as_json)


def _say(text: str) -> None:
    tell(f"fleet: {printable(text)}", err=False)
