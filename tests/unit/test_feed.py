"""What readers of a gateway have not taken is bounded over all answers, and nothing of it is lost; and feeds that are
taken over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import zmq

from llambo.gateway.access import Caller
from llambo.gateway.answers.api import StreamEvent, Submission
from llambo.gateway.answers.feed import STREAM_TOKENS, Feed, Feeds, Place, prompts_of
from llambo.gateway.answers.rendering import Rendering
from llambo.gateway.answers.unread import AHEAD_BYTES, Unread
from llambo.mesh.client import client_events as e
from llambo.mesh.client.answer_stream import Stream
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.identity import ANYONE

TOKENS = 20_000
LIMIT_BYTES = 1024 * 1024
PIECE = b"word "


class Answering:
    """The end of the mesh: makes an answer as fast as it is taken, as the core of a client does."""

    def __init__(self, number: int) -> None:
        self.sent = 0
        self.held = False
        self.stream = Stream(number.to_bytes(16, "big"), self._handle, mine=True)

    def _handle(self, event: e.Event) -> None:
        match event:
            case e.ReaderBehind():
                self.held = True
            case e.ReaderCaughtUp():
                self.held = False

    def step(self) -> None:
        if self.held or self.stream.over:
            return
        ids = list(range(self.sent, min(self.sent + 100, TOKENS)))
        self.stream._deliver(ids, [PIECE] * len(ids), [])
        self.sent += len(ids)
        if self.sent == TOKENS:
            self.stream._set_end(m.End(bytes(16), TOKENS, "length"))


class Plain:
    """A renderer whose events are the tokens."""

    def begin(self, head: Any) -> list[StreamEvent]:
        return []

    def token(self, token: Any) -> list[StreamEvent]:
        return [StreamEvent(token.id)]

    def end(self, choice: int, answer: Any) -> list[StreamEvent]:
        return []

    done = failed = body = begin


async def until_idle(answers: list[Answering]) -> None:
    before = -1
    while (now := sum(answer.sent for answer in answers)) != before:
        before = now
        for _ in range(300):
            for answer in answers:
                answer.step()
            await asyncio.sleep(0)


def begin(feeds: Feeds, count: int) -> tuple[list[Answering], list[Feed]]:
    caller = Caller(ANYONE, "tcp://127.0.0.1:1", None, zmq.Context.instance())
    answers = [Answering(number) for number in range(count)]
    return answers, [feeds._add(caller, [answer.stream], None, model="m", digest=b"", created=0) for answer in answers]


async def test_what_is_not_taken_is_bounded_and_comes_when_it_is() -> None:
    feeds = Feeds(1_000, [], Unread(LIMIT_BYTES))
    answers, begun = begin(feeds, 8)
    readers = [Rendering(feed, Plain()) for feed in begun]  # type: ignore[arg-type]
    await until_idle(answers)
    # Without a reader the rest of each answer stays in the mesh
    held = sum(feed.tokens.bytes for feed in begun)
    assert LIMIT_BYTES <= held < LIMIT_BYTES + len(begun) * (AHEAD_BYTES + STREAM_TOKENS * 1_000)
    assert all(answer.held for answer in answers)
    # and one that reads is served, although the others keep all that is allowed.
    found: list[Any] = []
    while not readers[0].finished:
        await until_idle(answers[:1])
        while (events := readers[0].events()) or readers[0].behind:
            found += [event.data for _, event in events]
    assert found == list(range(TOKENS))
    assert feeds.unread.bytes < LIMIT_BYTES + len(begun) * (AHEAD_BYTES + STREAM_TOKENS * 1_000)
    # What a reader takes makes room for others, and when all have gone nothing is counted.
    feeds.drop(begun[0], "read")
    for feed in begun[1:]:
        feeds.drop(feed, "its client is gone")
    assert feeds.unread.bytes == 0
    readers[1].events()  # a connection may still be there
    assert feeds.unread.bytes == 0


async def test_below_the_bound_an_answer_is_fetched_whole() -> None:
    feeds = Feeds(1_000, [], Unread(64 * 1024 * 1024))
    answers, begun = begin(feeds, 2)
    await until_idle(answers)
    assert all(feed.over for feed in begun), "the mesh need not keep what the gateway has room for"
    feeds.close()


# --- feeds that are taken over -------------------------------------------------------------------------------


class Taking(Caller):
    """A caller whose client answers what it is asked to resume, and remembers with which options."""

    def __init__(self) -> None:
        super().__init__(ANYONE, "tcp://127.0.0.1:1", None, zmq.Context.instance())
        self.resumed: list[dict[str, Any]] = []
        self.streams: list[Stream] = []

    async def client_with(self, requests: Sequence[str]) -> Any:
        return self

    def resume(self, prompt: str, **options: Any) -> Stream:
        self.resumed.append({"prompt": prompt, **options})
        self.streams.append(Stream(bytes.fromhex(options["id"]), lambda _: None, mine=True))
        return self.streams[-1]


ID = "0123456789abcdef" * 2


async def test_another_gateway_makes_the_same_requests_of_the_body() -> None:
    submission = Submission("x", {"seed": 5, "deadline_ms": 60_000}, choices=2, more=("y",))
    first = prompts_of(submission, ID)
    caller, created = Taking(), int(time.time()) - 10
    await Feeds(1_000, [], Unread(LIMIT_BYTES)).resume(caller, Place(ID, created, (1,) * 5, 0), submission, b"")
    assert [each["id"] for each in caller.resumed] == [options["id"] for _, options in first]
    assert len({each["id"] for each in caller.resumed}) == 4 and caller.resumed[0]["id"] == ID
    assert [(each["prompt"], each["seed"]) for each in caller.resumed] == [("x", 5), ("x", 6), ("y", 5), ("y", 6)]
    assert {each["deadline_ms"] // 1_000 for each in caller.resumed} <= {49, 50}


async def test_a_feed_that_failed_for_now_is_begun_again() -> None:
    caller, feeds = Taking(), Feeds(1_000, [], Unread(LIMIT_BYTES))
    place, submission = Place(ID, 0, (3,), 0), Submission("x", {})
    for code, resumed in ((Code.NO_BROKER, 2), (Code.ENGINE_FAILED, 2)):
        feed = await feeds.resume(caller, place, submission, b"")
        failed = asyncio.Event()
        feed.watch(failed, failed.set)
        caller.streams[-1]._set_error(LlamboError(code, "it failed"))
        await failed.wait()
        feed.unwatch(failed)
        assert feed.over
        feeds.reader_left(feed, finished=True)
        await feeds.resume(caller, place, submission, b"")
        assert len(caller.resumed) == resumed
