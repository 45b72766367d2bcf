"""`llambo events`: what happened in the mesh."""

from __future__ import annotations

import click

from llambo.cli.kit.ask import ask
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.tables import duration, number, show_json, table

EXAMPLES = """
llambo events
llambo events --since 17
llambo events --json | jq -r '.[] | select(.kind == "worker lost") | .text'
"""


@click.command(cls=Command, examples=EXAMPLES)
@click.option("--since", type=click.IntRange(min=0), default=0, metavar="NUMBER", help="Only what came after this one.")
@json_option
@client_options
@pass_common
def events(common: Common, since: int, as_json: bool) -> None:
    """Show what happened in the mesh: workers that joined or were lost, engines that died. The latest comes last."""
    if as_json:
        show_json(ask(common, lambda client: client.query("events", str(since))))
        return
    rows = [
        (number(event.number), number(duration(event.age_ms), " ago"), event.kind, event.text)
        for event in ask(common, lambda client: client.events(since))
    ]
    table(["number", "when", "what", "detail"], rows, nothing="nothing has happened" + (" since" if since else ""))
