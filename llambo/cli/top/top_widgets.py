"""The parts of the screen of `llambo top`: tables, the list of events, questions, texts, and their layout.

Text from other processes is always a rich `Text`. A string would be read for markup.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import DataTable, Static

from llambo.cli.commands.requests import summary, timeline
from llambo.cli.top.top_core import ShownEvent, SortOrder, TableCell, TableRow, arranged, headings
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.reports import RequestStory

#: How often an open story is read again.
STORY_REFRESH_S = 1.0

KEYS = """
1 2 3, Tab    workers, requests, events
arrows, PgUp  move; left and right show more columns

w, Enter      the story of the request: what happened to it, and why
c             cancel the request
d             drain the worker: it completes its running requests
m             drain it, and move its running requests elsewhere at once
u             undrain: let it work again

s, r          sort by the next column; reverse the order
/             show only the rows with these words
Esc           show all rows again; close this
p             pause, and go on
q             leave
"""

CSS = """
#head { height: 1; padding: 0 1; text-wrap: nowrap; text-overflow: ellipsis; }
#gauges { height: auto; padding: 0 1; text-wrap: nowrap; }

#panes { height: 1fr; layout: vertical; }
#panes > * { height: 2fr; border: round $secondary; border-title-align: left; }
#panes > #events { height: 1fr; min-height: 4; }
#panes > *:focus { border: round $accent; border-title-style: bold; }
#panes > DataTable { scrollbar-size-horizontal: 0; }
#panes.stale > * { opacity: 60%; }

/* Without colours a background shows nothing, so the cursor is reversed. */
.plain DataTable > .datatable--cursor { text-style: reverse; }
.plain #panes > *:focus { border: heavy $accent; }

/* On a small terminal most of the room is for the pane with the focus. */
#panes.low > *:focus { height: 4fr; }

#panes.wide { layout: grid; grid-size: 2 2; grid-rows: 3fr 1fr; }
#panes.wide > *, #panes.wide > *:focus { height: 1fr; }
#panes.wide > #events { column-span: 2; }

#filter { border: round $accent; height: 3; }

ModalScreen { align: center middle; }
.box {
    border: round $accent; background: $surface; padding: 0 1;
    width: auto; max-width: 95%; height: auto; max-height: 90%;
}
.box Static { width: auto; max-width: 100%; }
.page { width: 90%; }
.page Static { width: 1fr; }
"""


class Pane(DataTable[Text]):
    """A table that is refreshed in place. The cursor stays on its row when rows move."""

    def __init__(self, name: str, columns: Sequence[str]) -> None:
        super().__init__(id=name, cursor_type="row")
        self.order = SortOrder()
        self.filter_text = ""
        #: The keys of the rows that are shown.
        self.keys: list[str] = []
        self._columns = columns
        self._rows: list[TableRow] = []

    def on_mount(self) -> None:
        for name, heading in zip(self._columns, headings(self._columns, self.order), strict=True):
            self.add_column(Text(heading), key=name)

    @property
    def chosen(self) -> str | None:
        """The key of the row under the cursor."""
        return self.keys[self.cursor_row] if 0 <= self.cursor_row < len(self.keys) else None

    def sort_by_next(self) -> None:
        self._sort(SortOrder((self.order.column + 1) % len(self._columns), self.order.descending))

    def reverse(self) -> None:
        self._sort(SortOrder(self.order.column, not self.order.descending))

    def _sort(self, order: SortOrder) -> None:
        self.order = order
        for column, heading in zip(self.ordered_columns, headings(self._columns, order), strict=True):
            column.label = Text(heading)
        self.refresh()
        self.show(self._rows)

    def set_filter(self, text: str) -> None:
        self.filter_text = text
        self.show(self._rows)

    def show(self, rows: Iterable[TableRow]) -> None:
        self._rows = list(rows)
        shown = arranged(self._rows, self.filter_text, self.order)
        if [row.key for row in shown] == self.keys:
            self._update_cells(shown)
        else:
            self._fill(shown)
        of = f"{len(shown)} of {len(self._rows)} with '{self.filter_text}'" if self.filter_text else str(len(shown))
        self.border_title = Text(f"{self.id}: {of}")

    def _update_cells(self, shown: list[TableRow]) -> None:
        for row in shown:
            for name, cell in zip(self._columns, row.cells, strict=True):
                text = _text(cell)
                if self.get_cell(row.key, name) != text:
                    self.update_cell(row.key, name, text, update_width=True)

    def _fill(self, shown: list[TableRow]) -> None:
        chosen, at, scrolled = self.chosen, self.cursor_row, self.scroll_offset
        self.clear()
        self.keys = [row.key for row in shown]
        for row in shown:
            self.add_row(*map(_text, row.cells), key=row.key)
        row_number = self.keys.index(chosen) if chosen in self.keys else min(at, len(self.keys) - 1)
        self.move_cursor(row=row_number, scroll=False)
        self.scroll_to(scrolled.x, scrolled.y, animate=False)


def _text(cell: TableCell) -> Text:
    return Text(cell.text, cell.colour, justify="left" if isinstance(cell.sort_key, str) else "right")


class EventList(VerticalScroll, can_focus=True):
    """Events, the latest first, so that it is visible in a low pane."""

    def compose(self) -> Iterable[Static]:
        yield Static(id="happened")

    def on_mount(self) -> None:
        self.border_title = "events"

    def show(self, events: Sequence[ShownEvent], instead: str = "") -> None:
        lines = [self._line(event) for event in reversed(events)]
        text = Text("\n").join(lines) if lines else Text(instead or "nothing has happened yet", "dim")
        self.query_one("#happened", Static).update(text)

    def _line(self, event: ShownEvent) -> Text:
        when = time.strftime("%H:%M:%S", time.localtime(event.at_s))
        return Text.assemble((when, "dim"), " ", (event.kind, "bold"), " ", event.text)


class ConfirmScreen(ModalScreen[str]):
    """A question. The result is the key of a choice, or empty."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,n,q", "answer('')", "no")]

    def __init__(self, text: str, choices: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._text = text
        self._choices = choices

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(Text(self._text))
            choices = [*self._choices, ("n", "no, change nothing")]
            yield Static(Text("\n" + "\n".join(f"  {key}  {what}" for key, what in choices)))

    def on_mount(self) -> None:
        for key, what in self._choices:
            self._bindings.bind(key, f"answer('{key}')", what)

    def action_answer(self, key: str) -> None:
        self.dismiss(key)


class TextScreen(ModalScreen[None]):
    """A text that can be scrolled."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,w,enter,question_mark", "close", "close")]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self.text = text
        self._title = title

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="box page") as box:
            box.border_title = Text(self._title)
            box.border_subtitle = Text("Esc closes")
            yield Static(Text(self.text), id="text")

    def on_mount(self) -> None:
        self.query_one(".page").focus()

    def update(self, text: str) -> None:
        self.text = text
        self.query_one("#text", Static).update(Text(text))

    def action_close(self) -> None:
        self.dismiss(None)


class StoryScreen(TextScreen):
    """The story of a request, which is read again at intervals."""

    def __init__(self, title: str, read: Callable[[], Awaitable[RequestStory]]) -> None:
        super().__init__(title, "asking ...")
        self._read = read

    def on_mount(self) -> None:
        super().on_mount()
        self.set_interval(STORY_REFRESH_S, self._refresh_story)
        self._refresh_story()

    def _refresh_story(self) -> None:
        self.run_worker(self._read_story(), exclusive=True)

    async def _read_story(self) -> None:
        try:
            found = await self._read()
        except LlamboError as error:
            self.update(f"{error.text}\n{error.hint}")
            return
        self.update("\n".join([summary(found), "", *timeline(found.story)]))
