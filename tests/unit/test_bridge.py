"""The bridge without sockets: what is said on one connection, and what is answered."""

from __future__ import annotations

import json
import os
import socket
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llambo.bridge import door
from llambo.bridge import facts as f
from llambo.bridge.commands import COMMANDS
from llambo.bridge.connection_core import ConnectionCore, Terms
from llambo.bridge.reading import LIST_PARTS
from llambo.mesh.wire.errors import Code, ErrorInfo, LlamboError

MODELS = [{"model": "small", "workers": 2}, {"model": "large", "workers": 1}]
STATUS = {"bridge": {"connections": 1, "answers": 1}, "mesh": {"broker": "b"}}
ANSWER = {"reason": "stop", "tokens": 2}


class Peer:
    """The other end of a core, and the mesh behind it, which answers when it is told to."""

    def __init__(self, terms: Terms | None = None) -> None:
        self.core = ConnectionCore(terms or Terms())
        self.written = b""
        self.orders: list[f.Order] = []
        #: What the core has asked for and is not answered.
        self.open: dict[int, f.Infer | f.Ask] = {}

    def tell(self, fact: f.Fact) -> list[f.Order]:
        """Each order is checked against those before it."""
        ordered = self.core.handle(fact)
        for order in ordered:
            assert not self.closed, f"{order} after the end"
            self.orders.append(order)
            match order:
                case f.Write(data):
                    self.written += data
                case f.Infer(number) | f.Ask(number):
                    assert number not in self.open
                    self.open[number] = order
                case f.Drop(number):
                    del self.open[number]
        return ordered

    def say(self, *lines: str | bytes) -> list[dict[str, Any]]:
        """What is answered to these lines at once."""
        before = len(self.written)
        for line in lines:
            self.tell(f.Arrived(line.encode() + b"\n" if isinstance(line, str) else line))
        return objects(self.written[before:])

    def answer(self, number: int) -> None:
        match self.open.pop(number):
            case f.Ask(_, "models"):
                self.tell(f.Done(number, MODELS))
            case f.Ask():
                self.tell(f.Done(number, STATUS))
            case f.Infer(_, prompt, _, streamed):
                if streamed:
                    self.tell(f.Text(number, prompt[:1]))
                    self.tell(f.Text(number, prompt[1:]))
                self.tell(f.Done(number, {**ANSWER, **({} if streamed else {"text": prompt})}))

    def answer_all(self) -> None:
        while self.open:
            self.answer(next(iter(self.open)))

    @property
    def asked(self) -> list[f.Infer]:
        return [order for order in self.orders if isinstance(order, f.Infer)]

    @property
    def closed(self) -> bool:
        return any(isinstance(order, f.Close | f.Abort) for order in self.orders)

    @property
    def reads(self) -> bool:
        return next((order.on for order in reversed(self.orders) if isinstance(order, f.Read)), True)


def objects(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.decode().splitlines()]


def unpacked(data: bytes) -> list[dict[str, Any]]:
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    return list(unpacker)


def refusal(line: str | bytes, terms: Terms | None = None) -> str:
    """The line is refused, and the connection lives on."""
    peer = Peer(terms)
    (said,) = peer.say(line)
    assert said["status"] == "error"
    assert set(said["data"]) == {"code", "hint", "retryable"}
    assert peer.say("PING")[-1]["message"] == "pong"
    return str(said["message"])


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
    assert peer.asked == [f.Infer(1, " What is AI?", {"form": "user", "sampling": {}}, streamed=False)]
    peer.answer(1)
    assert objects(peer.written) == [
        {"status": "ok", "message": "stop", "data": {"text": " What is AI?", "reason": "stop", "tokens": 2}}
    ]


def test_an_answer_as_it_comes() -> None:
    peer = Peer()
    peer.say("INFER_STREAM hi")
    peer.answer(1)
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
        "form": "text", "max_tokens": 5, "temperature": 0, "stop": "x", "system": "s",
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
    peer.say("LOAD large")
    peer.answer(1)
    peer.say("INFER hi")
    peer.answer(2)
    peer.say('INFER {"prompt": "hi", "model": "small"}')
    peer.answer(3)
    assert peer.say("FREE") == [{"status": "ok", "message": "free", "data": {"model": "large"}}]
    peer.say("INFER hi")
    assert [asked.options.get("model") for asked in peer.asked] == ["large", "small", None]


def test_a_model_that_is_not_there_is_not_chosen() -> None:
    peer = Peer()
    peer.say("LOAD huge")
    peer.answer(1)
    (said,) = objects(peer.written)
    assert said["data"]["code"] == "unknown_model" and "small, large" in said["message"]
    assert peer.core.model == ""


def test_the_status_tells_what_was_chosen() -> None:
    peer = Peer()
    peer.say("LOAD large")
    peer.answer(1)
    peer.say("STATUS")
    peer.answer(2)
    assert objects(peer.written)[-1] == {"status": "ok", "message": "up", "data": {"model": "large", **STATUS}}


def test_quit_ends_the_connection_and_what_runs_on_it() -> None:
    peer = Peer()
    peer.say('INFER {"prompt": "a", "tag": 1}')
    assert peer.say("QUIT\nPING")[-1]["message"] == "bye"
    assert peer.orders[-2:] == [f.Drop(1), f.Close()]
    assert f.StopBridge() not in peer.orders
    assert peer.tell(f.Arrived(b"PING\n")) == []


def test_quit_ends_the_bridge_where_it_may() -> None:
    peer = Peer(Terms(quit_stops=True))
    peer.say("QUIT")
    assert f.StopBridge() in peer.orders and peer.closed


def test_an_error_says_what_to_do() -> None:
    peer = Peer()
    peer.say("INFER hi")
    del peer.open[1]
    peer.tell(f.Failed(1, ErrorInfo(Code.BUSY, "full \x1b[2J", 500)))
    assert objects(peer.written) == [
        {
            "status": "error",
            "message": "full �[2J",
            "data": {"code": "busy", "hint": "try again after the time given, or add workers", "retryable": True,
                     "retry_after_ms": 500},
        }
    ]  # fmt: skip


def test_an_error_ends_a_stream() -> None:
    peer = Peer()
    peer.say("INFER_STREAM hi")
    peer.tell(f.Text(1, "h"))
    peer.tell(f.Failed(1, ErrorInfo(Code.ENGINE_FAILED, "it died")))
    assert [line["final"] for line in objects(peer.written)] == [False, True]
    assert objects(peer.written)[-1]["status"] == "error"


def test_a_terminal_gets_no_orders() -> None:
    peer = Peer()
    text = "a\x1b[2J\x7f\x9b2J\u202eé\u2066"
    peer.say("INFER_STREAM hi")
    peer.tell(f.Text(1, text))
    assert objects(peer.written)[0]["token"] == text
    shown = peer.written.decode()
    assert not set("\x1b\x7f\x9b\u202e\u2066") & set(shown) and "é" in shown


# --- in what order ---------------------------------------------------------------------------------------------


def test_commands_are_answered_in_their_order() -> None:
    peer = Peer()
    peer.say("INFER a\nPING\nINFER b\nPING")
    assert [asked.prompt for asked in peer.asked] == ["a"] and not peer.reads
    peer.answer(1)
    assert [asked.prompt for asked in peer.asked] == ["a", "b"]
    peer.answer(2)
    said = objects(peer.written)
    assert [one["message"] for one in said] == ["stop", "pong", "stop", "pong"]
    assert peer.reads


def test_those_with_a_tag_run_beside_each_other() -> None:
    peer = Peer()
    peer.say(*[json.dumps({"prompt": name, "tag": name}).join(["INFER_STREAM ", ""]) for name in "ab"], "PING")
    peer.tell(f.Text(2, "x"))
    peer.tell(f.Text(1, "y"))
    peer.answer(2)
    said = objects(peer.written)
    assert said[0]["message"] == "pong" and "tag" not in said[0]
    assert [(line["tag"], line["token"]) for line in said[1:]] == [("b", "x"), ("a", "y"), ("b", "b"), ("b", "")]


def test_answers_under_way_have_a_limit() -> None:
    peer = Peer(Terms(in_flight=2))
    lines = [f'INFER_STREAM {{"prompt": "p", "tag": {number}}}' for number in range(3)]
    (refused,) = peer.say(*lines)
    assert (refused["tag"], refused["data"]["code"], refused["final"]) == (2, "over_limit", True)
    peer.answer(1)
    peer.say(lines[2])
    assert len(peer.open) == 2


def test_a_peer_that_does_not_read_is_not_listened_to() -> None:
    peer = Peer()
    peer.tell(f.Filled())
    assert not peer.reads
    assert peer.say("INFER a", "PING") == []
    peer.tell(f.Drained())
    assert [asked.prompt for asked in peer.asked] == ["a"]


# --- the end ---------------------------------------------------------------------------------------------------


def test_what_was_asked_is_answered_after_the_peer_has_said_all() -> None:
    peer = Peer()
    peer.say(b"INFER a\nPING\nPING")  # the last one without its newline
    peer.tell(f.PeerFinished())
    assert not peer.closed
    peer.answer(1)
    assert [said["message"] for said in objects(peer.written)] == ["stop", "pong", "pong"]
    assert peer.orders[-1] == f.Close()


def test_a_peer_that_has_gone_cancels_its_answers() -> None:
    peer = Peer()
    peer.say('INFER {"prompt": "a", "tag": 1}', "INFER b")
    peer.tell(f.PeerHungUp())
    assert peer.orders[-3:] == [f.Drop(1), f.Drop(2), f.Abort()]


def test_the_last_words_of_a_peer_that_has_gone_are_heard() -> None:
    peer = Peer(Terms(quit_stops=True))
    peer.tell(f.PeerHungUp())
    assert not peer.closed
    peer.say("QUIT")
    assert f.StopBridge() in peer.orders


def test_a_peer_that_has_gone_is_let_go_of_when_all_is_heard() -> None:
    peer = Peer()
    peer.tell(f.PeerHungUp())
    peer.tell(f.PeerFinished())
    assert peer.orders[-1] == f.Abort()


def test_a_bridge_that_stops_lets_answers_finish() -> None:
    idle, busy = Peer(), Peer()
    busy.say("INFER a\nINFER b")
    assert idle.tell(f.Stopping()) == [f.Close()]
    assert busy.tell(f.Stopping()) == []
    busy.answer(1)
    assert len(busy.asked) == 1 and busy.orders[-1] == f.Close()


def test_in_the_end_answers_are_cut_short() -> None:
    peer = Peer()
    peer.say("INFER_STREAM a")
    peer.tell(f.TimeIsUp())
    assert objects(peer.written)[-1]["data"]["code"] == "cancelled"
    assert f.Drop(1) in peer.orders and peer.orders[-1] == f.Close()


# --- what is wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("FROB x", "no command is called 'FROB'"),
        ("{}", "no command is called '{}'"),
        ("PING x", "PING takes nothing behind it"),
        ('PING {"x": 1}', "PING knows no 'x'"),
        ("LOAD", "LOAD wants the name of a model"),
        ("LOAD " + 200 * "x", "LOAD wants the name of a model"),
        ("INFER", "INFER wants a prompt, or messages"),
        ('INFER {"prompt": ""}', "the prompt is empty"),
        ('INFER {"prompt": 3}', "the prompt is no text"),
        ('INFER {"prompt": "a", "messages": [1]}', "a prompt, or messages, not both"),
        ('INFER {"messages": []}', "messages are a list of at least one"),
        ('INFER {"messages": [1], "form": "text"}', "messages have a form of their own"),
        ('INFER {"prompt": "a", "stream": true}', "INFER knows no 'stream'"),
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
def test_a_line_that_means_nothing_is_refused(line: str | bytes, said: str) -> None:
    assert said in refusal(line)


def test_a_line_may_be_so_long_and_no_longer() -> None:
    terms = Terms(line_bytes=100)
    assert refusal("INFER " + 95 * "x", terms) == "the line is longer than 100 bytes"
    peer = Peer(terms)
    peer.say("INFER " + 94 * "x")
    assert len(peer.asked) == 1


def test_a_long_line_is_refused_once_and_not_kept() -> None:
    peer = Peer(Terms(line_bytes=100))
    assert len(peer.say(*(1_000 * [99 * b"x"]))) == 1
    assert peer.say("\nPING")[0]["message"] == "pong"


def test_a_prompt_may_ask_about_the_web() -> None:
    assert Peer().say("INFER what HTTP/1.1") == []


@pytest.mark.parametrize("line", ["GET / HTTP/1.1", "POST /INFER HTTP/1.1\r", "options * http/1.0"])
def test_a_browser_is_sent_away(line: str) -> None:
    """Any web page can have a browser say lines to a port of this machine."""
    peer = Peer()
    assert peer.say(line + "\nHost: x\n\nINFER hello")[0]["message"] == "this is no web server"
    assert peer.closed and not peer.asked


# --- msgpack ---------------------------------------------------------------------------------------------------


def binary(*values: Any, terms: Terms | None = None) -> tuple[Peer, list[dict[str, Any]]]:
    peer = Peer(terms)
    peer.say("BINARY")
    before = len(peer.written)
    peer.tell(f.Arrived(b"".join(msgpack.packb(value, unicode_errors="surrogateescape") for value in values)))
    peer.answer_all()
    return peer, unpacked(peer.written[before:])


def test_a_connection_becomes_binary() -> None:
    peer = Peer()
    peer.tell(f.Arrived(b"PING\nBINARY\n" + msgpack.packb({"command": "ping"})))
    lines, rest = peer.written.split(b"\n")[:2], peer.written.split(b"\n", 2)[2]
    assert [json.loads(line)["message"] for line in lines] == ["pong", "binary"]
    assert unpacked(rest) == [{"status": "ok", "message": "pong", "data": {}}]


def test_objects_follow_each_other() -> None:
    _, said = binary(
        {"command": "LOAD", "model": "small"},
        {"command": "INFER_STREAM", "prompt": "hi", "tag": 7},
        {"command": "INFER", "prompt": b"h\xc3\xa9", "logit_bias": {3: 1.0}},
    )
    assert [one.get("message") or one["token"] for one in said] == ["loaded", "h", "i", "stop", "stop"]
    assert [one.get("tag") for one in said] == [None, 7, 7, 7, None]
    assert said[-1]["data"]["text"] == "hé"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "a command is a map"),
        ({"prompt": "x"}, "a command is a map"),
        ({"command": b"PING"}, "a command is a map"),
        ({"command": "BINARY"}, "this connection is binary already"),
        ({"command": "PING", 7: 1}, "PING knows no 7"),
        ({"command": "INFER", "prompt": ["x"]}, "the prompt is no text"),
        ({"command": "INFER", "messages": ["\udcff"]}, "the messages cannot be said in JSON"),
    ],
)
def test_an_object_that_means_nothing_is_refused(value: Any, said: str) -> None:
    peer, (first, second) = binary(value, {"command": "PING"})
    assert said in first["message"] and second["message"] == "pong"
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
    peer.tell(f.Arrived(data))
    assert unpacked(peer.written[before:])[-1]["status"] == "error"
    assert peer.closed


def test_an_object_may_be_so_long_and_no_longer() -> None:
    terms = Terms(line_bytes=200_000)
    _, said = binary({"command": "INFER", "prompt": 199_000 * "x"}, terms=terms)
    assert said[0]["status"] == "ok"
    peer, said = binary({"command": "INFER", "prompt": 201_000 * "x"}, terms=terms)
    assert "longer than 200000 bytes" in said[0]["message"] and peer.closed


def test_an_object_that_never_ends_is_not_kept() -> None:
    """It says that it has 4 GiB, and is believed for as long as an object may be."""
    peer = Peer(Terms(line_bytes=100_000))
    peer.say("BINARY")
    peer.tell(f.Arrived(b"\xc6\xff\xff\xff\xff"))
    fed = 0
    while not peer.closed:
        peer.tell(f.Arrived(1_000 * b"x"))
        fed += 1_000
    assert fed == 100_000
    assert peer.written.endswith(b"\xc2"), "the last value of an error: no use in trying again"


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


def answered(peer: Peer) -> None:
    """The mesh answers at once, so that what is said depends on nothing but what was heard."""
    while peer.open:
        peer.answer(next(iter(peer.open)))


def conversation(chunks: list[bytes]) -> bytes:
    peer = Peer(Terms(line_bytes=64, in_flight=2))
    for chunk in chunks:
        peer.tell(f.Arrived(chunk))
        answered(peer)
    peer.tell(f.PeerFinished())
    answered(peer)
    assert peer.closed, "everything was said and answered"
    return peer.written


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[first:last] for first, last in pairwise(ends)]


@given(LINES, st.lists(st.integers(0, 2**16)))
def test_it_makes_no_difference_how_lines_arrive(data: bytes, places: list[int]) -> None:
    whole = conversation(list(cut(data, list(range(len(data))))))
    assert conversation(cut(data, places)) == whole


@settings(max_examples=50)
@given(OBJECTS | st.binary(max_size=100), st.lists(st.integers(0, 2**16)))
def test_it_makes_no_difference_how_objects_arrive(data: bytes, places: list[int]) -> None:
    data = b"BINARY\n" + data
    whole = conversation(list(cut(data, list(range(len(data))))))
    assert conversation(cut(data, places)) == whole


@given(st.lists(st.text(alphabet=st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), max_size=30)))
def test_every_line_has_one_answer(lines: list[str]) -> None:
    said = objects(conversation([f"INFER {line}\n".encode() for line in lines]))
    assert len(said) == len(lines)
    assert all({"status", "message", "data"} == set(one) for one in said)


FACTS = st.one_of(
    LINES.map(f.Arrived),
    st.just(f.Arrived(b'INFER_STREAM {"prompt":"x","tag":1}\n')),
    st.integers(1, 6).map(lambda number: f.Text(number, "text")),
    st.integers(1, 6).map(lambda number: f.Failed(number, ErrorInfo(Code.BUSY, "busy"))),
    st.integers(0, 5),
    st.sampled_from([f.Filled(), f.Drained(), f.PeerFinished(), f.PeerHungUp(), f.Stopping(), f.TimeIsUp()]),
)


@settings(max_examples=100)
@given(st.lists(FACTS, max_size=40), st.booleans())
def test_whatever_happens_the_rules_hold(happened: list[Any], quits: bool) -> None:
    peer = Peer(Terms(line_bytes=64, in_flight=2, quit_stops=quits))
    for fact in happened:
        if isinstance(fact, int):
            if peer.open:
                peer.answer(list(peer.open)[fact % len(peer.open)])
            continue
        if isinstance(fact, f.Failed):
            peer.open.pop(fact.number, None)
        peer.tell(fact)
        assert peer.core.answers == len(peer.open) <= 2
        assert not peer.closed or not peer.open


# --- the door --------------------------------------------------------------------------------------------------


def test_the_socket_belongs_to_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "b.sock"
    umask = os.umask(0)
    try:
        opened = door.open_unix(path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    opened.close()
    assert not path.exists()


def test_the_mode_is_there_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can have come in meanwhile."""
    seen = []
    listen = socket.socket.listen

    class Watched(socket.socket):
        def listen(self, backlog: int = 0) -> None:
            seen.append(stat.S_IMODE((tmp_path / "b.sock").stat().st_mode))
            listen(self, backlog)

    monkeypatch.setattr(socket, "socket", Watched)
    umask = os.umask(0)
    try:
        door.open_unix(tmp_path / "b.sock").close()
    finally:
        os.umask(umask)
    assert seen == [0o600]


def test_a_dead_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    first = door.open_unix(path)
    assert "a bridge is running at" in refused(path)
    first.socket.close()  # as when it was killed
    second = door.open_unix(path)
    first.close()
    assert path.exists(), "it is not the first one's any more"
    second.close()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    path.write_text("precious")
    assert "is no socket" in refused(path)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert "is no socket" in refused(path)


def test_a_path_may_be_so_long_and_no_longer(tmp_path: Path) -> None:
    assert "longer than the 107 bytes" in refused(tmp_path / (100 * "x"))


def test_two_that_begin_at_once_do_not_both_get_the_place(tmp_path: Path) -> None:
    with door._alone_in(tmp_path):
        assert "holds the lock" in refused(tmp_path / "b.sock")
    door.open_unix(tmp_path / "b.sock").close()


def refused(path: Path) -> str:
    with pytest.raises(LlamboError) as caught:
        door.open_unix(path)
    assert caught.value.code is Code.BAD_SETTING
    return caught.value.text


def test_where_a_socket_is_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert door.default_path({"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run/user/7/llambo-bridge.sock")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert door.default_path({}) == Path("/run/llambo-bridge.sock")
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    assert door.default_path({"HOME": "/home/x"}) == Path("/home/x/.local/state/llambo/llambo-bridge.sock")
