"""The screen of `llambo top`, over the values of `top_core`.

Every text from others is a `Text`, never a string that would be read for markup.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.events import Resize
from textual.geometry import Size
from textual.widgets import Footer, Input, Static

from llambo.cli.top import top_core as core
from llambo.cli.top.top_gather import EVENTS, Gatherer
from llambo.cli.top.top_panes import Events, Pane
from llambo.cli.top.top_screens import KEYS, Page, Question, Story
from llambo.cli.top.top_style import CSS
from llambo.mesh.wire.errors import LlamboError, harmless

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client

#: From this width on the tables stand beside each other.
WIDE = 150
#: From this height on each of them has room enough.
HIGH = 40
MODES = {"d": False, "m": True}
#: A broker that answers takes some milliseconds. After so long without an answer it is said: that it is gone is known
#: for certain only when its lease is over.
SILENT_S = 2.0
TICK_S = 1.0


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
        Binding("r", "turn", "turn", show=False),
        Binding("p", "pause", "pause"),
        Binding("1", "pane('workers')", show=False),
        Binding("2", "pane('requests')", show=False),
        Binding("3", "pane('events')", show=False),
        Binding("escape", "all", "all", show=False),
        Binding("q,ctrl+c", "quit", "leave", key_display="q", priority=False),
    ]

    def __init__(self, client: Client, *, every_s: float = 0.5) -> None:
        # Without colours: not those of a theme in grey, but those of the terminal, whatever it has.
        super().__init__(ansi_color=True if "NO_COLOR" in os.environ else None)
        if self.no_color:
            self.add_class("plain")
        #: What ended it, if it was not a person.
        self.failure: LlamboError | None = None
        #: Of the last look. None: there was none yet.
        self.snapshot: core.Snapshot | None = None
        #: Why there is no broker; "": there is one.
        self.lost = ""
        #: Set whenever something new is on the screen, for whoever waits for it.
        self.shown = asyncio.Event()
        self._client = client
        self._gatherer = Gatherer(client)
        self._every_s = every_s
        self._curves = core.Curves()
        self._events: deque[core.Happened] = deque(maxlen=EVENTS)
        #: When the question was asked that is not answered yet, by the clock of the loop; 0: none.
        self._asked_at = 0.0
        self._linked = asyncio.Event()
        self._linked.set()
        self._going = asyncio.Event()
        self._going.set()

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield Static(id="gauges")
        with Container(id="panes"):
            yield Pane("workers", core.WORKER_COLUMNS)
            yield Pane("requests", core.REQUEST_COLUMNS)
            yield Events(id="events")
        yield Input(id="filter", placeholder="words that a row must have; Enter keeps them, Esc shows all")
        yield Footer()

    def on_mount(self) -> None:
        self._client.on_link = self._on_link
        self.query_one("#filter").display = False
        self._arrange(self.size)
        self.workers_pane.focus()
        self.set_interval(TICK_S, self._show_head)
        self.run_worker(self._look_again(), exit_on_error=True)

    def on_unmount(self) -> None:
        self._client.on_link = None

    @property
    def workers_pane(self) -> Pane:
        return self.query_one("#workers", Pane)

    @property
    def requests_pane(self) -> Pane:
        return self.query_one("#requests", Pane)

    # --- looking -------------------------------------------------------------------------------------------------

    async def _look_again(self) -> None:
        while True:
            await self._linked.wait()
            await self._going.wait()
            self._asked_at = asyncio.get_running_loop().time()
            try:
                snapshot = await self._gatherer.look()
            except LlamboError as error:
                if not error.retryable:
                    self.failure = error
                    self.exit()
                    return
                self._on_trouble(error)
            else:
                self._take(snapshot)
            self._asked_at = 0.0
            await asyncio.sleep(self._every_s)

    def _take(self, snapshot: core.Snapshot) -> None:
        self.snapshot = snapshot
        self._curves.add(snapshot.samples)
        self._events.extend(core.happened(snapshot.events, time.time()))
        self.show()

    def show(self) -> None:
        """All that is known, on the screen."""
        self._show_head()
        if self.snapshot is None or not self.query("#head"):
            return
        gauges = core.gauges(self.snapshot.status, self._curves, self.size.width - 2)
        self.query_one("#gauges", Static).update(Text("\n".join(gauges), no_wrap=True))
        self.workers_pane.show(core.worker_rows(self.snapshot.workers))
        self.requests_pane.show(core.request_rows(self.snapshot.requests))
        self.query_one("#events", Events).show(self._events, self.snapshot.no_events)

    def _show_head(self) -> None:
        head = Text(no_wrap=True, overflow="ellipsis")
        if not self._going.is_set():
            head.append("standing still, p goes on  ", "bold yellow")
        if self.lost:
            head.append(f"the broker is lost ({core.line(self.lost)}); trying again", "bold red")
        elif silent_s := self._silent_s():
            head.append(f"the broker has not answered for {silent_s:.0f} s", "bold red")
        elif self.snapshot is not None:
            head.append(core.line(self.snapshot.status["broker"]), "bold")
            head.append(f"  {core.facts(self.snapshot.status)}; at {core.line(self._client.address)}")
        else:
            head.append("asking ...")
        if not self.query("#head"):
            return  # it is being left
        self.query_one("#head", Static).update(head)
        self.query_one("#panes").set_class(bool(self.lost or self._silent_s()), "stale")
        self.call_after_refresh(self.shown.set)

    def _silent_s(self) -> float:
        """How long the broker has owed an answer; 0: not longer than it may."""
        waited = asyncio.get_running_loop().time() - self._asked_at
        return waited if self._asked_at and waited > SILENT_S else 0.0

    def _on_link(self, lost: str) -> None:
        self.lost = lost
        if lost:
            self._linked.clear()
        else:
            self._gatherer.forget()
            self._events.clear()
            self._curves.clear()
            self._linked.set()
        self._show_head()

    def _on_trouble(self, error: LlamboError) -> None:
        """Without a broker the head says so already."""
        if not self.lost:
            self.notify(core.line(error.text), severity="warning", markup=False)

    # --- keys ----------------------------------------------------------------------------------------------------

    @property
    def pane(self) -> Pane | None:
        """The table that has the keyboard."""
        return self.focused if isinstance(self.focused, Pane) else None

    def action_pane(self, name: str) -> None:
        self.query_one(f"#{name}").focus()

    def action_keys(self) -> None:
        self.push_screen(Page("keys", KEYS.strip("\n")))

    def action_sort(self) -> None:
        if self.pane is not None:
            self.pane.sort_by_next()

    def action_turn(self) -> None:
        if self.pane is not None:
            self.pane.turn()

    def action_pause(self) -> None:
        if self._going.is_set():
            self._going.clear()
        else:
            self._going.set()
        self._show_head()

    def action_filter(self) -> None:
        pane = self.pane or self.workers_pane
        entry = self.query_one("#filter", Input)
        entry.display = True
        entry.border_title = pane.id
        entry.value = pane.wanted
        entry.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        if event.input.display:
            self.query_one(f"#{event.input.border_title}", Pane).only(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._close_filter()

    def _close_filter(self) -> None:
        entry = self.query_one("#filter", Input)
        entry.display = False
        self.query_one(f"#{entry.border_title}").focus()

    def action_all(self) -> None:
        """Away with the filter: of the table it is being typed for, or else of the one that has the keyboard."""
        entry = self.query_one("#filter", Input)
        if entry.display:
            entry.value = ""
            self.query_one(f"#{entry.border_title}", Pane).only("")
            self._close_filter()
        elif self.pane is not None:
            self.pane.only("")

    def on_resize(self, event: Resize) -> None:
        self._arrange(event.size)
        self.show()

    def _arrange(self, size: Size) -> None:
        panes = self.query_one("#panes")
        panes.set_class(size.width >= WIDE, "wide")
        panes.set_class(size.width < WIDE and size.height < HIGH, "low")

    # --- what changes something ------------------------------------------------------------------------------------

    def action_drain(self, move: bool) -> None:
        worker = self._chosen(self.workers_pane, "worker")
        if worker is None:
            return
        choices = [("d", "drain it: what it runs, it finishes"), ("m", "drain it, and move what it runs elsewhere")]
        text = f"Drain {core.line(worker)}? It gets no new work."

        def answered(key: str | None) -> None:
            if key:
                moving = MODES[key]
                self._do(lambda: self._client.drain(worker, move=moving), _drained)

        self.push_screen(Question(text, choices[::-1] if move else choices), answered)

    def action_undrain(self) -> None:
        worker = self._chosen(self.workers_pane, "worker")
        if worker is None:
            return

        def answered(key: str | None) -> None:
            if key:
                self._do(lambda: self._client.drain(worker, undo=True), _drained)

        self.push_screen(Question(f"Let {core.line(worker)} work again?", [("y", "yes")]), answered)

    def action_cancel(self) -> None:
        id = self._chosen(self.requests_pane, "request")
        if id is None:
            return

        def answered(key: str | None) -> None:
            if key:
                self._do(lambda: self._client.cancel(id), lambda reason: f"{id[: core.ID_DIGITS]} has ended: {reason}")

        self.push_screen(Question(f"Cancel {id}?", [("y", "yes, stop it")]), answered)

    def action_why(self) -> None:
        id = self._chosen(self.requests_pane, "request")
        if id is not None:
            self.push_screen(Story(f"why {id}", lambda: self._client.query("why", id)))

    def on_data_table_row_selected(self) -> None:
        if self.pane is self.requests_pane:
            self.action_why()

    def _chosen(self, pane: Pane, what: str) -> str | None:
        if pane.chosen is None:
            self.notify(f"there is no {what} here", severity="warning", markup=False)
        return pane.chosen

    def _do(self, order: Callable[[], Awaitable[Any]], told: Callable[[Any], str]) -> None:
        async def work() -> None:
            try:
                text, severe = told(await order()), False
            except LlamboError as error:
                text, severe = f"{error.text}; {error.hint}", True
            self.notify(harmless(text), severity="error" if severe else "information", markup=False)

        self.run_worker(work())


def _drained(found: dict[str, Any]) -> str:
    if not found["draining"]:
        return f"{found['worker']} works again"
    return f"{found['worker']} takes no new work; {found['running']} of its requests still run"
