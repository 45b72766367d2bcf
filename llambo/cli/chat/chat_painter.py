"""Lines on a terminal of which the last ones may still change: what to write, so that only these are touched.

Some lines are done for good and scroll away with the rest of the terminal. Below them is the tail, which is drawn
again as it grows: only from the first line that differs, in one write, within a synchronized update where the
terminal knows that. So nothing flickers. The cursor waits in the first column below the tail.

What has left the screen at its top cannot be drawn again; there the older state stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: Begin and end of an update that is shown at once, by those terminals that know it.
BEGIN_UPDATE, END_UPDATE = "\x1b[?2026h", "\x1b[?2026l"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
#: A line that is wider than it was thought to be is cut by the terminal: wrapped, it would be one line more.
NO_WRAP, WRAP = "\x1b[?7l", "\x1b[?7h"
CLEAR_BELOW, CLEAR_REST = "\x1b[J", "\x1b[K"


class Painter:
    def __init__(self, width_of: Callable[[str], int]) -> None:
        """`width_of`: the columns a line takes."""
        self._width_of = width_of
        self._tail: list[str] = []
        self._columns = 0

    def paint(self, done: Sequence[str], tail: Sequence[str], columns: int, rows: int) -> str:
        """What to write so that `done` stands above for good, and `tail` below it."""
        wanted = [*done, *tail]
        first, up = self._from(wanted, columns, rows)
        self._tail, self._columns = list(tail), columns
        if first == len(wanted) and not up:
            return ""
        lines = "".join(f"{line}{CLEAR_REST}\r\n" for line in wanted[first:])
        move = f"\x1b[{up}A\r" if up else ""
        return f"{BEGIN_UPDATE}{HIDE_CURSOR}{NO_WRAP}{move}{lines}{CLEAR_BELOW}{WRAP}{SHOW_CURSOR}{END_UPDATE}"

    def _from(self, wanted: list[str], columns: int, rows: int) -> tuple[int, int]:
        """The first line to write, and how far up it is."""
        if self._columns not in (0, columns):
            # The terminal has another width now, and has broken our lines anew where they were too long.
            up = sum(max(1, -(-self._width_of(line) // columns)) for line in self._tail)
            return 0, min(up, rows - 1)
        before = self._tail
        same = next((at for at, (old, new) in enumerate(zip(before, wanted, strict=False)) if old != new), None)
        first = min(len(before), len(wanted)) if same is None else same
        first = max(first, len(before) - (rows - 1))
        return min(first, len(wanted)), len(before) - first
