"""The bridge without sockets and without a mesh: what is sent on one connection, and what comes back."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llambo.bridge import server
from llambo.bridge.connection import WRITE_BYTES, Connection, ConnectionLimits
from llambo.bridge.holds import HOLD_MS, Holds
from llambo.bridge.protocol import COMMANDS, LIST_PARTS, Command, LineParser, Mistake, ObjectParser, Parser
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.reports import HoldReply, ModelHost, ModelRow

MODELS = [ModelRow(model="small", workers=2), ModelRow(model="large", workers=1)]
STATUS = {"broker": "b", "models": [{"model": "large", "workers": 1}]}
NUMBERS = {"connections": 1, "answers": 1}
#: The fields of an answer besides its text.
ANSWER = {"reason": "stop", "id": "i", "model": "m", "tokens": 2, "prompt_tokens": 1, "worker": "w", "moves": 0,
          "queued_ms": 3}  # fmt: skip


@dataclass(eq=False)
class Question:
    """One call to the mesh ("status", "models" or "infer"), which waits until the test answers it."""

    what: str
    prompt: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    pieces: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    result: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    cancelled: bool = False

    @property
    def streamed(self) -> bool:
        return bool(self.options["stream"])


class FakeStream:
    """Stands for a stream of the client."""

    model = "m"

    def __init__(self, mesh: FakeMesh, question: Question) -> None:
        self._mesh, self._question = mesh, question
        self.answer: Any = None

    async def __aenter__(self) -> FakeStream:
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self._question.cancelled = kind is asyncio.CancelledError
        self._mesh.open.remove(self._question)

    async def next_piece(self) -> Any:
        piece = await self._question.pieces.get()
        if isinstance(piece, Exception):
            raise piece
        if isinstance(piece, str):
            return SimpleNamespace(text=piece)
        self.answer = piece
        return None


class FakeMesh:
    """A client whose calls are answered by the test."""

    def __init__(self) -> None:
        self.questions: list[Question] = []
        self.open: list[Question] = []
        self.rows = MODELS
        #: What was held and given back: the model, and the number of the connection.
        self.orders: list[tuple[str, str, str]] = []

    async def hold_model(self, model: str, *, holder: str, ttl_ms: int, **_: object) -> HoldReply:
        assert ttl_ms == HOLD_MS
        self.orders.append(("hold", model, holder[-1]))
        return HoldReply(model=model, state="stored", holder=holder)

    async def release_model(self, model: str, *, holder: str, **_: object) -> HoldReply:
        self.orders.append(("release", model, holder[-1]))
        return HoldReply(model=model, holder=holder)

    def stream(self, prompt: str, **options: Any) -> FakeStream:
        return FakeStream(self, self._ask(Question("infer", prompt, options)))

    async def query(self, what: str) -> Any:
        return await self._wait(self._ask(Question(what)))

    async def models(self) -> list[ModelRow]:
        found: list[ModelRow] = await self._wait(self._ask(Question("models")))
        return found

    def _ask(self, question: Question) -> Question:
        self.questions.append(question)
        self.open.append(question)
        return question

    async def _wait(self, question: Question) -> Any:
        try:
            return await question.result
        except asyncio.CancelledError:
            question.cancelled = True
            raise
        finally:
            self.open.remove(question)


class FakeTransport(asyncio.Transport):
    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self.written = bytearray()
        self.reading = True
        self.closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        assert name == "socket"
        return SimpleNamespace(fileno=lambda: 3)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == WRITE_BYTES

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed, "written after the end"
        self.written += data

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.closed
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self._connection.connection_lost, None)

    abort = close


class FakeBridge:
    def __init__(self, limits: ConnectionLimits) -> None:
        self.mesh = FakeMesh()
        client: Any = self.mesh
        self.client = client
        self.connection_limits = limits
        self.holds = Holds(client)
        self.connections = 0
        self.empty = asyncio.Event()
        self.stopped = False

    def joined(self, connection: Connection, descriptor: int) -> None:
        self.connections += 1

    def left(self, descriptor: int) -> None:
        self.connections -= 1
        self.empty.set()

    def stop(self) -> None:
        self.stopped = True

    def numbers(self) -> dict[str, int]:
        return NUMBERS


RUNNERS: list[asyncio.Runner] = []
FAILURES: list[dict[str, Any]] = []


@pytest.fixture(autouse=True)
def _loop() -> Iterator[None]:
    with asyncio.Runner() as runner:
        RUNNERS.append(runner)
        runner.get_loop().set_exception_handler(lambda _, context: FAILURES.append(context))
        yield
    RUNNERS.clear()
    assert FAILURES == []


class Peer:
    """The other end of a connection, and the mesh behind it. Each call returns when the connection waits again."""

    def __init__(self, limits: ConnectionLimits | None = None) -> None:
        self.loop = RUNNERS[0].get_loop()
        self.bridge = FakeBridge(limits or ConnectionLimits())
        self.mesh = self.bridge.mesh
        self.connection = Connection(self.bridge)
        self.transport = FakeTransport(self.connection)
        self.unread: list[bytes] = []
        self.ended = False
        self.do(lambda: self.connection.connection_made(self.transport))

    def do(self, act: Callable[[], object]) -> None:
        self.loop.call_soon(act)
        self.settle()

    def settle(self) -> None:
        quiet, before = 0, None
        while quiet < 5:
            self._receive()
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
            now = (len(self.written), len(self.mesh.questions), len(self.mesh.open), self.reads, self.closed,
                   self.connection.answers)  # fmt: skip
            quiet, before = (quiet + 1, before) if now == before else (0, now)

    def _receive(self) -> None:
        """As asyncio: a paused transport leaves bytes in the socket, and the end comes after the bytes."""
        if self.reads and not self.closed and self.unread:
            self.connection.data_received(self.unread.pop(0))
        elif self.reads and not self.closed and self.ended:
            self.ended = False
            self.connection.eof_received()

    def send(self, data: bytes) -> None:
        self.unread.append(data)
        self.settle()

    def finish(self) -> None:
        self.ended = True
        self.settle()

    def say(self, *lines: str | bytes) -> list[dict[str, Any]]:
        """What is answered to these lines at once."""
        before = len(self.written)
        for line in lines:
            self.send(line.encode() + b"\n" if isinstance(line, str) else line)
        return objects(self.written[before:])

    def text(self, question: Question, text: str) -> None:
        self.do(lambda: question.pieces.put_nowait(text))

    def fail(self, question: Question, error: Exception) -> None:
        self.do(lambda: question.pieces.put_nowait(error))

    def answer(self, question: Question | None = None) -> None:
        question = question or self.mesh.open[0]
        if question.what == "infer":
            prompt = question.prompt
            for piece in (prompt[:1], prompt[1:]):
                self.text(question, piece)
            whole = SimpleNamespace(text=prompt, reason="stop", id="i", ids=[1, 2], worker="w", moves=0, queued_ms=3,
                                     usage=SimpleNamespace(prompt_tokens=1), fake=False)  # fmt: skip
            self.do(lambda: question.pieces.put_nowait(whole))
        else:
            answer = self.mesh.rows if question.what == "models" else STATUS
            self.do(lambda: question.result.set_result(answer))

    def answer_all(self) -> None:
        while self.mesh.open:
            self.answer()

    @property
    def written(self) -> bytes:
        return bytes(self.transport.written)

    @property
    def asked(self) -> list[Question]:
        return [question for question in self.mesh.questions if question.what == "infer"]

    @property
    def closed(self) -> bool:
        return self.transport.closed

    @property
    def reads(self) -> bool:
        return self.transport.reading


def objects(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.decode().splitlines()]


def unpacked(data: bytes) -> list[dict[str, Any]]:
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    return [dict(value) for value in unpacker]


def refusal(line: str | bytes, limits: ConnectionLimits | None = None) -> str:
    """The line is refused, and the connection stays open."""
    peer = Peer(limits)
    (reply,) = peer.say(line)
    assert reply["status"] == "error"
    assert set(reply["data"]) == {"code", "hint", "retryable"}
    assert peer.say("PING")[-1]["message"] == "pong"
    return str(reply["message"])


# --- commands ------------------------------------------------------------------------------------------------


def test_a_ping_is_answered() -> None:
    assert Peer().say("PING") == [{"status": "ok", "message": "pong", "data": {}}]


@pytest.mark.parametrize("line", ["ping", "Ping\r", "  PING  ", "PING {}", 'PING {"tag": null}'])
def test_a_command_may_be_written_in_many_ways(line: str) -> None:
    assert Peer().say(line)[0]["message"] == "pong"


@pytest.mark.parametrize("line", ["", "\r", "   ", "\t"])
def test_an_empty_line_is_no_command(line: str) -> None:
    assert Peer().say(line) == []


def test_a_whole_answer() -> None:
    peer = Peer()
    assert peer.say("INFER  What is AI?") == []
    (asked,) = peer.asked
    assert (asked.prompt, asked.options) == (" What is AI?", {"form": "user", "sampling": {}, "stream": False})
    peer.answer()
    assert objects(peer.written) == [{"status": "ok", "message": "stop", "data": {"text": " What is AI?", **ANSWER}}]


def test_an_answer_as_it_comes() -> None:
    peer = Peer()
    peer.say("INFER_STREAM hi")
    assert peer.asked[0].streamed
    peer.answer()
    assert objects(peer.written) == [
        {"type": "token", "token": "h", "final": False},
        {"type": "token", "token": "i", "final": False},
        {"type": "token", "token": "", "final": True, "status": "ok", "message": "stop", "data": ANSWER},
    ]


def test_options_go_where_they_belong() -> None:
    peer = Peer()
    peer.say('INFER {"prompt": "p", "max_tokens": 5, "top_k": 3, "temperature": 0, "stop": "x", "system": "s", '
             '"logit_bias": {"7": -1.5}, "form": "text", "seed": null}')  # fmt: skip
    (asked,) = peer.asked
    assert asked.prompt == "p"
    assert asked.options == {
        "form": "text", "max_tokens": 5, "temperature": 0, "stop": "x", "system": "s", "stream": False,
        "sampling": {"top_k": 3, "logit_bias": {7: -1.5}},
    }  # fmt: skip


def test_messages_are_a_prompt_too() -> None:
    peer = Peer()
    peer.say('INFER {"messages": [{"role": "user", "content": "hi"}]}')
    (asked,) = peer.asked
    assert asked.options["form"] == "messages"
    assert json.loads(asked.prompt) == [{"role": "user", "content": "hi"}]


def test_a_model_is_chosen_for_the_connection() -> None:
    peer = Peer()
    for line in ("LOAD large", "INFER hi", 'INFER {"prompt": "hi", "model": "small"}'):
        peer.say(line)
        peer.answer()
    assert peer.say("FREE") == [{"status": "ok", "message": "free", "data": {"model": "large"}}]
    peer.say("INFER hi")
    assert [asked.options.get("model") for asked in peer.asked] == ["large", "small", None]


def test_a_model_that_is_not_there_is_not_chosen() -> None:
    peer = Peer()
    peer.say("LOAD huge")
    peer.answer()
    (reply,) = objects(peer.written)
    assert reply["data"]["code"] == "unknown_model" and "small, large" in reply["message"]
    assert peer.say("FREE")[0]["data"] == {"model": ""}


def test_the_status_shows_what_was_chosen() -> None:
    peer = Peer()
    peer.say("LOAD large")
    peer.answer()
    peer.say("STATUS")
    peer.answer()
    loaded = [{"model": "large", "state": "ready"}]
    data = {"model": "large", "loaded": loaded, "bridge": NUMBERS, "mesh": STATUS}
    assert objects(peer.written)[-1] == {"status": "ok", "message": "up", "data": data}


HOSTED = [ModelRow(model=name, hosts=[ModelHost(host="box", state="ready")]) for name in ("a", "b")]


def test_load_holds_a_model_until_free_or_the_end_of_the_connection() -> None:
    peer = Peer()
    peer.mesh.rows = HOSTED
    for line in ("LOAD a", "LOAD b"):
        peer.say(line)
        peer.answer_all()
    assert [reply["message"] for reply in objects(peer.written)] == ["loaded", "loaded"]
    assert peer.mesh.orders == [("hold", "a", "1"), ("hold", "b", "1")]
    # Requests go to the model that was loaded last, and after it was given back to the one before it
    peer.say('INFER {"prompt": "hi", "tag": 1}')
    assert peer.say("FREE b")[0]["data"] == {"model": "b"}
    peer.say('INFER {"prompt": "hi", "tag": 2}')
    assert [asked.options["model"] for asked in peer.asked] == ["b", "a"]
    assert peer.say("FREE b")[0]["message"] == "b is not loaded on this connection"
    peer.say("QUIT")
    assert peer.mesh.orders[2:] == [("release", "b", "1"), ("release", "a", "1")]


def test_a_peer_that_goes_while_its_model_is_loaded_holds_nothing() -> None:
    peer = Peer()
    peer.mesh.rows = [ModelRow(model="a", hosts=[ModelHost(host="box", state="loading", percent=41)])]
    peer.say("LOAD a")
    for _ in range(2):
        peer.answer()
    peer.do(peer.transport.abort)
    assert peer.mesh.orders == [("hold", "a", "1"), ("release", "a", "1")]


def test_a_load_that_fails_is_undone_and_says_why() -> None:
    peer = Peer()
    peer.mesh.rows = [
        ModelRow(model="a", hosts=[ModelHost(host="box", state="failed", note="damaged", retry_ms=5_000)])
    ]
    peer.say("LOAD a")
    peer.answer_all()
    (reply,) = objects(peer.written)
    assert reply["message"].startswith("'a' could not be loaded on box: damaged")
    assert reply["data"]["code"] == "engine_failed"
    assert peer.mesh.orders == [("hold", "a", "1"), ("release", "a", "1")]
    assert peer.say("FREE")[0]["data"] == {"model": ""}


def test_quit_ends_the_connection_and_what_runs_on_it() -> None:
    peer = Peer()
    peer.say('INFER {"prompt": "a", "tag": 1}')
    assert [reply["message"] for reply in peer.say("QUIT\nPING")] == ["bye"]
    assert peer.asked[0].cancelled and peer.closed
    assert not peer.bridge.stopped and peer.bridge.connections == 0


def test_quit_ends_the_bridge_where_it_may() -> None:
    peer = Peer(ConnectionLimits(quit_stops=True))
    peer.say("QUIT")
    assert peer.bridge.stopped and peer.closed


def test_an_error_says_what_to_do() -> None:
    peer = Peer()
    peer.say("INFER hi")
    peer.fail(peer.asked[0], LlamboError(Code.BUSY, "full \x1b[2J", 500))
    hint = "try again after the time given, or add workers"
    assert objects(peer.written) == [
        {
            "status": "error",
            "message": "full �[2J",
            "data": {"code": "busy", "hint": hint, "retryable": True, "retry_after_ms": 500},
        }
    ]


def test_an_error_ends_a_stream() -> None:
    peer = Peer()
    peer.say("INFER_STREAM hi")
    peer.text(peer.asked[0], "h")
    peer.fail(peer.asked[0], LlamboError(Code.ENGINE_FAILED, "it died"))
    assert [line["final"] for line in objects(peer.written)] == [False, True]
    assert objects(peer.written)[-1]["status"] == "error"


def test_a_bug_is_an_error_of_one_answer(caplog: pytest.LogCaptureFixture) -> None:
    peer = Peer()
    peer.say("INFER hi")
    peer.fail(peer.asked[0], RuntimeError("a bug"))
    assert objects(peer.written)[0]["data"]["code"] == "internal"
    assert "a bug" in caplog.text
    assert peer.say("PING")[0]["message"] == "pong"


def test_a_terminal_gets_no_orders() -> None:
    peer = Peer()
    text = "a\x1b[2J\x7f\x9b2J\u202eé\u2066"
    peer.say("INFER_STREAM hi")
    peer.text(peer.asked[0], text)
    assert objects(peer.written)[0]["token"] == text
    shown = peer.written.decode()
    assert not set("\x1b\x7f\x9b\u202e\u2066") & set(shown) and "é" in shown


# --- in what order ---------------------------------------------------------------------------------------------


def test_commands_are_answered_in_their_order() -> None:
    peer = Peer()
    peer.say("INFER a\nPING\nINFER b\nPING")
    assert [asked.prompt for asked in peer.asked] == ["a"] and not peer.reads
    peer.answer()
    assert [asked.prompt for asked in peer.asked] == ["a", "b"]
    peer.answer()
    assert [reply["message"] for reply in objects(peer.written)] == ["stop", "pong", "stop", "pong"]
    assert peer.reads


def test_those_with_a_tag_run_beside_each_other() -> None:
    peer = Peer()
    peer.say(*[json.dumps({"prompt": name, "tag": name}).join(["INFER_STREAM ", ""]) for name in "ab"], "PING")
    peer.text(peer.asked[1], "x")
    peer.text(peer.asked[0], "y")
    peer.answer(peer.asked[1])
    replies = objects(peer.written)
    assert replies[0]["message"] == "pong" and "tag" not in replies[0]
    assert [(line["tag"], line["token"]) for line in replies[1:]] == [("b", "x"), ("a", "y"), ("b", "b"), ("b", "")]


def test_answers_under_way_have_a_limit() -> None:
    peer = Peer(ConnectionLimits(in_flight=2))
    lines = [f'INFER_STREAM {{"prompt": "p", "tag": {number}}}' for number in range(3)]
    (refused,) = peer.say(*lines)
    assert (refused["tag"], refused["data"]["code"], refused["final"]) == (2, "over_limit", True)
    peer.answer()
    peer.say(lines[2])
    assert len(peer.mesh.open) == 2


def test_a_peer_that_does_not_read_is_not_listened_to() -> None:
    peer = Peer()
    peer.do(peer.connection.pause_writing)
    peer.say("PING\nINFER a\nPING")
    before = len(peer.written)
    assert not peer.asked and not peer.reads
    peer.send(b"PING\n")
    assert peer.unread and len(peer.written) == before
    peer.do(peer.connection.resume_writing)
    assert [asked.prompt for asked in peer.asked] == ["a"]


def test_a_peer_that_does_not_read_gets_no_more_of_a_stream() -> None:
    peer = Peer()
    peer.say("INFER_STREAM a")
    peer.do(peer.connection.pause_writing)
    for text in "xyz":
        peer.text(peer.asked[0], text)
    assert len(objects(peer.written)) == 1, "the one piece that was in flight"
    peer.do(peer.connection.resume_writing)
    assert "".join(line["token"] for line in objects(peer.written)) == "xyz"


def test_many_short_replies_do_not_pile_up() -> None:
    """The limit is checked before each command, not once for everything in one read."""

    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        bridge = FakeBridge(ConnectionLimits())
        connection = Connection(bridge)
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: connection, sock=ours)
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        sending = asyncio.create_task(loop.sock_sendall(theirs, 20_000 * b"PING\n"))
        await asyncio.wait({sending}, timeout=0.3)
        assert WRITE_BYTES / 2 < transport.get_write_buffer_size() < WRITE_BYTES + 1_000
        received = 0
        while received < 20_000:
            received += (await loop.sock_recv(theirs, 65_536)).count(b"\n")
        await sending
        theirs.close()
        await asyncio.wait_for(bridge.empty.wait(), 5)

    RUNNERS[0].run(scenario())


# --- the end ---------------------------------------------------------------------------------------------------


def test_what_was_asked_is_answered_after_the_peer_has_finished() -> None:
    peer = Peer()
    peer.say(b"INFER a\nPING\nPING")  # the last one without its newline
    peer.finish()
    assert not peer.closed
    peer.answer()
    assert [reply["message"] for reply in objects(peer.written)] == ["stop", "pong", "pong"]
    assert peer.closed


def test_a_peer_that_has_gone_cancels_its_answers() -> None:
    peer = Peer()
    peer.say('INFER {"prompt": "a", "tag": 1}', "INFER b\nINFER c")
    peer.finish()
    peer.do(peer.connection.hang_up)
    assert [asked.cancelled for asked in peer.asked] == [True, True], "and the third one did not begin"
    assert peer.closed and peer.written == b""


def test_the_last_command_of_a_peer_that_has_gone_is_carried_out() -> None:
    peer = Peer(ConnectionLimits(quit_stops=True))
    peer.do(peer.connection.hang_up)
    assert not peer.closed
    peer.say("QUIT")
    assert peer.bridge.stopped


def test_a_peer_that_has_gone_is_closed_when_all_is_read() -> None:
    peer = Peer()
    peer.do(peer.connection.hang_up)
    peer.finish()
    assert peer.closed and peer.bridge.connections == 0


def test_a_lost_connection_cancels_its_answers() -> None:
    peer = Peer()
    peer.say('INFER {"prompt": "a", "tag": 1}', "INFER b")
    peer.do(peer.transport.abort)
    assert [asked.cancelled for asked in peer.asked] == [True, True]
    assert peer.connection.answers == peer.bridge.connections == 0


def test_a_bridge_that_stops_lets_answers_finish() -> None:
    idle, busy = Peer(), Peer()
    busy.say("INFER a\nINFER b")
    idle.do(idle.connection.stop)
    busy.do(busy.connection.stop)
    assert idle.closed and not busy.closed
    busy.answer()
    assert len(busy.asked) == 1 and busy.closed
    assert objects(busy.written)[0]["message"] == "stop"


def test_in_the_end_answers_are_cut_short() -> None:
    peer = Peer()
    peer.say("INFER_STREAM a")
    peer.do(peer.connection.cut_short)
    (reply,) = objects(peer.written)
    assert reply["data"]["code"] == "cancelled" and reply["final"]
    assert peer.asked[0].cancelled and peer.closed


# --- what is wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("FROB x", "no command is called 'FROB'"),
        ("{}", "no command is called '{}'"),
        ("PING x", "PING takes no argument"),
        ('PING {"x": 1}', "PING has no field 'x'"),
        ("LOAD", "LOAD needs the name of a model"),
        ("LOAD " + 200 * "x", "LOAD needs the name of a model"),
        ("INFER", "INFER needs a prompt, or messages"),
        ('INFER {"prompt": ""}', "the prompt is empty"),
        ('INFER {"prompt": 3}', "the prompt is not text"),
        ('INFER {"prompt": "a", "messages": [1]}', "prompt and messages exclude each other"),
        ('INFER {"messages": []}', "messages must be a list of at least one"),
        ('INFER {"messages": [1], "form": "text"}', "with messages there is no form"),
        ('INFER {"prompt": "a", "stream": true}', "INFER has no field 'stream'"),
        ('INFER {"prompt": "a"', "that is not JSON"),
        ("INFER " + 5_000 * '{"a":', "that is not JSON"),
        ('INFER {"prompt": "a", "stop": ' + 30 * "[" + 30 * "]" + "}", "that is nested too deeply"),
        ('PING {"tag": 1.5}', "a tag is a whole number, or text of at most 128 characters"),
        ('PING {"tag": true}', "a tag is a whole number"),
        ('PING {"tag": ""}', "a tag is a whole number"),
        ("INFER a\0b", "there is a NUL in the line"),
        (b"INFER a\xffb\n", "the line is not UTF-8: byte 8 is wrong"),
    ],
)
def test_a_line_that_means_nothing_is_refused(line: str | bytes, text: str) -> None:
    assert text in refusal(line)


def test_a_line_may_be_so_long_and_no_longer() -> None:
    limits = ConnectionLimits(line_bytes=100)
    assert refusal("INFER " + 95 * "x", limits) == "the line is longer than 100 bytes"
    peer = Peer(limits)
    peer.say("INFER " + 94 * "x")
    assert len(peer.asked) == 1


def test_a_long_line_is_refused_once_and_not_stored() -> None:
    parser = LineParser(100)
    refused: list[Any] = []
    for _ in range(1_000):
        parser.feed(99 * b"x")
        if (parsed := parser.next()) is not None:
            refused.append(parsed)
        assert len(parser._buffer) <= 100
    assert [type(parsed) for parsed in refused] == [Mistake]
    parser.feed(b"\nPING\n")
    assert parser.next() == Command("PING", {})


def test_a_prompt_may_ask_about_the_web() -> None:
    assert Peer().say("INFER what HTTP/1.1") == []


@pytest.mark.parametrize("line", ["GET / HTTP/1.1", "POST /INFER HTTP/1.1\r", "options * http/1.0"])
def test_a_browser_is_sent_away(line: str) -> None:
    """Any web page can make a browser send lines to a port of this machine."""
    peer = Peer()
    assert peer.say(line + "\nHost: x\n\nINFER hello")[0]["message"] == "this is no web server"
    assert peer.closed and not peer.asked


# --- msgpack ---------------------------------------------------------------------------------------------------


def binary(*values: Any, limits: ConnectionLimits | None = None) -> tuple[Peer, list[dict[str, Any]]]:
    peer = Peer(limits)
    peer.say("BINARY")
    before = len(peer.written)
    peer.send(b"".join(msgpack.packb(value, unicode_errors="surrogateescape") for value in values))
    peer.answer_all()
    return peer, unpacked(peer.written[before:])


def test_a_connection_becomes_binary() -> None:
    peer = Peer()
    peer.send(b"PING\nBINARY\n" + msgpack.packb({"command": "ping"}))
    lines, rest = peer.written.split(b"\n")[:2], peer.written.split(b"\n", 2)[2]
    assert [json.loads(line)["message"] for line in lines] == ["pong", "binary"]
    assert unpacked(rest) == [{"status": "ok", "message": "pong", "data": {}}]


def test_objects_follow_each_other() -> None:
    _, replies = binary(
        {"command": "LOAD", "model": "small"},
        {"command": "INFER_STREAM", "prompt": "hi", "tag": 7},
        {"command": "INFER", "prompt": b"h\xc3\xa9", "logit_bias": {3: 1.0}},
    )
    assert [one.get("message") or one["token"] for one in replies] == ["loaded", "h", "i", "stop", "stop"]
    assert [one.get("tag") for one in replies] == [None, 7, 7, 7, None]
    assert replies[-1]["data"]["text"] == "hé"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "a command is a map"),
        ({"prompt": "x"}, "a command is a map"),
        ({"command": b"PING"}, "a command is a map"),
        ({"command": "BINARY"}, "this connection is binary already"),
        ({"command": "PING", 7: 1}, "PING has no field 7"),
        ({"command": "INFER", "prompt": ["x"]}, "the prompt is not text"),
        ({"command": "INFER", "messages": ["\udcff"]}, "the messages cannot be written as JSON"),
    ],
)
def test_an_object_that_means_nothing_is_refused(value: Any, text: str) -> None:
    peer, (first, second) = binary(value, {"command": "PING"})
    assert text in first["message"] and second["message"] == "pong"
    assert not peer.closed


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",  # a list of 4 billion parts
        b"\xdc" + (LIST_PARTS + 1).to_bytes(2, "big"),
        b"\xdf\xff\xff\xff\xff",
        5_000 * b"\x91",
        b"\x81\x90\x01",  # a list as a key
        b"\xc8\x10\x00\x07" + 4_096 * b"x",
        b"\xa1\xff" + b"\xc1",
    ],
)
def test_what_is_no_msgpack_ends_the_connection(data: bytes) -> None:
    peer = Peer()
    peer.say("BINARY")
    before = len(peer.written)
    peer.send(data)
    assert unpacked(peer.written[before:])[-1]["status"] == "error"
    assert peer.closed


def test_an_object_may_be_so_long_and_no_longer() -> None:
    limits = ConnectionLimits(line_bytes=200_000)
    _, replies = binary({"command": "INFER", "prompt": 199_000 * "x"}, limits=limits)
    assert replies[0]["status"] == "ok"
    peer, replies = binary({"command": "INFER", "prompt": 201_000 * "x"}, limits=limits)
    assert "longer than 200000 bytes" in replies[0]["message"] and peer.closed


def test_an_object_that_never_ends_is_not_stored() -> None:
    """It announces 4 GiB, and is read up to the largest allowed object."""
    peer = Peer(ConnectionLimits(line_bytes=100_000))
    peer.say("BINARY")
    peer.send(b"\xc6\xff\xff\xff\xff")
    fed = 0
    while not peer.closed:
        peer.send(1_000 * b"x")
        fed += 1_000
    assert fed == 100_000
    assert peer.written.endswith(b"\xc2"), "the last value of an error: retrying does not help"


# --- anything --------------------------------------------------------------------------------------------------

WORDS = st.sampled_from([*COMMANDS, "infer", "BINARY\n", "\n", "\r\n", " ", "{", "}", '{"prompt":"x","tag":1}',
                         '{"tag":', "GET / HTTP/1.1\n", "\0", "x" * 70, "é"])  # fmt: skip
LINES = st.lists(WORDS.map(str.encode) | st.binary(max_size=12), max_size=30).map(b"".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | st.integers(0, 9), inner),
    max_leaves=12,
)
SOME = st.sampled_from([*COMMANDS])
FIELDS = st.dictionaries(st.sampled_from(["prompt", "messages", "model", "tag", "top_k", "stop", "x"]), VALUES)
MEANT = st.builds(lambda name, fields: {"command": name, **fields}, SOME, FIELDS)
OBJECTS = st.lists(MEANT | VALUES, max_size=6).map(lambda values: b"".join(map(msgpack.packb, values)))


def parsed(chunks: list[bytes]) -> list[Command | Mistake]:
    """Everything a connection finds in these bytes, up to the first fatal mistake or QUIT."""
    parser: Parser = LineParser(64)
    found: list[Command | Mistake] = []
    for chunk in [*chunks, None]:
        if chunk is not None:
            parser.feed(chunk)
        while (one := parser.next() or (parser.end() if chunk is None else None)) is not None:
            found.append(one)
            if (isinstance(one, Mistake) and one.fatal) or (isinstance(one, Command) and one.name == "QUIT"):
                return found
            if isinstance(one, Command) and one.name == "BINARY" and isinstance(parser, LineParser):
                rest = parser.rest()
                parser = ObjectParser(64)
                parser.feed(rest)
    return found


def outline(found: list[Command | Mistake]) -> str:
    """All of it, but not which rule a fatal object breaks: one that is too long and also wrong breaks two, and the
    size is checked when the bytes at hand are used up."""
    return repr(["fatal" if isinstance(one, Mistake) and one.fatal else one for one in found])


def conversation(chunks: list[bytes]) -> bytes:
    """What is answered when the mesh answers at once."""
    peer = Peer(ConnectionLimits(line_bytes=10_000, in_flight=100))
    for chunk in chunks:
        peer.send(chunk)
        peer.answer_all()
    peer.finish()
    peer.answer_all()
    assert peer.closed, "everything was sent and answered"
    return peer.written


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[first:last] for first, last in pairwise(ends)]


@given(LINES, st.lists(st.integers(0, 2**16)))
def test_it_makes_no_difference_how_lines_arrive(data: bytes, places: list[int]) -> None:
    whole = parsed(cut(data, list(range(len(data)))))
    assert outline(parsed(cut(data, places))) == outline(whole)


@given(OBJECTS | st.binary(max_size=100), st.lists(st.integers(0, 2**16)))
def test_it_makes_no_difference_how_objects_arrive(data: bytes, places: list[int]) -> None:
    data = b"BINARY\n" + data
    whole = parsed(cut(data, list(range(len(data)))))
    assert outline(parsed(cut(data, places))) == outline(whole)


@settings(max_examples=30)
@given(LINES | OBJECTS.map(lambda data: b"BINARY\n" + data), st.lists(st.integers(0, 2**16), max_size=8))
def test_it_makes_no_difference_how_anything_arrives(data: bytes, places: list[int]) -> None:
    # The same bytes in some order: answers with a tag have none.
    assert sorted(conversation(cut(data, places))) == sorted(conversation([data]))


@settings(max_examples=50)
@given(
    st.lists(
        st.text(alphabet=st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), max_size=30), max_size=20
    )
)
def test_every_line_has_one_answer(lines: list[str]) -> None:
    replies = objects(conversation(["".join(f"INFER {line}\n" for line in lines).encode()]))
    assert len(replies) == len(lines)
    assert all({"status", "message", "data"} == set(one) for one in replies)


HAPPENINGS = st.one_of(
    LINES,
    st.just(b'INFER_STREAM {"prompt":"x","tag":1}\n'),
    st.integers(0, 5),
    st.sampled_from(["pause_writing", "resume_writing", "hang_up", "stop", "cut_short", "finish", "text", "fail"]),
)


@settings(max_examples=60)
@given(st.lists(HAPPENINGS, max_size=30), st.booleans())
def test_the_rules_hold_in_any_order_of_events(happened: list[Any], quits: bool) -> None:
    peer = Peer(ConnectionLimits(line_bytes=64, in_flight=2, quit_stops=quits))
    for one in happened:
        if peer.closed:
            break
        streams = [question for question in peer.mesh.open if question.what == "infer"]
        match one:
            case bytes():
                peer.send(one)
            case int():
                if peer.mesh.open:
                    peer.answer(peer.mesh.open[one % len(peer.mesh.open)])
            case "finish":
                peer.finish()
            case "text" | "fail":
                for question in streams[:1]:
                    error = LlamboError(Code.BUSY, "busy")
                    peer.text(question, "text") if one == "text" else peer.fail(question, error)
            case _:
                peer.do(getattr(peer.connection, one))
        assert peer.connection.answers == len(peer.mesh.open) <= 2
        assert peer.bridge.connections == (not peer.closed)
    peer.do(peer.connection.resume_writing)
    peer.do(peer.transport.abort)
    assert not peer.mesh.open and peer.bridge.connections == 0


# --- the socket ------------------------------------------------------------------------------------------------


def test_the_socket_belongs_to_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "b.sock"
    umask = os.umask(0)
    try:
        opened = server.open_unix(path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    opened.close()
    assert not path.exists()


def test_the_mode_is_there_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other user can connect in between."""
    seen = []
    listen = socket.socket.listen

    class Watched(socket.socket):
        def listen(self, backlog: int = 0) -> None:
            seen.append(stat.S_IMODE((tmp_path / "b.sock").stat().st_mode))
            listen(self, backlog)

    monkeypatch.setattr(socket, "socket", Watched)
    umask = os.umask(0)
    try:
        server.open_unix(tmp_path / "b.sock").close()
    finally:
        os.umask(umask)
    assert seen == [0o600]


def test_a_dead_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    first = server.open_unix(path)
    assert "a bridge is already running at" in refused(path)
    first.socket.close()  # as when it was killed
    second = server.open_unix(path)
    first.close()
    assert path.exists(), "it is not the first one's any more"
    second.close()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    path.write_text("precious")
    assert "is not a socket" in refused(path)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert "is not a socket" in refused(path)


def test_a_path_may_be_so_long_and_no_longer(tmp_path: Path) -> None:
    assert "longer than the 107 bytes" in refused(tmp_path / (100 * "x"))


def test_two_that_begin_at_once_do_not_both_get_the_place(tmp_path: Path) -> None:
    with server._locked(tmp_path):
        assert "holds the lock" in refused(tmp_path / "b.sock")
    server.open_unix(tmp_path / "b.sock").close()


def refused(path: Path) -> str:
    with pytest.raises(LlamboError) as caught:
        server.open_unix(path)
    assert caught.value.code is Code.BAD_SETTING
    return caught.value.text


def test_where_a_socket_is_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.default_path({"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run/user/7/llambo-bridge.sock")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert server.default_path({}) == Path("/run/llambo-bridge.sock")
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    assert server.default_path({"HOME": "/home/x"}) == Path("/home/x/.local/state/llambo/llambo-bridge.sock")
