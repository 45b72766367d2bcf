"""`llambo top` on a virtual screen, over a real mesh: every key, and a broker that goes and comes back."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Static

from llambo import Client
from llambo.broker.config import BrokerConfig
from llambo.cli.top import top_app
from llambo.cli.top.top_app import Top
from llambo.cli.top.top_widgets import ConfirmScreen, StoryScreen, TextScreen
from llambo.testing.mesh import Mesh, key_folder, key_of
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import FakeOptions

#: So often a look in these tests.
EVERY_S = 0.15
#: Less than the whole scenario may take, so that the error says what was waited for.
WAIT_S = TIMEOUT_S - 5
SMALL, LARGE = (80, 24), (200, 60)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(workers=2, fake=FakeOptions(slots=2, tokens_per_s=50)) as mesh:
        yield mesh


class LongNotes(Top):
    """Notifications do not expire: tests still read them, and the pilot fails on a widget that is removed."""

    NOTIFICATION_TIMEOUT = 2 * TIMEOUT_S


class Watching:
    """A `Top` that runs, and a client beside it."""

    def __init__(self, app: Top, pilot: Pilot[None], client: Client) -> None:
        self.app = app
        self.pilot = pilot
        self.client = client

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        """After each look that is shown it may have become true, or after what a key has begun."""
        try:
            async with asyncio.timeout(WAIT_S):
                while not condition():
                    self.app.shown.clear()
                    await self.app.shown.wait()
        except TimeoutError:
            raise AssertionError(f"not within {WAIT_S} s: {what}\n{self.screen()}") from None

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    def notes(self) -> list[str]:
        """The texts of its notifications."""
        return [note.message for note in self.app._notifications]

    def head(self) -> str:
        return str(self.app.screen_stack[0].query_one("#head", Static).render())

    def events(self) -> str:
        return str(self.app.query_one("#happened", Static).render())

    def screen(self) -> str:
        """All that is on the screen, as text."""
        width, height = self.app.size
        lines = self.app.screen._compositor.render_strips()
        return "\n".join("".join(segment.text for segment in strip)[:width] for strip in lines[:height])


@asynccontextmanager
async def watching(mesh: Mesh, size: tuple[int, int] = SMALL, **settings: Any) -> AsyncIterator[Watching]:
    async with mesh.client(**settings) as client, mesh.client(**settings) as other:
        app = LongNotes(client, every_s=EVERY_S)
        async with app.run_test(size=size, notifications=True) as pilot:
            await pilot.pause()
            shown = Watching(app, pilot, other)
            await shown.until(lambda: app.snapshot, "a first look")
            yield shown


async def endless(client: Client, count: int) -> list[str]:
    return [await client.submit(f"prompt {number}", max_tokens=100_000) for number in range(count)]


@asynccontextmanager
async def shared(mesh: Mesh, size: tuple[int, int] = SMALL) -> AsyncIterator[Watching]:
    """On the mesh of all these tests: no request is left behind."""
    async with watching(mesh, size) as shown:
        try:
            yield shown
        finally:
            for request in await shown.client.requests():
                await shown.client.cancel(request.id)


# --- looking -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, LARGE])
async def test_workers_requests_and_events_are_on_the_screen(mesh: Mesh, size: tuple[int, int]) -> None:
    async with shared(mesh, size) as shown:
        ids = await endless(shown.client, 5)
        await shown.until(lambda: len(shown.app.requests_pane.keys) == 5, "five requests")
        assert shown.app.workers_pane.keys == ["w0", "w1"]
        assert set(shown.app.requests_pane.keys) == set(ids)
        assert shown.events().count("worker serves") == 2
        for text in ("1 waiting, 4 running", "4 of 4 busy", "workers: 2", "requests: 5", "events",
                     "drain", "cancel", "filter", "leave", *(id[:8] for id in ids if size == LARGE)):  # fmt: skip
            await shown.until(lambda text=text: text in shown.screen(), f"{text!r}")  # type: ignore[misc]


async def test_it_follows_what_changes(mesh: Mesh) -> None:
    async with shared(mesh) as shown:
        [id] = await endless(shown.client, 1)
        await shown.until(lambda: shown.app.requests_pane.keys == [id], "the request")
        pane = shown.app.requests_pane

        def tokens() -> int:
            return int(pane.get_cell(id, "tokens").plain.split("/")[0])

        before = tokens()
        await shown.until(lambda: tokens() > before, "more tokens in the same row")
        await shown.client.cancel(id)
        await shown.until(lambda: pane.keys == [], "no row")
        assert pane.chosen is None


async def test_no_text_of_others_is_read_as_markup() -> None:
    name = "[red]w[/red] [bold"
    with Mesh(workers=0) as mesh:
        mesh.spawn(name).first_line()
        async with shared(mesh, LARGE) as shown:
            await shown.until(lambda: shown.app.workers_pane.keys == [name], "the worker")
            assert name in shown.screen()
            await shown.press("d")
            assert f"Drain {name}?" in shown.screen()
            await shown.press("d")
            await shown.until(lambda: any(name in note for note in shown.notes()), "that it is drained")
            assert name in shown.screen()


async def test_without_an_admin_s_key_there_are_no_events_and_no_draining(tmp_path: Path) -> None:
    folder = key_folder(tmp_path, viewer="client")
    with Mesh(workers=1, keys=folder) as mesh:
        async with watching(mesh, key=key_of(folder, "viewer")) as shown:
            await shown.until(lambda: shown.app.snapshot and shown.app.snapshot.no_events, "why there are none")
            assert "admin" in shown.events()
            await shown.press("d", "d")
            await shown.until(lambda: any("admin" in note for note in shown.notes()), "that it may not")


# --- keys ----------------------------------------------------------------------------------------------


async def test_a_worker_is_drained_and_undrained_after_a_question(mesh: Mesh) -> None:
    async with shared(mesh) as shown:
        app = shown.app

        def state() -> str:
            return app.workers_pane.get_cell("w1", "state").plain

        await shown.press("1", "down", "d")
        assert isinstance(app.screen, ConfirmScreen) and "Drain w1?" in shown.screen()
        await shown.press("n")
        await shown.press("d", "escape", "u", "n")
        assert not isinstance(app.screen, ConfirmScreen)
        assert shown.notes() == []
        await shown.press("d", "d")
        await shown.until(lambda: state() == "drained", "w1 is drained")
        assert any("w1 takes no new work" in note for note in shown.notes())
        await shown.press("u", "y")
        await shown.until(lambda: state() == "ready", "w1 works again")
        await endless(shown.client, 2)
        await shown.press("m", "m")
        await shown.until(lambda: state() == "drained", "w1 is drained, and what it ran is at w0")
        await shown.until(lambda: app.workers_pane.get_cell("w0", "busy").plain == "2/2", "both are at w0")
        await shown.press("u", "y")
        await shown.until(lambda: state() == "ready", "w1 works again")


async def test_a_request_is_cancelled_after_a_question(mesh: Mesh) -> None:
    async with shared(mesh) as shown:
        await shown.press("c")
        assert shown.notes() == ["there is no request here"]
        await endless(shown.client, 2)
        await shown.until(lambda: len(shown.app.requests_pane.keys) == 2, "two requests")
        await shown.press("2", "down", "c")
        first, second = shown.app.requests_pane.keys
        assert f"Cancel {second}?" in shown.screen()
        await shown.press("escape", "c", "y")
        await shown.until(lambda: shown.app.requests_pane.keys == [first], "the other one is left")
        await shown.until(lambda: f"{second[:8]} has ended: cancelled" in shown.notes(), "how it ended")
        assert shown.app.requests_pane.chosen == first


@pytest.mark.parametrize("key", ["w", "enter"])
async def test_the_story_of_a_request_is_shown_and_goes_on(mesh: Mesh, key: str) -> None:
    async with shared(mesh) as shown:
        [id] = await endless(shown.client, 1)
        await shown.until(lambda: shown.app.requests_pane.keys == [id], "the request")
        await shown.press("2", key)
        story = shown.app.screen
        assert isinstance(story, StoryScreen)
        await shown.until(lambda: f"request {id}: running" in story.text and "dispatched" in story.text, "its story")
        await shown.client.cancel(id)
        await shown.until(lambda: "ended (cancelled)" in story.text, "its end")
        await shown.press("escape")
        assert shown.app.screen is not story


async def test_rows_are_filtered_as_one_types(mesh: Mesh) -> None:
    async with shared(mesh) as shown:
        app = shown.app
        await shown.press("1", "slash", *"w1")
        await shown.until(lambda: app.workers_pane.keys == ["w1"], "only w1")
        assert "workers: 1 of 2 with 'w1'" in shown.screen()
        await shown.press("enter")
        assert not app.query_one("#filter", Input).display and app.pane is app.workers_pane
        await shown.press("slash", "backspace", "backspace", *"nix")
        await shown.until(lambda: app.workers_pane.keys == [], "nothing")
        await shown.press("d")  # a letter of the filter
        assert not isinstance(app.screen, ConfirmScreen)
        await shown.press("escape")
        await shown.until(lambda: app.workers_pane.keys == ["w0", "w1"], "all")
        await shown.press("slash", *"w0", "enter", "escape")
        assert app.workers_pane.keys == ["w0", "w1"]


async def test_rows_are_sorted_by_any_column_and_the_cursor_stays_with_its_row(mesh: Mesh) -> None:
    async with shared(mesh) as shown:
        pane = shown.app.workers_pane
        await shown.press("1", "down")
        assert pane.chosen == "w1"
        await shown.press("r")
        assert (pane.keys, pane.chosen) == (["w1", "w0"], "w1")
        assert "worker▼" in shown.screen()
        await shown.press("s")
        assert "state▼" in shown.screen()
        await shown.press(*"s" * (len(pane.columns) - 1), "r")
        assert "worker▲" in shown.screen()
        assert pane.keys == ["w0", "w1"]


async def test_panes_are_switched_and_it_stands_still_and_helps_and_leaves(mesh: Mesh) -> None:
    async with shared(mesh) as shown:
        app = shown.app
        focused = []
        for key in ("1", "2", "3", "tab", "tab"):
            await shown.press(key)
            focused.append(app.focused.id if app.focused else None)
        assert focused == ["workers", "requests", "events", "workers", "requests"]
        await shown.press("p")
        assert "paused" in shown.head()
        before = app.snapshot
        await shown.press("question_mark")
        assert isinstance(app.screen, TextScreen) and "drain the worker" in shown.screen()
        await shown.press("escape")
        await shown.press("p")
        await shown.until(lambda: app.snapshot is not before, "it goes on")
        assert "paused" not in shown.head()
        await shown.pilot.resize_terminal(*LARGE)
        await shown.pilot.pause()
        assert app.query_one("#panes").has_class("wide")
        await shown.press("q")
        assert not app.is_running


async def test_without_colour_everything_is_shown_in_words(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with shared(mesh) as shown:
        assert shown.app.no_color and shown.app.native_ansi_color and shown.app.has_class("plain")
        cursor = shown.app.workers_pane.get_component_styles("datatable--cursor")
        assert cursor.text_style.reverse
        assert "ready" in shown.screen()


# --- without a broker ----------------------------------------------------------------------------------


async def test_a_broker_that_is_lost_is_shown_and_so_is_its_return() -> None:
    config = BrokerConfig.of(client_lease_ms=1_000)
    with Mesh(workers=1, broker="process", config=config) as mesh:
        async with watching(mesh) as shown:
            app = shown.app
            await shown.until(lambda: app.workers_pane.keys == ["w0"], "the worker")
            assert mesh.process is not None
            mesh.process.send(signal.SIGKILL)
            await shown.until(lambda: "the broker is lost" in shown.head(), "that it is lost")
            assert app.query_one("#panes").has_class("stale") and app.workers_pane.keys == ["w0"]
            await asyncio.to_thread(mesh.restart_broker, signal.SIGKILL)
            seen = app.snapshot
            await shown.until(lambda: not app.lost and app.snapshot is not seen, "that it is back")
            await shown.until(lambda: app.workers_pane.keys == ["w0"], "the worker is back")
            await shown.until(lambda: "workers ready" in shown.head(), "the head of a broker that answers")
            await shown.until(lambda: not app.query_one("#panes").has_class("stale"), "bright tables")
            # Those of the new broker, and of it alone.
            await shown.until(lambda: shown.events().count("worker joined") == 1, "its events")


async def test_a_broker_that_is_suspended_is_shown_as_silent(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_app, "SILENT_S", 0.5)
    async with shared(mesh) as shown:
        with mesh.held():
            await shown.until(lambda: "the broker has not answered for" in shown.head(), "that it does not answer")
        await shown.until(lambda: "workers ready" in shown.head(), "that it goes on")


async def test_a_key_that_is_revoked_is_shown(tmp_path: Path) -> None:
    folder = key_folder(tmp_path, viewer="client")
    with Mesh(workers=0, keys=folder) as mesh:
        async with watching(mesh, key=key_of(folder, "viewer")) as shown:
            folder.revoke("viewer")
            await shown.until(lambda: "the broker is lost (" in shown.head(), "that it is out")
            assert "key" in shown.head()
