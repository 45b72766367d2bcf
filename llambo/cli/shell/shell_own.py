"""The commands that only a shell has: help, set, unset, watch, exit."""

from __future__ import annotations

import asyncio
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.exits import Exit
from llambo.cli.kit.flags import Duration, SettingOption, json_option
from llambo.cli.kit.output import show_json, table
from llambo.cli.shell.shell_lines import TO_MODEL
from llambo.cli.shell.shell_names import ALIASES, ENTRIES, WATCHED, command_of
from llambo.cli.shell.shell_run import Leave, Shell, settable
from llambo.mesh.settings.settings_table import BY_NAME

pass_shell = click.make_pass_decorator(Shell)

#: To the upper left; to the end of the line, and of the screen, nothing.
HOME, CLEAR_REST_OF_LINE, CLEAR_REST = "\x1b[H", "\x1b[K", "\x1b[J"
CLEAR_SCREEN = "\x1b[2J"

ABOUT = f"""
Anything else is a prompt to the model; `{TO_MODEL} text` is, whatever it begins with.
`;` separates commands, quotes are as in a shell, `#` begins a remark.
Tab completes, Ctrl-C stops what runs, Ctrl-D leaves. `help COMMAND` tells more.
"""


@click.command("help", cls=Command, examples="help\nhelp send")
@click.argument("name", required=False, metavar="[COMMAND]")
def help_(name: str | None) -> None:
    """List the commands, or tell what COMMAND does."""
    if name is not None:
        if name not in ENTRIES:
            raise click.UsageError(f"there is no command {name!r}")
        command = command_of(name)
        with command.make_context(name, [], resilient_parsing=True, help_option_names=["-h", "--help"]) as context:
            click.echo(command.get_help(context))
        return
    formatter = click.HelpFormatter()
    shown = {name: entry for name, entry in ENTRIES.items() if name not in ALIASES}
    formatter.write_dl([(name, entry.about) for name, entry in shown.items()])
    click.echo(formatter.getvalue(), nl=False)
    click.echo(ABOUT, nl=False)


SET_EXAMPLES = """
set
set model tiny
set max_tokens 50
set system Answer in one word.
set stop '###' END
"""


@click.command(
    "set", cls=Command, examples=SET_EXAMPLES,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)  # fmt: skip
@click.argument("name", required=False, metavar="[NAME")
@click.argument("words", nargs=-1, metavar="VALUE]")
@json_option
@pass_shell
@click.pass_context
def set_(context: click.Context, shell: Shell, name: str | None, words: tuple[str, ...], as_json: bool) -> None:
    """Set an option of what is sent from here on; or show them all."""
    options = settable()
    if name is None:
        _show_set(shell, context.ensure_object(Common), as_json)
        return
    option = _settable(name, options)
    if not words:
        raise click.UsageError(f"what shall {name} be? `unset {name}` takes back what was set")
    shell.chosen[name] = _value(option, words, context)


def _settable(name: str, options: dict[str, click.Option]) -> click.Option:
    if name not in options:
        raise click.UsageError(f"there is no option {name!r}; there is: {', '.join(options)}")
    return options[name]


def _value(option: click.Option, words: tuple[str, ...], context: click.Context) -> Any:
    """Checked by the option itself, as if it stood behind `send`."""
    if option.is_flag or option.count:
        return click.BOOL.convert(" ".join(words), option, context)
    texts = list(words) if option.multiple else [" ".join(words)]
    for text in texts:
        option.type.convert(text, option, context)
    return texts if option.multiple else texts[0]


def _show_set(shell: Shell, common: Common, as_json: bool) -> None:
    rows = [(name, *_in_force(shell, common, name, option)) for name, option in settable().items()]
    if as_json:
        show_json({name: {"value": value, "source": source} for name, value, source in rows})
    else:
        table(("option", "value", "from"), rows)


def _in_force(shell: Shell, common: Common, name: str, option: click.Option) -> tuple[str, str]:
    if name in shell.chosen:
        value = shell.chosen[name]
        told = " ".join(value) if isinstance(value, list) else {True: "yes", False: "no"}.get(value, value)
        return told, "set"
    if isinstance(option, SettingOption) and option.name is not None:
        settings = common.settings
        return BY_NAME[option.name].show(settings.values[option.name]), settings.sources[option.name]
    return "no" if option.is_flag or option.count else "", "default"


@click.command("unset", cls=Command, examples="unset model")
@click.argument("name", metavar="NAME")
@pass_shell
def unset_(shell: Shell, name: str) -> None:
    """Take back what was set."""
    _settable(name, settable())
    shell.chosen.pop(name, None)


@click.command(
    "watch", cls=Command, examples="watch status\nwatch --every 5s queue\nwatch --times 3 why 3f2a",
    context_settings={"allow_interspersed_args": False},
)  # fmt: skip
@click.option("--every", "every_ms", type=Duration(), default="1s", help="How often: 500ms, 2s. Plain: seconds.")
@click.option("--times", type=click.IntRange(min=1), metavar="NUMBER", help="So often; without it until Ctrl-C.")
@click.argument("name", metavar="COMMAND")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENT]...")
@pass_common
@pass_shell
def watch_(shell: Shell, common: Common, every_ms: int, times: int | None, name: str, words: tuple[str, ...]) -> None:
    """Show what COMMAND shows, and keep it current."""
    if name not in WATCHED:
        raise click.UsageError(f"{name!r} cannot be watched; this can: {', '.join(WATCHED)}")
    code, seen, screen = int(Exit.OK), 0, sys.stdout.isatty()
    if screen:
        click.echo(CLEAR_SCREEN, nl=False, color=True)
    while True:
        code, text = _captured(shell, name, words)
        click.echo(_painted(text) if screen else text, nl=False, color=True)
        seen += 1
        if shell.session.interrupted:
            raise KeyboardInterrupt
        if seen == times:
            break
        _wait(shell, every_ms / 1_000, screen)
    raise click.exceptions.Exit(code)


def _wait(shell: Shell, seconds: float, screen: bool) -> None:
    try:
        shell.session.run(asyncio.sleep(seconds))
    except KeyboardInterrupt:
        if screen:
            click.echo()  # the terminal has written ^C
        raise


def _painted(text: str) -> str:
    """Over what is there, without a moment in which nothing is."""
    lines = text.splitlines()
    return HOME + "".join(f"{line}{CLEAR_REST_OF_LINE}\n" for line in lines) + CLEAR_REST


class _Captured(io.StringIO):
    """Tables are made for a terminal if it is one that is written to in the end."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def _captured(shell: Shell, name: str, words: tuple[str, ...]) -> tuple[int, str]:
    """What it says, and its complaints: on a screen that is painted anew they would be gone at once."""
    written = _Captured(sys.stdout.isatty())
    with redirect_stdout(written), redirect_stderr(written):
        code = shell.do(name, words)
    return code, written.getvalue()


@click.command("exit", cls=Command, examples="exit")
def exit_() -> None:
    """Leave the shell. Ctrl-D does so, too."""
    raise Leave
