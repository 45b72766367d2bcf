"""The line that explains a wait: its text, and when it is shown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from llambo.cli.chat.screen import FIRST_S, STALL_S, Waiting
from llambo.mesh.client.answer_stream import Stream
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.reports import RequestStory


class Broker:
    """Asked what became of a request."""

    def __init__(self) -> None:
        self.asked = 0
        self.story: dict[str, Any] = {"state": "running", "worker": "w1", "moves": 0}
        self.error: LlamboError | None = None

    async def why(self, id: str) -> RequestStory:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return RequestStory(**self.story)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


class Scene:
    def __init__(self) -> None:
        self.broker = Broker()
        self.stream = Stream(b"x" * 16, lambda event: None, mine=True)
        self.lost = ""
        self.waiting = Waiting(self.broker, self.stream, lambda: self.lost)  # type: ignore[arg-type]

    async def line(self) -> str:
        """The line after the broker has answered."""
        self.waiting.line()
        for _ in range(3):
            await asyncio.sleep(0)
        return self.waiting.line()


def play(monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Scene, Clock], Any]) -> None:
    async def run() -> None:
        clock = Clock(monkeypatch)
        scene = Scene()
        try:
            await scenario(scene, clock)
        finally:
            scene.waiting.close()

    # The event loop has its own clock, which must advance.
    loop_time = time.monotonic
    monkeypatch.setattr(asyncio.BaseEventLoop, "time", lambda self: loop_time())
    asyncio.run(run())


def test_there_is_no_line_while_tokens_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene, clock: Clock) -> None:
        assert scene.waiting.line() == ""
        scene.waiting.on_piece()
        clock.now += STALL_S - 0.1
        assert scene.waiting.line() == ""
        scene.waiting.on_piece()
        clock.now += STALL_S - 0.1
        assert scene.waiting.line() == ""
        assert scene.broker.asked == 0

    play(monkeypatch, scenario)


def test_the_place_in_the_queue_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene, clock: Clock) -> None:
        scene.stream._set_place(3, "tiny", fake=False)
        assert scene.waiting.line() == "waiting, 3 ahead"
        scene.stream._set_place(0, "tiny", fake=False)
        assert scene.waiting.line() == ""
        clock.now += FIRST_S + 3
        assert await scene.line() == "waiting for 4 s (w1 has it)"

    play(monkeypatch, scenario)


def test_a_stall_is_shown_with_what_became_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene, clock: Clock) -> None:
        scene.waiting.on_piece()
        clock.now += 3
        scene.broker.story = {"state": "waiting", "worker": "", "moves": 0}
        assert await scene.line() == "nothing for 3 s (no worker has it now)"
        clock.now += 1
        assert await scene.line() == "nothing for 4 s (no worker has it now)"
        assert scene.broker.asked == 1, "asked again only after a while"
        clock.now += 2
        scene.broker.story = {"state": "running", "worker": "w\x1b2", "moves": 1}
        assert await scene.line() == "nothing for 6 s (its worker is lost, w�2 has it now)"
        scene.waiting.on_piece()
        assert scene.waiting.line() == ""

    play(monkeypatch, scenario)


def test_a_broker_that_cannot_say_or_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene, clock: Clock) -> None:
        scene.waiting.on_piece()
        clock.now += 3
        scene.broker.error = LlamboError(Code.NO_BROKER, "gone")
        assert await scene.line() == "nothing for 3 s"
        scene.lost = "the broker is gone"
        assert scene.waiting.line() == "lost the broker (the broker is gone); trying again"

    play(monkeypatch, scenario)
