"""What `llambo send` shows while no token comes: the word that it holds, and what the request waits for."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import struct
import termios
from typing import Any, cast

import pytest

from llambo.cli.kit import answer_views, follow
from llambo.cli.kit.answer_views import Clock, StdoutWriter, TextView, View, statistics_line
from llambo.cli.kit.follow import cut_text, stall_text, unknown_text
from llambo.mesh.client.answer_stream import Answer, Piece, Stream
from llambo.mesh.client.client import Client
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.messages import Usage
from llambo.mesh.wire.reports import RequestStory, StoryStep


def test_a_word_that_is_not_complete_is_held_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.openpty()
    fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    stream = Stream(b"i" * 16, lambda event: None, mine=True)

    def shown(text: bytes) -> bool:
        """The kernel may pass on in parts what was written."""
        got = b""
        while len(got) < len(text):
            assert select.select([read], [], [], 30.0)[0], got
            got += os.read(read, len(text) - len(got))
        return got == text

    async def run() -> None:
        with contextlib.closing(StdoutWriter(write)) as out:
            view = TextView(out, stream)
            # Given a piece that ends within a word
            monkeypatch.setattr(answer_views, "HOLD_S", 60.0)
            view.piece(Piece("it is the fu", [1], 0))
            assert (view.frame() or 0) > asyncio.get_running_loop().time() + 30
            assert shown(b"it is the ")
            # When the moment is over
            monkeypatch.setattr(answer_views, "HOLD_S", 0.0)
            view.piece(Piece("t", [2], 1))
            assert view.frame() is None
            # Then what is here of it is shown, and the rest goes on there
            assert shown(b"fut")
            view.piece(Piece("ure now", [3], 2))
            assert shown(b"ure ")
            view.close()
            assert shown(b"now\r\n")

    asyncio.run(run())
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    ("moves", "losses", "text"),
    [(0, 0, "never moved"), (2, 0, "moved 2 times"), (0, 1, "broker lost 1 time"),
     (1, 2, "moved 1 time, broker lost 2 times")],
)  # fmt: skip
def test_after_a_lost_broker_it_is_not_known_that_an_answer_never_moved(moves: int, losses: int, text: str) -> None:
    answer = Answer("", [], "stop", Usage(), "w", moves, "ab" * 16, 3)
    clock = Clock()
    clock.broker_losses = losses
    assert f", worker w, {text}, stop, id " in statistics_line(answer, clock)


@pytest.mark.parametrize(
    ("state", "fields", "text"),
    [
        ("waiting", {"ahead": 2}, "waiting for a free worker, 2 ahead"),
        ("waiting", {"waits_for": "a worker with ctx 2048; b has ctx 4096", "moves": 1},
         "waiting for a worker with ctx 2048; b has ctx 4096; lost: worker a: silent"),
        ("dispatched", {}, "waiting for w, which has not accepted it yet"),
        ("running", {"tokens": 7}, "waiting for w, which has made 7 tokens"),
        ("running", {"tokens": 7, "moves": 1}, "waiting for w, which continues the answer, which has 7 tokens"),
        ("completing", {}, "waiting for the last tokens from w, which were lost on their way"),
        ("ended", {}, "waiting for the end of the answer"),
    ],
)  # fmt: skip
def test_why_no_token_comes(state: str, fields: dict[str, Any], text: str) -> None:
    story = [StoryStep(what="submitted"), StoryStep(what="lost", detail="worker a: silent"), StoryStep(what="waits")]
    assert stall_text(RequestStory(state=state, worker="w", story=story, **fields)) == text


def test_a_broker_that_was_restarted_has_not_lost_the_answer() -> None:
    text = unknown_text(LlamboError(Code.UNKNOWN_REQUEST, "no request 3f2a is known here"))
    assert text == "waiting: the broker was restarted, and the request is being brought back to it"


@pytest.mark.parametrize("waits_for", ["a worker of m, all of which are drained", ""])
def test_in_a_pipe_it_is_said_once_what_has_to_come(monkeypatch: pytest.MonkeyPatch, waits_for: str) -> None:
    monkeypatch.setattr(follow, "QUIET_STALL_S", 0.01)
    said: list[str] = []
    asked: list[str] = []
    monkeypatch.setattr(Stream, "over", property(lambda stream: len(asked) > 2))
    stream = Stream(b"i" * 16, lambda event: None, mine=True)

    class Asked:
        async def why(self, id: str) -> RequestStory:
            asked.append(id)
            return RequestStory(state="waiting", waits_for=waits_for)

    class Said(View):
        def stalled(self, reason: str, quiet_s: float) -> None:
            said.append(reason)

    async def run() -> None:
        async with asyncio.timeout(60):
            await follow._explain_once(cast(Client, Asked()), stream, Said(), Clock())

    asyncio.run(run())
    assert said == ([f"waiting for {waits_for}"] if waits_for else [])
    assert len(asked) == (1 if waits_for else 3)


@pytest.mark.parametrize(
    ("tokens", "most", "text"),
    [
        (256, 256, "cut after 256 tokens; --max-tokens allows more"),
        (100, 256, "cut after 100 tokens: the context is full"),
        (1, 0, "cut after 1 token; --max-tokens of `llambo send` allows more"),
    ],
)
def test_an_answer_that_was_cut_says_what_allows_more(tokens: int, most: int, text: str) -> None:
    assert cut_text(tokens, most) == text
