"""The commands that only the shell has: help, set, unset, watch, exit."""

from __future__ import annotations

import asyncio
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common
from llambo.cli.kit.flags import Duration, SettingOption, json_option
from llambo.cli.kit.std_streams import FilteredText, paint
from llambo.cli.kit.tables import show_json, table
from llambo.cli.shell.language import TABLE, TO_MODEL, WATCHED, command_of, settable
from llambo.cli.shell.shell import LeaveShell, Shell
from llambo.mesh.settings.settings_table import BY_NAME

pass_shell = click.make_pass_decorator(Shell)

#: The cursor to the upper left; clear to the end of the line; clear to the end of the screen.
HOME, CLEAR_REST_OF_LINE, CLEAR_REST = "\x1b[H", "\x1b[K", "\x1b[J"
CLEAR_SCREEN = "\x1b[2J"

ABOUT = f"""
Anything else is a prompt to the model; `{TO_MODEL} text` is, whatever it begins with.
`;` separates commands, quotes are as in a shell, `#` begins a remark.
Tab completes, Ctrl-C stops what runs, Ctrl-D leaves. `help COMMAND` says more.
"""


@click.command("help", cls=Command, examples="help\nhelp send")
@click.argument("name", required=False, metavar="[COMMAND]")
def help_(name: str | None) -> None:
    """List the commands, or say what COMMAND does."""
    if name is None:
        formatter = click.HelpFormatter()
        formatter.write_dl([(name, command.about) for name, command in TABLE.items() if command.about])
        click.echo(formatter.getvalue() + ABOUT, nl=False)
        return
    if name not in TABLE:
        raise click.UsageError(f"there is no command {name!r}")
    command = command_of(name)
    with command.make_context(name, [], resilient_parsing=True, help_option_names=["-h", "--help"]) as context:
        click.echo(command.get_help(context))


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
    if name is not None:
        option = _settable(name)
        if not words:
            raise click.UsageError(f"what shall {name} be? `unset {name}` takes back what was set")
        shell.chosen[name] = _value(option, words, context)
        return
    common = context.ensure_object(Common)
    rows = [(name, *_in_force(shell, common, name, option)) for name, option in settable().items()]
    if as_json:
        show_json({name: {"value": value, "source": source} for name, value, source in rows})
    else:
        table(("option", "value", "from"), rows)


@click.command("unset", cls=Command, examples="unset model")
@click.argument("name", metavar="NAME")
@pass_shell
def unset_(shell: Shell, name: str) -> None:
    """Take back what was set."""
    _settable(name)
    shell.chosen.pop(name, None)


def _settable(name: str) -> click.Option:
    options = settable()
    if name not in options:
        raise click.UsageError(f"there is no option {name!r}; there is: {', '.join(options)}")
    return options[name]


def _value(option: click.Option, words: tuple[str, ...], context: click.Context) -> Any:
    """Checked by the option itself, as if it was given to `send`."""
    if option.is_flag or option.count:
        return click.BOOL.convert(" ".join(words), option, context)
    texts = list(words) if option.multiple else [" ".join(words)]
    for text in texts:
        option.type.convert(text, option, context)
    return texts if option.multiple else texts[0]


def _in_force(shell: Shell, common: Common, name: str, option: click.Option) -> tuple[str, str]:
    """The value, and where it comes from."""
    if name in shell.chosen:
        value = shell.chosen[name]
        return " ".join(value) if isinstance(value, list) else {True: "yes", False: "no"}.get(value, value), "set"
    if isinstance(option, SettingOption) and option.name is not None:
        settings = common.settings
        return BY_NAME[option.name].show(settings.values[option.name]), settings.sources[option.name]
    return "no" if option.is_flag or option.count else "", "default"


@click.command(
    "watch", cls=Command, examples="watch status\nwatch --every 5s queue\nwatch --times 3 why 3f2a",
    context_settings={"allow_interspersed_args": False},
)  # fmt: skip
@click.option("--every", "every_ms", type=Duration(), default="1s", help="How often: 500ms, 2s. Plain: seconds.")
@click.option("--times", type=click.IntRange(min=1), metavar="NUMBER", help="Stop after this; without it at Ctrl-C.")
@click.argument("name", metavar="COMMAND")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENT]...")
@pass_shell
def watch_(shell: Shell, every_ms: int, times: int | None, name: str, words: tuple[str, ...]) -> None:
    """Show what COMMAND shows, and keep it current."""
    if name not in WATCHED:
        raise click.UsageError(f"{name!r} cannot be watched; this can: {', '.join(WATCHED)}")
    shown, screen = 0, sys.stdout.isatty()
    if screen:
        paint(CLEAR_SCREEN)
    while True:
        # Errors, too: on a screen that is painted anew they would be gone at once.
        written = _Captured(screen)
        filtered = cast(TextIO, FilteredText(written))
        with redirect_stdout(filtered), redirect_stderr(filtered):
            code = shell.do(name, words)
        paint(_over_the_screen(written.getvalue()) if screen else written.getvalue())
        shown += 1
        if shell.session.interrupted:
            raise KeyboardInterrupt
        if shown == times:
            raise click.exceptions.Exit(code)
        try:
            shell.session.run(asyncio.sleep(every_ms / 1_000))
        except KeyboardInterrupt:
            if screen:
                click.echo()  # the terminal has written ^C
            raise


def _over_the_screen(text: str) -> str:
    """Written over what is there, so that the screen is never empty."""
    return HOME + "".join(f"{line}{CLEAR_REST_OF_LINE}\n" for line in text.splitlines()) + CLEAR_REST


class _Captured(io.StringIO):
    """Tables are drawn for a terminal if the output goes to one in the end."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@click.command("exit", cls=Command, examples="exit")
def exit_() -> None:
    """Leave the shell. Ctrl-D does so, too."""
    raise LeaveShell
