"""How an answer is shown while it comes: as text in a pipe, drawn as markdown on a terminal, or as JSON lines."""

from __future__ import annotations

import math
import os
import time
from typing import TYPE_CHECKING, Protocol

from llambo.cli.kit.out import Out
from llambo.cli.kit.output import duration
from llambo.cli.kit.views import Clock, JsonView
from llambo.mesh.wire.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from llambo.mesh.client.answer_stream import Answer, Piece, Stream

#: A terminal is drawn at most so often, and never for more than a share of the time.
FRAME_S, SHARE = 0.04, 0.3
#: A block that is longer is cut in two: it takes too long to draw it again and again.
BLOCK_CHARS = 8_192
#: Rows and columns of a terminal that does not tell.
USUAL = os.terminal_size((80, 24))


class AnswerView(Protocol):
    def piece(self, piece: Piece) -> None:
        """More of the answer."""

    def frame(self, status: str) -> float:
        """Draw, if there is anything to draw; `status` is a line for the person who waits. When to draw again."""

    def end(self, answer: Answer | None, clock: Clock) -> None:
        """That was all of it. There is no whole answer where it failed or was left."""


class PlainAnswer:
    """What the model says, as it is."""

    def __init__(self, out: Out) -> None:
        self._out = out
        self._last = "\n"

    def piece(self, piece: Piece) -> None:
        if piece.text:
            self._out.put(piece.text)
            self._last = piece.text[-1]

    def frame(self, status: str) -> float:
        return math.inf

    def end(self, answer: Answer | None, clock: Clock) -> None:
        if self._last != "\n":
            self._out.put("\n")


class JsonAnswer:
    """The lines of `llambo send --json`."""

    def __init__(self, out: Out, stream: Stream) -> None:
        self._view = JsonView(out, stream)
        stream.on_place = self._view.placed

    def piece(self, piece: Piece) -> None:
        self._view.piece(piece)

    def frame(self, status: str) -> float:
        return math.inf

    def end(self, answer: Answer | None, clock: Clock) -> None:
        if answer is not None:
            self._view.end(answer, clock)


class DrawnAnswer:
    """On a terminal. Blocks that are complete are drawn for good, the one that grows again and again."""

    def __init__(self, out: Out, console: Console) -> None:
        from rich.cells import cell_len
        from rich.text import Text

        from llambo.cli.chat.chat_painter import Painter

        self._out = out
        self._console = console
        self._painter = Painter(lambda line: cell_len(Text.from_ansi(line).plain))
        self._tail = ""
        #: There is something above the tail.
        self._begun = False
        self._news = True
        self._status = ""
        self._next = 0.0

    def piece(self, piece: Piece) -> None:
        # A line that ends as on Windows is a line; half of such an end shows as a sign for an instant, at the most.
        self._tail = (self._tail + piece.text).replace("\r\n", "\n")
        self._news = self._news or bool(piece.text)

    def frame(self, status: str) -> float:
        began = time.monotonic()
        if began < self._next and status == self._status:
            return self._next
        if self._news or status != self._status:
            self._draw(status)
            now = time.monotonic()
            self._next = max(began + FRAME_S, now + (now - began) * (1 / SHARE - 1))
        return math.inf

    def end(self, answer: Answer | None, clock: Clock) -> None:
        note = [self._quiet(pace(answer, clock))] if answer is not None else []
        self._paint([*self._separated(self._lines(self._tail)), *note], [])

    def _draw(self, status: str) -> None:
        from llambo.cli.chat.chat_markdown import cut, finished

        text = printable(self._tail)
        at = finished(text)
        done = self._separated(self._lines(text[:at])) if at else []
        rest = self._tail[at:]
        if len(rest) > BLOCK_CHARS:
            more, rest = cut(rest)
            done += self._separated(self._lines(more))
        self._tail, self._news, self._status = rest, False, status
        tail = self._separated(self._lines(rest), begin=False)
        self._paint(done, [*tail, *([self._quiet(status)] if status else [])])

    def _paint(self, done: list[str], tail: list[str]) -> None:
        size = _size()
        self._out.paint(self._painter.paint(done, tail, size.columns, size.lines))

    def _lines(self, text: str) -> list[str]:
        from llambo.cli.chat.chat_markdown import lines_of

        return lines_of(self._console, printable(text), width()) if text.strip() else []

    def _separated(self, lines: list[str], *, begin: bool = True) -> list[str]:
        """With a blank line before them, if something stands there."""
        shown = ["", *lines] if lines and self._begun else lines
        self._begun = self._begun or (begin and bool(lines))
        return shown

    def _quiet(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m"


def pace(answer: Answer, clock: Clock) -> str:
    tokens, moves = len(answer.ids), answer.moves
    parts = [f"{tokens} token{'s' if tokens != 1 else ''}", f"{clock.rate(tokens):.1f} tokens/s"]
    parts.append(f"first after {duration(clock.first_ms)}")
    if moves:
        parts.append(f"moved {moves} time{'s' if moves != 1 else ''}, now {printable(answer.worker)}")
    return ", ".join(parts)


def width() -> int:
    """Of what is drawn. The last column stays free: some terminals break a line that reaches it."""
    return max(20, _size().columns - 1)


def _size() -> os.terminal_size:
    try:
        size = os.get_terminal_size()
    except OSError:
        return USUAL
    return size if size.columns and size.lines else USUAL
