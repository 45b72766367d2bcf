"""`llambo requests`: what waits and what runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llambo.cli.kit.ask import ask
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.tables import Row, duration, number, show_json, table

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client
    from llambo.mesh.wire.reports import RequestRow

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

    async def question(client: Client) -> int:
        if as_json:
            show_json(await client.query("requests"))
        else:
            rows = [_row(request) for request in await client.requests()]
            table(COLUMNS, rows, nothing="nothing waits or runs", fixed=2, spare=SPARE)
        return (await client.status()).busy_elsewhere

    elsewhere = ask(common, question)
    if elsewhere:
        click.echo(f"llambo: {elsewhere} more run through other brokers; ask those with --broker", err=True)


def _row(request: RequestRow) -> Row:
    notes = [f"{request.ahead} ahead" if request.state == "waiting" else "", "detached" if request.detached else ""]
    return (
        request.id,
        request.state,
        request.model,
        request.priority,
        request.worker,
        number(f"{request.tokens}/{request.max_tokens}"),
        number(request.moves),
        duration(request.age_ms),
        ", ".join(filter(None, notes)),
    )
