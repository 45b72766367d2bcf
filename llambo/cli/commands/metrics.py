"""`llambo metrics`: the broker's page for Prometheus."""

from __future__ import annotations

import click

from llambo.cli.kit.ask import ask
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import client_options

EXAMPLES = """
llambo metrics
llambo metrics | grep queue_seconds
llambo metrics > /var/lib/node_exporter/llambo.prom   from a file
"""


@click.command(cls=Command, examples=EXAMPLES)
@client_options
@pass_common
def metrics(common: Common) -> None:
    """Print the broker's metrics as Prometheus reads them.

    With keys that takes an admin's. `llambo-broker --metrics` serves the same over HTTP; docs/metrics.md explains
    each of them.
    """
    click.echo(ask(common, lambda client: client.metrics()), nl=False)
