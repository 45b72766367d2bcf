"""`llambo models`: what can be asked."""

from __future__ import annotations

from typing import Any

import click

from llambo.cli.ask import ask
from llambo.cli.command import Command
from llambo.cli.common import Common, pass_common
from llambo.cli.options import client_options, json_option
from llambo.cli.output import number, show_json, table

EXAMPLES = """
llambo models
llambo send --model tiny "What is AI?"
"""


@click.command(cls=Command, examples=EXAMPLES)
@json_option
@client_options
@pass_common
def models(common: Common, as_json: bool) -> None:
    """List the models that are served. With only one, nobody has to name it."""
    found = ask(common, lambda client: client.models())
    if as_json:
        show_json(found)
    else:
        show_models(found)


def show_models(found: list[dict[str, Any]]) -> None:
    rows = [(row["model"], *(number(row[name]) for name in ("workers", "slots", "waiting"))) for row in found]
    table(["model", "workers", "slots", "waiting"], rows, nothing="no model is served: start a `llambo-worker`")
