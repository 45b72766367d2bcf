"""`llambo shell`: a prompt over the whole mesh."""

from __future__ import annotations

import asyncio

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import client_options, json_option, settings_options

EXAMPLES = """
llambo shell
llambo shell -c 'status; nodes'
llambo shell -c 'drain tiny-01; watch --times 3 nodes' --keep-going
llambo shell < morning.llambo
llambo shell --json -c 'infer --max-tokens 20 hello' | jq .
"""

SETTINGS = ("client_model", "max_tokens", "temperature", "connect_ms", "timeout_ms")


@click.command(cls=Command, examples=EXAMPLES, exit_codes=True)
@click.option("-c", "text", metavar="TEXT", help="Do this and leave: commands, with `;` between them.")
@click.option(
    "--keep-going", is_flag=True, help="In a script: go on after a failure. The exit code is the first one's."
)
@json_option
@settings_options(SETTINGS)
@client_options
@pass_common
def shell(common: Common, text: str | None, keep_going: bool, as_json: bool) -> None:
    """Type commands and prompts, over one connection to the mesh.

    At `llambo>`: help, status, nodes, models, queue, infer, send, attach, cancel, drain, undrain, why, events, watch,
    set, unset, exit. They are the commands of `llambo`, with all their options; `help` says what each does. Anything
    else is a prompt to the model.

    With -c, or when stdin is no terminal, it does what it is told and leaves. The first failure ends it with its exit
    code. With --json each command prints its JSON, one after another.
    """
    from llambo.cli.shell.shell_main import run

    _ = common.settings  # what is wrong there is said before anything else
    click.get_current_context().exit(asyncio.run(run(common, text, keep_going, as_json)))
