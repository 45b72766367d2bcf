"""The application `llambo top`: asks the mesh at intervals, shows the answers, and carries out keys."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar

from rich.segment import Segment
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.color import Color
from textual.containers import Container
from textual.events import Resize
from textual.filter import LineFilter
from textual.geometry import Size
from textual.widgets import Footer, Input, Static

from llambo.cli.kit.tables import one_line
from llambo.cli.top import top_core as core
from llambo.cli.top.top_widgets import CSS, KEYS, ConfirmScreen, EventList, Pane, StoryScreen, TextScreen
from llambo.mesh.wire.errors import Code, LlamboError, printable
from llambo.mesh.wire.reports import DrainReply, EventRow

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client

T = TypeVar("T")

#: From this width in columns on, the tables are side by side.
WIDE = 150
#: From this height in lines on, every pane has room enough.
HIGH = 40
#: Events that are stored for the screen.
EVENTS = 200
#: An answer takes milliseconds. After this time without one the head says so; that the broker is gone is certain only
#: when its lease has expired.
SILENT_S = 2.0
TICK_S = 1.0


class Gatherer:
    """Takes snapshots: the only place where `llambo top` queries the mesh for its tables."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._last_event = self._last_sample = 0
        self._no_events = ""
        #: Counts the brokers that the client was linked to.
        self._broker = 0

    async def look(self) -> core.Snapshot:
        client, broker = self._client, self._broker
        status, workers, requests, recent, events = await asyncio.gather(
            client.status(), client.workers(), client.requests(), client.recent(self._last_sample), self._new_events()
        )
        hosts = await client.hosts() if any(row.hosts for row in status.models) else []
        samples = recent.samples
        if broker != self._broker:
            # The question went to one broker, with its number of the last event, and the answer came from another one,
            # which counts otherwise. The next look gets everything.
            samples, events = [], []
        self._last_sample = max([self._last_sample, *(sample.number for sample in samples)])
        self._last_event = max([self._last_event, *(event.number for event in events)])
        return core.Snapshot(status, workers, requests, samples, events[-EVENTS:], self._no_events, hosts)

    def forget(self) -> None:
        """Another broker numbers its events and samples from the start."""
        self._broker += 1
        self._last_event, self._last_sample, self._no_events = 0, 0, ""

    async def _new_events(self) -> list[EventRow]:
        """Where there are keys, only an admin may read events."""
        if self._no_events:
            return []
        try:
            return await self._client.events(self._last_event)
        except LlamboError as error:
            if error.code is not Code.FORBIDDEN:
                raise
            self._no_events = error.text
            return []


class _Filter(LineFilter):
    """The last step of drawing: no text of a widget has control characters in it."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [Segment(printable(text), style, control) for text, style, control in segments]


class Top(App[None]):
    TITLE = "llambo top"
    CSS = CSS
    ENABLE_COMMAND_PALETTE = False
    NOTIFICATION_TIMEOUT: ClassVar[float] = 3
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark", "keys", "keys", key_display="?"),
        Binding("d", "drain(False)", "drain"),
        Binding("m", "drain(True)", "move", show=False),
        Binding("u", "undrain", "undrain"),
        Binding("c", "cancel", "cancel"),
        Binding("w,enter", "why", "why", key_display="w"),
        Binding("slash", "filter", "filter", key_display="/"),
        Binding("s", "sort", "sort"),
        Binding("r", "reverse", "reverse", show=False),
        Binding("p", "pause", "pause"),
        Binding("1", "pane('workers')", show=False),
        Binding("2", "pane('requests')", show=False),
        Binding("3", "pane('events')", show=False),
        Binding("escape", "show_all", "all", show=False),
        Binding("q,ctrl+c", "quit", "leave", key_display="q", priority=False),
    ]

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [*super().get_line_filters(), _Filter()]

    def __init__(self, client: Client, *, every_s: float = 0.5) -> None:
        # With NO_COLOR use the terminal's own colours, not a theme turned to grey.
        super().__init__(ansi_color=True if "NO_COLOR" in os.environ else None)
        if self.no_color:
            self.add_class("plain")
        #: The error that ended the application; None if its user did.
        self.failure: LlamboError | None = None
        #: None before the first answer.
        self.snapshot: core.Snapshot | None = None
        #: Why there is no broker; empty while there is one.
        self.lost = ""
        #: Set after each refresh of the screen.
        self.shown = asyncio.Event()
        self._client = client
        self._gatherer = Gatherer(client)
        self._every_s = every_s
        self._curves = core.Curves()
        self._events: deque[core.ShownEvent] = deque(maxlen=EVENTS)
        #: When the query that is not answered yet was sent, in the loop's time; 0 if there is none.
        self._asked_at = 0.0
        self._linked, self._not_paused = asyncio.Event(), asyncio.Event()
        self._linked.set()
        self._not_paused.set()

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield Static(id="gauges")
        with Container(id="panes"):
            yield Pane("workers", core.WORKER_COLUMNS)
            yield Pane("requests", core.REQUEST_COLUMNS)
            yield EventList(id="events")
        yield Input(id="filter", placeholder="words that a row must have; Enter applies them, Esc shows all")
        yield Footer()

    def on_mount(self) -> None:
        self._client.on_link = self._on_link
        self.query_one("#filter").display = False
        self._arrange(self.size)
        self.workers_pane.focus()
        self.set_interval(TICK_S, self._show_head)
        self.run_worker(self._look_repeatedly(), exit_on_error=True)

    def on_unmount(self) -> None:
        self._client.on_link = None

    @property
    def workers_pane(self) -> Pane:
        return self.query_one("#workers", Pane)

    @property
    def requests_pane(self) -> Pane:
        return self.query_one("#requests", Pane)

    # --- looking -------------------------------------------------------------------------------------------------

    async def _look_repeatedly(self) -> None:
        while True:
            await self._linked.wait()
            await self._not_paused.wait()
            self._asked_at = asyncio.get_running_loop().time()
            try:
                snapshot = await self._gatherer.look()
            except LlamboError as error:
                if not error.retryable:
                    self.failure = error
                    self.exit()
                    return
                if not self.lost:  # then the head says so already
                    self.notify(one_line(error.text), severity="warning", markup=False)
            else:
                self._take(snapshot)
            self._asked_at = 0.0
            await asyncio.sleep(self._every_s)

    def _take(self, snapshot: core.Snapshot) -> None:
        self.snapshot = snapshot
        self._curves.samples.extend(snapshot.samples)
        now_s = time.time()
        self._events.extend(core.shown_event(event, now_s) for event in snapshot.events if event.matters)
        self.show()

    def show(self) -> None:
        self._show_head()
        if self.snapshot is None or not self.query("#head"):
            return
        status, width = self.snapshot.status, self.size.width - 2
        gauges = [*self._curves.gauges(status, width), *core.host_lines(status.models, self.snapshot.hosts, width)]
        self.query_one("#gauges", Static).update(Text("\n".join(gauges), no_wrap=True))
        self.workers_pane.show(map(core.worker_row, self.snapshot.workers))
        self.requests_pane.show(map(core.request_row, self.snapshot.requests))
        self.query_one("#events", EventList).show(self._events, self.snapshot.no_events)

    def _show_head(self) -> None:
        head = Text(no_wrap=True, overflow="ellipsis")
        if not self._not_paused.is_set():
            head.append("paused, p goes on  ", "bold yellow")
        if self.lost:
            head.append(f"the broker is lost ({one_line(self.lost)}); trying again", "bold red")
        elif silent_s := self._silent_s():
            head.append(f"the broker has not answered for {silent_s:.0f} s", "bold red")
        elif self.snapshot is not None:
            head.append(one_line(self.snapshot.status.broker), "bold")
            head.append(f"  {core.summary_line(self.snapshot.status)}; at {one_line(self._client.address)}")
        else:
            head.append("asking ...")
        if not self.query("#head"):
            return  # the application is closing
        self.query_one("#head", Static).update(head)
        self.query_one("#panes").set_class(bool(self.lost or self._silent_s()), "stale")
        self.call_after_refresh(self.shown.set)

    def _silent_s(self) -> float:
        """Seconds without an answer; 0 while the delay is normal."""
        waited = asyncio.get_running_loop().time() - self._asked_at
        return waited if self._asked_at and waited > SILENT_S else 0.0

    def _on_link(self, lost: str) -> None:
        self.lost = lost
        if lost:
            self._linked.clear()
        else:
            self._gatherer.forget()
            self._events.clear()
            self._curves.samples.clear()
            self._linked.set()
        self._show_head()

    # --- keys ----------------------------------------------------------------------------------------------------

    @property
    def pane(self) -> Pane | None:
        """The table with the focus."""
        return self.focused if isinstance(self.focused, Pane) else None

    def action_pane(self, name: str) -> None:
        self.query_one(f"#{name}").focus()

    def action_keys(self) -> None:
        self.push_screen(TextScreen("keys", KEYS.strip("\n")))

    def action_sort(self) -> None:
        if self.pane is not None:
            self.pane.sort_by_next()

    def action_reverse(self) -> None:
        if self.pane is not None:
            self.pane.reverse()

    def action_pause(self) -> None:
        if self._not_paused.is_set():
            self._not_paused.clear()
        else:
            self._not_paused.set()
        self._show_head()

    def action_filter(self) -> None:
        pane = self.pane or self.workers_pane
        entry = self.query_one("#filter", Input)
        entry.display = True
        entry.border_title = pane.id
        entry.value = pane.filter_text
        entry.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        if event.input.display:
            self.query_one(f"#{event.input.border_title}", Pane).set_filter(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._close_filter()

    def _close_filter(self) -> None:
        entry = self.query_one("#filter", Input)
        entry.display = False
        self.query_one(f"#{entry.border_title}").focus()

    def action_show_all(self) -> None:
        """Remove the filter of the table it is typed for, or of the table with the focus."""
        entry = self.query_one("#filter", Input)
        if entry.display:
            entry.value = ""
            self.query_one(f"#{entry.border_title}", Pane).set_filter("")
            self._close_filter()
        elif self.pane is not None:
            self.pane.set_filter("")

    def on_resize(self, event: Resize) -> None:
        self._arrange(event.size)
        self.show()

    def _arrange(self, size: Size) -> None:
        panes = self.query_one("#panes")
        panes.set_class(size.width >= WIDE, "wide")
        panes.set_class(size.width < WIDE and size.height < HIGH, "low")

    # --- changes of the mesh ---------------------------------------------------------------------------------------

    def action_drain(self, move: bool) -> None:
        worker = self._chosen(self.workers_pane, "worker")
        if worker is not None:
            choices = [
                ("d", "drain it: it completes its running requests"),
                ("m", "drain it, and move its running requests elsewhere"),
            ]
            self._confirm(
                f"Drain {one_line(worker)}? It gets no new work.",
                choices[::-1] if move else choices,
                lambda key: self._client.drain(worker, move=key == "m"),
                _drain_text,
            )

    def action_undrain(self) -> None:
        worker = self._chosen(self.workers_pane, "worker")
        if worker is not None:
            question = f"Let {one_line(worker)} work again?"
            self._confirm(question, [("y", "yes")], lambda _: self._client.drain(worker, undo=True), _drain_text)

    def action_cancel(self) -> None:
        id = self._chosen(self.requests_pane, "request")
        if id is not None:
            self._confirm(
                f"Cancel {id}?",
                [("y", "yes, stop it")],
                lambda _: self._client.cancel(id),
                lambda reason: f"{id[: core.ID_DIGITS]} has ended: {reason}",
            )

    def action_why(self) -> None:
        id = self._chosen(self.requests_pane, "request")
        if id is not None:
            self.push_screen(StoryScreen(f"why {id}", lambda: self._client.why(id)))

    def on_data_table_row_selected(self) -> None:
        if self.pane is self.requests_pane:
            self.action_why()

    def _chosen(self, pane: Pane, what: str) -> str | None:
        if pane.chosen is None:
            self.notify(f"there is no {what} here", severity="warning", markup=False)
        return pane.chosen

    def _confirm(
        self,
        question: str,
        choices: list[tuple[str, str]],
        act: Callable[[str], Awaitable[T]],
        result_text: Callable[[T], str],
    ) -> None:
        """Ask, do what the key of the choice stands for, and show how it went."""

        async def work(key: str) -> None:
            try:
                text, failed = result_text(await act(key)), False
            except LlamboError as error:
                text, failed = f"{error.text}; {error.hint}", True
            self.notify(text, severity="error" if failed else "information", markup=False)

        def answered(key: str | None) -> None:
            if key:
                self.run_worker(work(key))

        self.push_screen(ConfirmScreen(question, choices), answered)


def _drain_text(reply: DrainReply) -> str:
    if not reply.draining:
        return f"{reply.worker} works again"
    return f"{reply.worker} takes no new work; {reply.running} of its requests still run"
