"""`llambo requests`: what waits and what runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llambo.cli.kit.ask import ask
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.output import Row, duration, number, show_json, table

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client

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
    """List the requests that wait or run. The beginning of an id is enough wherever one is asked for.

    They are those of one broker. What other brokers run is seen here only as slots that are busy; how many is said
    on stderr.
    """

    async def question(client: Client) -> tuple[list[dict[str, Any]], int]:
        return await client.query("requests"), (await client.status()).busy_elsewhere

    found, elsewhere = ask(common, question)
    if as_json:
        show_json(found)
    else:
        table(COLUMNS, [_row(request) for request in found], nothing="nothing waits or runs", fixed=2, spare=SPARE)
    if elsewhere:
        click.echo(f"llambo: {elsewhere} more run through other brokers; ask those with --broker", err=True)


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
