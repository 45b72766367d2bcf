"""What every command gets: the flags that were given, the settings they result in, and the shell it runs in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client
    from llambo.mesh.settings.settings import Settings

T = TypeVar("T")


class Session(Protocol):
    """What a command uses of the shell it was typed in (`shell_session.py`)."""

    #: Called at a signal while a stream is followed.
    on_signal: Callable[[int], None] | None
    #: The ids of the requests that were sent in this shell.
    sent: deque[str]

    def run(self, work: Coroutine[Any, Any, T]) -> T: ...
    def connected(self, common: Common) -> AbstractAsyncContextManager[Client]: ...


@dataclass
class Common:
    """Flags by setting name, of the group and of the command. The last one given counts."""

    flags: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    verbose: int = 0
    #: None outside a shell.
    session: Session | None = None

    @cached_property
    def settings(self) -> Settings:
        """Read when a command runs and not before: `--help` works with a broken file too."""
        import logging

        from llambo.cli.kit.logs import set_up
        from llambo.mesh.settings import settings

        loaded = settings.load(self.flags, config=self.config)
        if self.session is not None:
            return loaded  # the shell has set up the log and logged the warnings
        levels = (loaded.text("log_level").upper(), "INFO", "DEBUG")
        set_up(levels[min(self.verbose, 2)])
        for warning in loaded.warnings:
            logging.getLogger("llambo").warning("%s", warning)
        return loaded


pass_common = click.make_pass_decorator(Common, ensure=True)
