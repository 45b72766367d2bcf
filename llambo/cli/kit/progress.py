"""What a command waits for: on stderr, as a line that changes on a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from llambo.cli.kit.answer_views import CLEAR_LINE
from llambo.cli.kit.std_streams import paint
from llambo.cli.kit.tables import one_line
from llambo.mesh.wire.reports import waiting

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client

#: How often a changed text is printed where no line can be rewritten.
PRINT_S = 5.0


class Progress:
    """`hidden`: beside --json nothing is shown."""

    def __init__(self, *, hidden: bool = False) -> None:
        self.begun = False
        self._hidden = hidden
        self._terminal = sys.stderr.isatty()
        #: The text that was printed last, and when.
        self._printed = ""
        self._printed_at = 0.0

    def show(self, text: str) -> None:
        self.begun, now = True, time.monotonic()
        late = self._terminal or not self._printed or now - self._printed_at >= PRINT_S
        if not self._hidden and text != self._printed and late:
            self._printed, self._printed_at = text, now
            if self._terminal:
                width = shutil.get_terminal_size().columns - 1
                paint(f"{CLEAR_LINE}{one_line(text)[:width]}", err=True)
            else:
                click.echo(text, err=True)

    def end(self) -> None:
        if self._terminal and self._printed:
            paint(CLEAR_LINE, err=True)


@contextmanager
def wait_shown(client: Client, *, hidden: bool = False) -> Iterator[None]:
    """While a task of this client waits, as for its model to be loaded, stderr says for what."""
    progress = Progress(hidden=hidden)
    client.on_wait = lambda note: progress.show(waiting(note))
    try:
        yield
    finally:
        client.on_wait = None
        progress.end()
