"""`llambo`: the commands for people and scripts. Each is a small file of its own, imported when it is called."""

from __future__ import annotations

import click

from llambo.cli.kit.command import Group
from llambo.cli.kit.flags import config_option, settings_options, verbosity

COMMANDS = (
    "send",
    "chat",
    "attach",
    "cancel",
    "status",
    "workers",
    "models",
    "tokens",
    "embed",
    "requests",
    "why",
    "events",
    "metrics",
    "drain",
    "shell",
    "top",
    "bridge",
)
LOCAL = ("config", "up", "fleet", "gateway", "keys", "systemd")
#: Where a command is that is not in `commands`.
ROOMS = {
    "chat": "chat",
    "shell": "shell",
    "top": "top",
    "fleet": "fleet",
    **dict.fromkeys(("bridge", "up", "gateway", "systemd"), "services"),
}

EXAMPLES = """
llambo up --engine fake --workers 3      a mesh on this machine
llambo send "What is AI?"                ask it
llambo --broker tcp://box:7330 status    look at another one
llambo why 3f2a                          what became of a request, and why
"""


def _version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        import llambo

        click.echo(f"llambo {llambo.__version__}")
        context.exit()


@click.group(
    cls=Group,
    lazy={name: f"llambo.cli.{ROOMS.get(name, 'commands')}.{name}:{name}" for name in (*COMMANDS, *LOCAL)},
    exit_codes=True,
    examples=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@settings_options(["broker", "key"])
@config_option()
@verbosity("Log to stderr; twice for more.")
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version."
)  # fmt: skip
def main() -> None:
    """llambo: one endpoint for many machines that run llama.cpp.

    Every option that has a default can be set in the environment and in llambo.toml as well; `llambo config`
    shows what is in force.
    """
