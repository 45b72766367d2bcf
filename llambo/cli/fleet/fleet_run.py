"""`llambo fleet run`: the orchestrator."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llambo.cli.fleet.fleet_site import fleet_options, site
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import client_options
from llambo.cli.kit.standard import tell
from llambo.mesh.wire.errors import printable

if TYPE_CHECKING:
    from llambo.cli.fleet.fleet_site import Site

EXAMPLES = """
llambo fleet run
llambo fleet run --file home.toml
"""


@click.command("run", cls=Command, examples=EXAMPLES)
@fleet_options
@client_options
@pass_common
def run_fleet(common: Common, file: Path, state: Path | None) -> None:
    """Keep the fleet as the file says, and scale it with its load, until Ctrl-C.

    What has died is begun again; what keeps failing is tried less and less often. The workers outlive it: whoever
    runs it next goes on with them.
    """
    here = site(common, file, state)
    with here.alone():
        asyncio.run(_run(here))


async def _run(here: Site) -> None:
    from llambo.cli.kit.following import end_signals
    from llambo.fleet.run.orchestrator import Orchestrator

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in end_signals():
        loop.add_signal_handler(number, stop.set)
    keeper = here.keeper(_say)
    async with keeper:
        orchestrator = Orchestrator(here, keeper, here.state, _say)
        _say(f"keeping {here.fleet.name}, as {here.file} says")
        await orchestrator.run(stop)
    _say("stopped; what runs goes on")


def _say(text: str) -> None:
    tell(f"fleet: {printable(text)}", err=False)
