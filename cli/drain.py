"""`llambo drain WORKER`: before a host is rebooted."""

from __future__ import annotations

import click

from llambo.cli.ask import ask
from llambo.cli.command import Command
from llambo.cli.common import Common, pass_common
from llambo.cli.options import client_options, json_option
from llambo.cli.output import show_json

EXAMPLES = """
llambo drain tiny-01            before its host is rebooted
llambo drain tiny-01 --undo     let it work again
"""


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("worker", metavar="WORKER")
@click.option("--undo", is_flag=True, help="Let it work again.")
@json_option
@client_options
@pass_common
def drain(common: Common, worker: str, undo: bool, as_json: bool) -> None:
    """Give WORKER no new work. It finishes what it runs and stays in the mesh until it is stopped."""
    found = ask(common, lambda client: client.drain(worker, undo))
    if as_json:
        show_json(found)
    elif not found["draining"]:
        click.echo(f"{found['worker']} works again")
    elif found["running"]:
        click.echo(f"{found['worker']} takes no new work; {found['running']} requests are still running there")
    else:
        click.echo(f"{found['worker']} takes no new work and runs nothing: it can be stopped")
