"""`llambo attach ID`: follow a request that was sent earlier."""

from __future__ import annotations

from typing import Any

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import client_options, json_option, settings_options

EXAMPLES = """
id=$(llambo send --detach "A long story")
llambo attach "$id"
llambo attach 3f2a --json
"""


def _client_options(function: Any) -> Any:
    return client_options(function, verbose="Statistics and the log to stderr; twice for more.")


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("id", metavar="ID")
@json_option
@settings_options(["connect_ms", "timeout_ms"])
@_client_options
@pass_common
def attach(common: Common, id: str, as_json: bool) -> None:
    """Show the answer to the request ID from its first token on, and follow it to its end.

    The beginning of the id is enough. Ctrl-C stops following and leaves the request alone: `llambo cancel` stops it.
    The JSON lines are those of `llambo send`.
    """
    from llambo.cli.kit.follow import follow

    code = follow(common, lambda client: client.attach(id), as_json=as_json, mine=False)
    click.get_current_context().exit(code)
