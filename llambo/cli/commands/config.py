"""`llambo config`: the settings in force, and where each value comes from."""

from __future__ import annotations

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import config_option, json_option, settings_options
from llambo.cli.kit.tables import show_json, table

EXAMPLES = """
llambo config
llambo config --json | jq '.settings["broker.port"]'
LLAMBO_QUEUE_MS=5000 llambo config | grep queue_ms
"""


@click.command(cls=Command, examples=EXAMPLES)
@click.option("--changed", is_flag=True, help="Only what is not at its default.")
@json_option
@settings_options(["broker"])
@config_option()
@pass_common
def config(common: Common, changed: bool, as_json: bool) -> None:
    """Show the settings in force and where each value came from.

    A flag beats the environment, the environment beats the file, and the file beats the default. The file is the
    one that --config or LLAMBO_CONFIG names, or else the first of ./llambo.toml, ~/.config/llambo/llambo.toml and
    /etc/llambo/llambo.toml.
    """
    settings = common.settings
    rows = [row for row in settings.rows() if not changed or row[2] != "default"]
    if as_json:
        values = {name: {"value": value, "source": source} for name, value, source in rows}
        show_json({"file": str(settings.file) if settings.file else None, "settings": values,
                   "warnings": list(settings.warnings)})  # fmt: skip
        return
    click.echo(f"file: {settings.file or 'none was found'}")
    for warning in settings.warnings:
        click.echo(f"warning: {warning}", err=True)
    table(["setting", "value", "from"], rows, nothing="everything is at its default")
