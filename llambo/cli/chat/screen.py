"""How a chat is shown: notices, earlier turns, and answers while they arrive.

An answer is text in a pipe, markdown drawn on a terminal, or JSON lines.
"""

from __future__ import annotations

import asyncio
import os
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import click

from llambo.cli.chat.store import Turn
from llambo.cli.kit.answer_views import FAKE, Clock, JsonView, StdoutWriter, TextView, View, pace_of
from llambo.cli.kit.std_streams import paint
from llambo.cli.kit.tables import one_line, plural
from llambo.mesh.wire.errors import LlamboError, printable
from llambo.mesh.wire.reports import waiting

if TYPE_CHECKING:
    from rich.console import Console

    from llambo.mesh.client.answer_stream import Answer, Piece, Stream
    from llambo.mesh.client.client import Client

#: The shortest time between two frames, and the largest share of the time that drawing may take.
FRAME_S, SHARE = 0.04, 0.3
#: A longer block is cut in two: drawing it again for each frame takes too long.
BLOCK_CHARS = 8_192
#: The size of a terminal that does not report one.
DEFAULT_SIZE = os.terminal_size((80, 24))
#: Without a token for this long the user reads why: before the first token, and after it.
FIRST_S, STALL_S = 1.0, 2.0
#: How often the waiting line may change.
TICK_S = 1.0

#: Begin and end of an update that terminals which support it show at once.
BEGIN_UPDATE, END_UPDATE = "\x1b[?2026h", "\x1b[?2026l"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
#: A line that is wider than computed is cut by the terminal: wrapped, it would take one line more.
NO_WRAP, WRAP = "\x1b[?7l", "\x1b[?7h"
CLEAR_BELOW, CLEAR_REST = "\x1b[J", "\x1b[K"

Tone = Literal["plain", "quiet", "warning", "error"]
_STYLES: dict[Tone, dict[str, Any]] = {
    "plain": {},
    "quiet": {"dim": True},
    "warning": {"fg": "yellow"},
    "error": {"fg": "red"},
}


class Screen:
    def __init__(
        self,
        out: StdoutWriter,
        console: Console | None,
        *,
        colours: bool,
        notices_to_stderr: bool,
        as_json: bool = False,
    ) -> None:
        """`console`: draws markdown; None where stdout is not a terminal that can be drawn on."""
        self.out = out
        self._console = console
        self._colours = colours
        self._to_stderr = notices_to_stderr
        self.as_json = as_json

    def print(self, text: str, tone: Tone = "plain") -> None:
        if self._to_stderr:
            click.echo(f"llambo: {text}", err=True)
            return
        if tone != "plain":
            # Plain text keeps its lines; a sentence is broken between its words.
            text = "\n".join(textwrap.fill(line, text_columns(), subsequent_indent="  ") for line in text.split("\n"))
        style = _STYLES[tone] if self._colours or tone == "quiet" else {}
        paint(click.style(printable(text), **style) + "\n")

    def show_turn(self, number: int, turn: Turn) -> None:
        self.print(f"{number}  you: {turn.question}", "quiet")
        if self._console:
            paint("\n".join(_drawn(self._console, turn.answer)) + "\n")
        else:
            click.echo(turn.answer)
        if turn.mark:
            self.print(f"({turn.mark})", "quiet")

    def answer_view(self, stream: Stream, waiting: Waiting) -> View:
        if self.as_json:
            view = JsonView(self.out, stream)
            stream.on_place = view.placed
            return view
        if self._console is None:
            return TextView(self.out, stream)
        return DrawnAnswer(self.out, self._console, waiting)


class Waiting:
    """The line for a user who waits: the place in the queue, how long nothing has come, and why."""

    def __init__(self, client: Client, stream: Stream, lost: Callable[[], str]) -> None:
        """`lost`: why the broker is lost; empty while it is there."""
        self._client = client
        self._stream = stream
        self._lost = lost
        self._since = time.monotonic()
        self._begun = False
        self._reason = ""
        self._query: asyncio.Task[None] | None = None
        self._queried_at = 0.0

    def on_piece(self) -> None:
        self._since, self._begun, self._reason = time.monotonic(), True, ""

    def line(self) -> str:
        if lost := self._lost():
            return f"lost the broker ({lost}); trying again"
        quiet_s = time.monotonic() - self._since
        if not self._begun and self._stream.note:
            return waiting(self._stream.note)
        if not self._begun and self._stream.ahead:
            return f"waiting, {self._stream.ahead} ahead"
        if quiet_s < (STALL_S if self._begun else FIRST_S):
            return ""
        if self._query is None or (self._query.done() and time.monotonic() - self._queried_at > STALL_S):
            self._queried_at = time.monotonic()
            self._query = asyncio.get_running_loop().create_task(self._find_reason())
        reason = f" ({self._reason})" if self._reason else ""
        return f"{'nothing' if self._begun else 'waiting'} for {quiet_s:.0f} s{reason}"

    def close(self) -> None:
        if self._query is not None:
            self._query.cancel()

    async def _find_reason(self) -> None:
        """An error only costs the explanation: the answer does not depend on it."""
        self._reason = ""
        with suppress(LlamboError):
            found = await self._client.why(self._stream.id)
            worker = printable(found.worker)
            if found.state != "running" or not worker:
                self._reason = "no worker has it now"
            else:
                self._reason = f"its worker is lost, {worker} has it now" if found.moves else f"{worker} has it"


class DrawnAnswer(View):
    """Markdown on a terminal. Finished blocks are drawn once, the last one again for each frame."""

    def __init__(self, out: StdoutWriter, console: Console, waiting: Waiting) -> None:
        from rich.cells import cell_len
        from rich.text import Text

        self._out = out
        self._console = console
        self._waiting = waiting
        self._painter = Painter(lambda line: cell_len(Text.from_ansi(line).plain))
        self._tail = ""
        #: There is something above the tail.
        self._begun = False
        self._changed = True
        self._status = ""
        self._next = 0.0
        self._pace: list[str] = []

    def piece(self, piece: Piece) -> None:
        self._waiting.on_piece()
        # The line ends of Windows are line ends. Half of one may be visible as a sign for one frame.
        self._tail = (self._tail + piece.text).replace("\r\n", "\n")
        self._changed = self._changed or bool(piece.text)

    def frame(self) -> float:
        """Draw what is new, and the waiting line below."""
        began, status = time.monotonic(), self._waiting.line()
        if began < self._next and status == self._status:
            return min(self._next, began + TICK_S)
        if self._changed or status != self._status:
            self._draw(status)
            now = time.monotonic()
            self._next = max(began + FRAME_S, now + (now - began) * (1 / SHARE - 1))
        return began + TICK_S

    def end(self, answer: Answer, clock: Clock) -> None:
        self._pace = [_dim(pace(answer, clock))]

    def close(self) -> None:
        self._waiting.close()
        self._paint([*self._separated(self._lines(self._tail)), *self._pace], [])

    def _draw(self, status: str) -> None:
        from llambo.cli.chat.markdown import cut, finished

        text = printable(self._tail)
        at = finished(text)
        done = self._separated(self._lines(text[:at])) if at else []
        rest = self._tail[at:]
        if len(rest) > BLOCK_CHARS:
            more, rest = cut(rest)
            done += self._separated(self._lines(more))
        self._tail, self._changed, self._status = rest, False, status
        tail = self._separated(self._lines(rest), begin=False)
        self._paint(done, [*tail, *([_dim(status)] if status else [])])

    def _paint(self, done: list[str], tail: list[str]) -> None:
        size = terminal_size()
        self._out.paint(self._painter.paint(done, tail, size.columns, size.lines))

    def _lines(self, text: str) -> list[str]:
        return _drawn(self._console, text) if text.strip() else []

    def _separated(self, lines: list[str], *, begin: bool = True) -> list[str]:
        """With a blank line before them if there is text above."""
        shown = ["", *lines] if lines and self._begun else lines
        self._begun = self._begun or (begin and bool(lines))
        return shown


class Painter:
    """What to write to a terminal so that only changed lines are written.

    Finished lines scroll away with the rest of the terminal. Below them is the tail, which is drawn again as it grows,
    from the first line that differs, in one write, within a synchronized update. So nothing flickers. The cursor waits
    in the first column below the tail. Lines that have scrolled off the top cannot be drawn again: there the older
    state stays.
    """

    def __init__(self, columns_of: Callable[[str], int]) -> None:
        """`columns_of`: the columns that a line takes."""
        self._columns_of = columns_of
        self._tail: list[str] = []
        self._columns = 0

    def paint(self, done: Sequence[str], tail: Sequence[str], columns: int, rows: int) -> str:
        wanted = [*done, *tail]
        first, up = self._first_changed(wanted, columns, rows)
        self._tail, self._columns = list(tail), columns
        if first == len(wanted) and not up:
            return ""
        lines = "".join(f"{line}{CLEAR_REST}\r\n" for line in wanted[first:])
        move = f"\x1b[{up}A\r" if up else ""
        return f"{BEGIN_UPDATE}{HIDE_CURSOR}{NO_WRAP}{move}{lines}{CLEAR_BELOW}{WRAP}{SHOW_CURSOR}{END_UPDATE}"

    def _first_changed(self, wanted: list[str], columns: int, rows: int) -> tuple[int, int]:
        """The first line to write, and how many rows up it is."""
        if self._columns not in (0, columns):
            # The terminal was resized and has wrapped our lines anew where they were too long.
            up = sum(max(1, -(-self._columns_of(line) // columns)) for line in self._tail)
            return 0, min(up, rows - 1)
        before = self._tail
        same = next((at for at, (old, new) in enumerate(zip(before, wanted, strict=False)) if old != new), None)
        first = min(len(before), len(wanted)) if same is None else same
        first = max(first, len(before) - (rows - 1))
        return min(first, len(wanted)), len(before) - first


def _drawn(console: Console, text: str) -> list[str]:
    from llambo.cli.chat.markdown import lines_of

    return lines_of(console, printable(text), text_columns())


def pace(answer: Answer, clock: Clock) -> str:
    parts = pace_of(answer, clock)
    if answer.moves:
        parts.append(f"moved {plural(answer.moves, 'time')}, now {answer.worker}")
    if answer.fake:
        parts.append(FAKE)
    return ", ".join(parts)


def _dim(text: str) -> str:
    return f"\x1b[2m{one_line(text)}\x1b[0m"


def text_columns() -> int:
    """The width of drawn text. The last column stays free: some terminals wrap a line that reaches it."""
    return max(20, terminal_size().columns - 1)


def terminal_size() -> os.terminal_size:
    try:
        size = os.get_terminal_size()
    except OSError:
        return DEFAULT_SIZE
    return size if size.columns and size.lines else DEFAULT_SIZE
