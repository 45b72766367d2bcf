"""The tables of `llambo top`, and its list of events."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich.text import Text
from textual.containers import VerticalScroll
from textual.widgets import DataTable, Static

from llambo.cli.top.top_core import Cell, Happened, Order, Row, arranged, headings


class Pane(DataTable[Text]):
    """Rows that stay where they are while their values change; the cursor stays at what it points to."""

    def __init__(self, name: str, columns: Sequence[str]) -> None:
        super().__init__(id=name, cursor_type="row")
        self.order = Order()
        self.wanted = ""
        self._names = columns
        self._rows: list[Row] = []
        self._keys: list[str] = []

    def on_mount(self) -> None:
        for name, heading in zip(self._names, headings(self._names, self.order), strict=True):
            self.add_column(Text(heading), key=name)

    @property
    def chosen(self) -> str | None:
        """What the cursor points to."""
        return self._keys[self.cursor_row] if 0 <= self.cursor_row < len(self._keys) else None

    @property
    def keys(self) -> list[str]:
        return list(self._keys)

    def sort_by_next(self) -> None:
        self.order = Order((self.order.column + 1) % len(self._names), self.order.falling)
        self._entitle()
        self.show(self._rows)

    def turn(self) -> None:
        self.order = Order(self.order.column, not self.order.falling)
        self._entitle()
        self.show(self._rows)

    def only(self, wanted: str) -> None:
        self.wanted = wanted
        self.show(self._rows)

    def show(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)
        shown = arranged(rows, self.wanted, self.order)
        keys = [row.key for row in shown]
        if keys == self._keys:
            self._change(shown)
        else:
            self._fill(shown, keys)
        of = f"{len(shown)} of {len(rows)} with '{self.wanted}'" if self.wanted else str(len(rows))
        self.border_title = Text(f"{self.id}: {of}")

    def _change(self, shown: list[Row]) -> None:
        for row in shown:
            for name, cell in zip(self._names, row.cells, strict=True):
                text = _text(cell)
                if self.get_cell(row.key, name) != text:
                    self.update_cell(row.key, name, text, update_width=True)

    def _fill(self, shown: list[Row], keys: list[str]) -> None:
        pointed, at, seen = self.chosen, self.cursor_row, self.scroll_offset
        self.clear()
        self._keys = keys
        for row in shown:
            self.add_row(*map(_text, row.cells), key=row.key)
        self.move_cursor(row=keys.index(pointed) if pointed in keys else min(at, len(keys) - 1), scroll=False)
        self.scroll_to(seen.x, seen.y, animate=False)

    def _entitle(self) -> None:
        for column, heading in zip(self.ordered_columns, headings(self._names, self.order), strict=True):
            column.label = Text(heading)
        self.refresh()


def _text(cell: Cell) -> Text:
    """What is counted stands to the right."""
    return Text(cell.text, cell.tone, justify="left" if isinstance(cell.value, str) else "right")


class Events(VerticalScroll, can_focus=True):
    """What happened, the latest first: it is seen however low the pane is."""

    def compose(self) -> Iterable[Static]:
        yield Static(id="happened")

    def on_mount(self) -> None:
        self.border_title = "events"

    def show(self, events: Sequence[Happened], instead: str = "") -> None:
        lines = [_line(event) for event in reversed(events)]
        text = Text("\n").join(lines) if lines else Text(instead or "nothing has happened yet", "dim")
        self.query_one("#happened", Static).update(text)


def _line(event: Happened) -> Text:
    when = time.strftime("%H:%M:%S", time.localtime(event.at_s))
    return Text.assemble((when, "dim"), " ", (event.kind, "bold"), " ", event.text)
