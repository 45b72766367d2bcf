"""`llambo cancel ID`: stop a request of any client."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llambo.cli.kit.ask import ask
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.tables import show_json

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client
    from llambo.mesh.wire.reports import RequestStory

EXAMPLES = """
llambo cancel 3f2a
llambo cancel 3f2a --json
"""


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("id", metavar="ID")
@json_option
@client_options
@pass_common
def cancel(common: Common, id: str, as_json: bool) -> None:
    """Stop the request ID, of any client. The beginning of the id is enough. One that has ended stays as it is."""

    async def stop(client: Client) -> tuple[str, RequestStory]:
        return await client.cancel(id), await client.why(id)

    reason, found = ask(common, stop)
    if as_json:
        show_json({"id": found.id, "reason": reason, "tokens": found.tokens})
    elif reason == "cancelled":
        click.echo(f"cancelled {found.id} after {found.tokens} tokens")
    else:
        click.echo(f"{found.id} had ended before ({reason}), after {found.tokens} tokens")
