"""What is typed in a shell is done here: each command by the function that `llambo` itself calls for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from contextlib import suppress
from typing import Any

import click

from llambo.cli.kit.common import Common
from llambo.cli.kit.exits import Exit
from llambo.cli.kit.failure import Failure
from llambo.cli.kit.shell_session import Session
from llambo.cli.shell.shell_lines import TO_MODEL, BadLine, Order, Prompt, parse
from llambo.cli.shell.shell_names import ENTRIES, command_of, options_of
from llambo.mesh.wire.errors import LlamboError

#: What `set` leaves to the command line: where the shell belongs to, and what makes sense once.
NOT_SET = {"--help", "--json", "--broker", "--key", "--config", "--connect-ms", "--detach", "--logprobs"}


#: What goes wrong with so many words behind the command may have been a sentence.
SENTENCE_WORDS = 3


class Leave(Exception):
    """The shell is to end."""


def settable() -> dict[str, click.Option]:
    """The options of `send` that `set` can set, by the names it calls them."""
    found = {}
    for option in options_of(command_of("send")):
        flag = next((text for text in option.opts if text.startswith("--")), "")
        if flag and flag not in NOT_SET:
            found["stats" if flag == "--verbose" else flag[2:].replace("-", "_")] = option
    return found


class Shell:
    def __init__(self, common: Common, session: Session, *, as_json: bool = False, keep_going: bool = False) -> None:
        self.session = session
        #: The exit code of the first command that failed.
        self.failed: int = Exit.OK
        #: What `set` has set, as it is said to the options.
        self.chosen: dict[str, Any] = {}
        self._common = common
        self._as_json = as_json
        self._keep_going = keep_going
        # Its child contexts find the shell by it; without a name, so that usage lines begin with the command.
        self._context = click.Context(
            click.Command("shell"), info_name="", obj=self, help_option_names=["-h", "--help"]
        )  # fmt: skip

    async def lines(self, lines: Iterable[str] | AsyncIterable[str]) -> int:
        """Do them one after another. The code of the first that failed; unless told otherwise it is the last one."""
        with suppress(Leave):
            async for line in lines if isinstance(lines, AsyncIterable) else _each(lines):
                await self.line(line)
                if self._stops():
                    break
        return self.failed

    async def line(self, line: str) -> None:
        self.session.begin()
        try:
            orders = parse(line, ENTRIES)
        except BadLine as error:
            Failure(str(error), code=Exit.USAGE).show()
            self.failed = self.failed or Exit.USAGE
            return
        for order in orders:
            self.session.begin()
            code = await asyncio.to_thread(self._do, order)
            self.failed = self.failed or code
            if self._stops():
                break

    def _stops(self) -> bool:
        """A Ctrl-C is meant for all of a script."""
        return self.session.interrupted or (self.failed != Exit.OK and not self._keep_going)

    def _do(self, order: Order | Prompt) -> int:
        if isinstance(order, Prompt):
            return self.do("send", ("--", order.text)) if order.text else Exit.OK
        return self.do(order.name, order.words, order.rest)

    def do(self, name: str, words: Iterable[str], typed: str = "") -> int:
        """Its exit code. What went wrong has been said."""
        try:
            self._invoke(name, list(words))
        except click.exceptions.Exit as left:
            return left.exit_code
        except click.UsageError as error:
            error.show()
            if len(typed.split()) >= SENTENCE_WORDS:
                click.echo(f"  to ask the model that, begin with `{TO_MODEL}`", err=True)
            return error.exit_code
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except LlamboError as error:
            failure = Failure.of(error, as_json=self._as_json)
            failure.show()
            return failure.exit_code
        except KeyboardInterrupt:
            return Exit.INTERRUPTED
        return Exit.OK

    def _invoke(self, name: str, words: list[str]) -> None:
        command = command_of(name)
        said = list(ENTRIES[name].said)
        if self._as_json and any(option.name == "as_json" for option in command.params):
            said.append("--json")
        common = Common(dict(self._common.flags), self._common.config, self._common.verbose, self.session)
        chosen = {option.name: self.chosen[name] for name, option in settable().items() if name in self.chosen}
        context = command.make_context(name, [*said, *words], parent=self._context, obj=common, default_map=chosen)
        with context:
            command.invoke(context)


async def _each(lines: Iterable[str]) -> AsyncIterator[str]:
    for line in lines:
        yield line
