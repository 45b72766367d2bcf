"""What a chat itself says: notices, turns, facts. To stderr where stdout is for the answer alone."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import click

from llambo.cli.chat.chat_events import Tone
from llambo.cli.chat.chat_session import Turn
from llambo.cli.chat.chat_view import width
from llambo.cli.kit.output import facts
from llambo.mesh.wire.errors import printable

_STYLES: dict[Tone, dict[str, Any]] = {
    "plain": {},
    "quiet": {"dim": True},
    "warning": {"fg": "yellow"},
    "error": {"fg": "red"},
}


class Teller:
    def __init__(self, render: Callable[[str], str] | None, *, aside: bool, colours: bool) -> None:
        """`render`: from markdown to what stands on the terminal. `aside`: everything goes to stderr."""
        self._render = render
        self._aside = aside
        self._colours = colours

    def say(self, text: str, tone: Tone = "plain") -> None:
        text = printable(text)
        if not self._aside:
            if tone != "plain":
                # What has lines of its own keeps them; a sentence is broken between its words.
                text = "\n".join(textwrap.fill(line, width(), subsequent_indent="  ") for line in text.split("\n"))
            style = _STYLES[tone] if self._colours or tone == "quiet" else {}
            click.echo(click.style(text, **style) if style else text)
        elif tone != "error":  # an error is the end of the command, which says it in its own way
            click.echo(f"llambo: {text}", err=True)

    def turn(self, number: int, turn: Turn) -> None:
        self.say(f"{number}  you: {turn.question}", "quiet")
        click.echo(self._render(turn.answer) if self._render else printable(turn.answer), err=self._aside)
        if turn.mark:
            self.say(f"({turn.mark})", "quiet")

    def facts(self, pairs: Sequence[tuple[str, Any]]) -> None:
        facts(pairs)
