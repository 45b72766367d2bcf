"""`llambo requests`: what waits and what runs."""

from __future__ import annotations

from typing import Any

import click

from llambo.cli.ask import ask
from llambo.cli.command import Command
from llambo.cli.common import Common, pass_common
from llambo.cli.options import client_options, json_option
from llambo.cli.output import Row, duration, number, show_json, table

EXAMPLES = """
llambo requests
llambo cancel "$(llambo requests --json | jq -r '.[0].id')"
"""

COLUMNS = ("id", "state", "model", "priority", "worker", "tokens", "moves", "age", "note")
#: What a narrow terminal does without.
SPARE = ("moves", "priority", "model", "age", "note", "worker")


@click.command(cls=Command, examples=EXAMPLES)
@json_option
@client_options
@pass_common
def requests(common: Common, as_json: bool) -> None:
    """List the requests that wait or run. The beginning of an id is enough wherever one is asked for."""
    found = ask(common, lambda client: client.requests())
    if as_json:
        show_json(found)
    else:
        table(COLUMNS, [_row(request) for request in found], nothing="nothing waits or runs", fixed=2, spare=SPARE)


def _row(request: dict[str, Any]) -> Row:
    waits = request["state"] == "waiting"
    notes = [f"{request['ahead']} ahead" if waits else "", "detached" if request["detached"] else ""]
    return (
        request["id"],
        request["state"],
        request["model"],
        request["priority"],
        request["worker"],
        number(f"{request['tokens']}/{request['max_tokens']}"),
        number(request["moves"]),
        duration(request["age_ms"]),
        ", ".join(filter(None, notes)),
    )
