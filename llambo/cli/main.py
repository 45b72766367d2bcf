"""`llambo`: the commands for people and scripts. Each is imported when it is called."""

from __future__ import annotations

import click

from llambo.cli.kit.command import Group
from llambo.cli.kit.flags import config_option, settings_options, verbosity

#: The commands that ask the mesh, and the module of each, in the order of the help.
COMMANDS = {
    "send": "commands.send",
    "chat": "chat.chat",
    "attach": "commands.send",
    "cancel": "commands.requests",
    "status": "commands.status",
    "workers": "commands.workers",
    "models": "commands.models",
    "tokens": "commands.tokens",
    "embed": "commands.tokens",
    "requests": "commands.requests",
    "why": "commands.requests",
    "events": "commands.status",
    "metrics": "commands.status",
    "drain": "commands.workers",
    "shell": "shell.shell",
    "top": "top.top",
    "bridge": "services.bridge",
}
#: Those that work on this machine.
LOCAL = {
    "doctor": "doctor.doctor",
    "config": "commands.config",
    "up": "services.up",
    "fleet": "fleet.fleet",
    "gateway": "services.gateway",
    "keys": "commands.keys",
    "systemd": "services.systemd",
    "completion": "commands.completion",
    "help": "commands.help",
}
#: Where each command is, for `load`.
PLACES = {name: f"llambo.cli.{module}:{name}" for name, module in (COMMANDS | LOCAL).items()}
PLACES["help"] += "_"  # the builtin has the name without it

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
    lazy=PLACES,
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
