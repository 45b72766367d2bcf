"""The commands' common behaviour: help with headings and examples, errors in one form, closed pipes."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import Any

import click

from llambo.cli.kit.common import Common, key_hint, no_model_hint, port_hint, user_name
from llambo.cli.kit.failure import MEANING, Exit, Failure
from llambo.cli.kit.std_streams import (
    NO_ROOM,
    cannot_write,
    fill_closed_streams,
    filter_streams,
    flush_or_silence,
    silence,
)
from llambo.mesh.wire.errors import Code, LlamboError

#: How similar to a command or an option a word must be to count as a typing mistake.
SIMILAR = 0.75
EXIT_CODES = "\n".join(f"{code.value:>3}  {text}" for code, text in MEANING.items())


class _Help(click.Command):
    """Help that ends in examples, and options under headings."""

    def __init__(self, *args: Any, examples: str = "", exit_codes: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples.strip("\n")
        self.exit_codes = exit_codes

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """The whole process. Closed standard streams are opened first; if a disk is full, one line says so."""
        fill_closed_streams()
        filter_streams()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            cannot_write(error, "llambo")
            sys.exit(Exit.ERROR)
        finally:
            flush_or_silence()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            # Click also proposes what has little in common with the word.
            near = difflib.get_close_matches(error.option_name, error.possibilities or [], 3, SIMILAR)
            raise click.NoSuchOption(error.option_name, possibilities=near, ctx=error.ctx) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_options(self, ctx, formatter, aside=False)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, text in (("Exit codes", EXIT_CODES if self.exit_codes else ""), ("Examples", self.examples)):
            if text:
                with formatter.section(heading):
                    for line in text.splitlines():
                        formatter.write(f"{'':>{formatter.current_indent}}{line}\n" if line else "\n")


def _write_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter, *, aside: bool) -> None:
    """Under their headings: those for everybody, or those that are set aside."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None and isinstance(parameter, click.Option) and getattr(parameter, "aside", False) == aside:
            sections.setdefault(getattr(parameter, "heading", "") or "Options", []).append(record)
    for heading, records in sections.items():
        with formatter.section(heading):
            formatter.write_dl(records)


def aside_help(ctx: click.Context) -> str:
    """The options that `--help` leaves out; empty if there are none."""
    formatter = ctx.make_formatter()
    _write_options(ctx.command, ctx, formatter, aside=True)
    return formatter.getvalue().strip("\n")


class Command(_Help):
    def invoke(self, ctx: click.Context) -> Any:
        """The edge where errors become messages and exit codes."""
        try:
            return super().invoke(ctx)
        except LlamboError as error:
            common, found = ctx.find_object(Common), error
            if common is not None and (hint := _hint_here(error.code, common)):
                found = LlamboError(error.code, error.text.removesuffix(f"; {error.hint}"), hint=hint)
            raise Failure.of(found, as_json=bool(ctx.params.get("as_json"))) from error
        except PermissionError as error:
            if error.filename is None:
                raise
            what = f"{error.filename}: {os.strerror(error.errno or 0)}; this is the user {user_name()}"
            raise Failure(what, "run it as the owner of that file (sudo -u), or name another file") from error
        except KeyboardInterrupt:
            ctx.exit(Exit.INTERRUPTED)
        except BrokenPipeError:
            # The reader has closed the pipe, as in `llambo events | head -3`.
            silence_stdout()
            ctx.exit(Exit.OK)


def _hint_here(code: Code, common: Common) -> str:
    """What is seen from this machine only; empty: nothing."""
    if code is Code.UNAUTHORIZED:
        return key_hint(common)
    if code is Code.NO_WORKER:
        return no_model_hint(common)
    return port_hint(common) if code is Code.NO_BROKER else ""


class Group(_Help, click.Group):
    """Its commands are imported when they are called, so that each of them starts fast."""

    def __init__(
        self, *args: Any, lazy: dict[str, str], sections: dict[str, dict[str, str]] | None = None,
        pointers: dict[str, str] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """`sections`: the commands under headings, and what each does. `pointers`: hints for names that others have."""
        super().__init__(*args, **kwargs)
        self._lazy = lazy
        self.sections = sections or {}
        self._pointers = pointers or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        return load(self._lazy[cmd_name])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if not self.sections:
            super().format_commands(ctx, formatter)
        for heading, rows in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl(list(rows.items()), col_spacing=2)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            close = difflib.get_close_matches(args[0].lower(), self._lazy, 1, SIMILAR)
            hint = self._pointers.get(args[0].lower()) or (f"did you mean {close[0]!r}?" if close else "")
            raise click.UsageError(f"No such command {args[0]!r}. {hint[:1].upper()}{hint[1:]}".strip(), ctx) from error


def load(place: str) -> click.Command:
    """The command at `module:name`, a place that one of our tables names."""
    module, _, name = place.partition(":")
    command = getattr(importlib.import_module(module), name)
    assert isinstance(command, click.Command)
    return command


def silence_stdout() -> None:
    """The reader of stdout is gone."""
    silence(sys.stdout.fileno())
