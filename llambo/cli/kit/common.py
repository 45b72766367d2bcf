"""What every command shares: which flags were given, how much to log, and the settings that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from llambo.cli.kit.shell_session import ShellSession
    from llambo.mesh.settings.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Common:
    """Flags by setting name, from the group and from the command: whoever says it last is heard."""

    flags: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    verbose: int = 0
    #: The shell in which the command was typed, if it was.
    session: ShellSession | None = None

    @cached_property
    def settings(self) -> Settings:
        """Read once, when a command runs: `--help` must work whatever is in the file."""
        import logging

        from llambo.cli.kit.logs import set_up
        from llambo.mesh.settings import settings

        loaded = settings.load(self.flags, config=self.config)
        if self.session is not None:
            return loaded  # the shell has set up the log, and given the warnings
        levels = (loaded.text("log_level").upper(), "INFO", "DEBUG")
        set_up(levels[min(self.verbose, 2)])
        for warning in loaded.warnings:
            logging.getLogger("llambo").warning("%s", warning)
        return loaded


def _remember(key: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        common = context.ensure_object(Common)
        if key == "verbose":
            common.verbose += value
        elif value is not None:
            common.config = value

    return callback


def verbosity(help: str) -> Callable[[F], F]:
    return click.option(
        "-v", "--verbose", count=True, expose_value=False, callback=_remember("verbose"), help=help
    )  # fmt: skip


def config_option() -> Callable[[F], F]:
    return click.option(
        "--config",
        metavar="FILE",
        expose_value=False,
        callback=_remember("config"),
        help="Read this file in place of llambo.toml.",
    )


pass_common = click.make_pass_decorator(Common, ensure=True)
