"""A test double of a broker: raw sockets on a thread, which answers clients by a script.

It has no queue, no worker and no memory limits. What it does to a request is written in the prompt:

    "words: a b c"      streams the words, one token each
    "split: héllo"      streams the bytes, one token each
    "endless:"          streams one token and goes on only when it is cancelled
    "count: 50000"      streams so many tokens "x", some to a frame
    "refuse: text"      refuses it as busy
    "fail: a b"         streams the words and ends with an error
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import zmq

from llambo.mesh.wire import codec, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo

DISPATCH, FINGERPRINT = b"dispatch", "double"
#: Tokens in one frame of a long answer.
LONG_FRAME = 100


@dataclass
class Run:
    """One request and its whole answer."""

    request: m.InferenceRequest
    pieces: list[bytes]
    reason: m.Reason | None
    error: ErrorInfo | None = None
    #: The sessions that have not acknowledged its end.
    followers: set[bytes] = field(default_factory=set)

    def end(self) -> m.End | None:
        if self.reason is None:
            return None
        return m.End(self.request.id, len(self.pieces), self.reason, error=self.error, worker="double")


@dataclass
class Peer:
    """A client that was welcomed."""

    route: bytes
    session: bytes
    topic: bytes
    subscribed: bool = False
    number: int = 0
    missed: list[bytes] = field(default_factory=list)


class DoubleBroker:
    """Use it with `with`. `story` lists all that it received, for tests that fail."""

    def __init__(self, heartbeat_ms: int = 50) -> None:
        self.heartbeat_ms = heartbeat_ms
        self.story: list[str] = []
        self.runs: dict[bytes, Run] = {}
        self.peers: dict[bytes, Peer] = {}
        #: Called with each request when it arrives.
        self.on_request: Callable[[Run], None] = lambda run: None
        #: Which frames of the token plane are lost, by the number of the frame.
        self.lose: Callable[[int], bool] = lambda number: False
        #: Set when a request was cancelled, or acknowledged.
        self.cancelled = threading.Event()
        self.acknowledged = threading.Event()
        self.forget_sessions = threading.Event()
        self.received: list[Any] = []
        self._frames = 0
        self._sessions = 0
        self._context: zmq.Context[Any] = zmq.Context()
        self._control, self._tokens, self.port = bind_both(self._context)
        self._stop, self._stopped = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._stopped.bind("inproc://stop")
        self._stop.connect("inproc://stop")
        self._thread = threading.Thread(target=self._loop, name="double-broker")

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def __enter__(self) -> DoubleBroker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.send(b"")
        self._thread.join(10)
        assert not self._thread.is_alive(), "the double does not stop"
        self._context.destroy(linger=0)

    # --- the loop ------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        poller = zmq.Poller()
        for socket in (self._control, self._tokens, self._stopped):
            poller.register(socket, zmq.POLLIN)
        beat_at = monotonic_ms() + self.heartbeat_ms
        while True:
            ready = dict(poller.poll(max(0, beat_at - monotonic_ms())))
            if self._stopped in ready:
                return
            if monotonic_ms() >= beat_at:
                beat_at += self.heartbeat_ms
                for peer in self.peers.values():
                    self._beat(peer)
            if self.forget_sessions.is_set():
                self.forget_sessions.clear()
                self.peers.clear()
            if self._tokens in ready:
                self._on_subscription(self._tokens.recv())
            if self._control in ready:
                route, *frames = self._control.recv_multipart()
                self._on_bundle(route, codec.from_client.decode(frames))

    def _on_subscription(self, frame: bytes) -> None:
        for peer in self.peers.values():
            if peer.topic == frame[1:] and frame[:1] == b"\1":
                peer.subscribed = True
                self._beat(peer)

    def _on_bundle(self, route: bytes, bundle: codec.Bundle[Any]) -> None:
        peer = self.peers.get(bundle.session)
        for message, blob in bundle.messages:
            if not isinstance(message, m.ClientHeartbeat):
                self.story.append(repr(message)[:200])
                self.received.append(message)
            if isinstance(message, m.ClientHello):
                self._welcome(route)
            elif peer is None:
                self._say(route, bundle.session, m.Problem(ErrorInfo(Code.UNKNOWN_SESSION, "who are you?")))
            else:
                self._on_message(peer, message, blob)

    def _on_message(self, peer: Peer, message: Any, blob: bytes) -> None:
        match message:
            case m.InferenceRequest():
                self._submit(peer, message, blob[: message.prompt_bytes or None].decode())
            case m.Attach(id) if id in self.runs:
                self._tell(peer, m.Accepted(id, fingerprint=FINGERPRINT))
                self._stream(peer, self.runs[id], message.have)
            case m.Cancel(id) if id in self.runs:
                run = self.runs[id]
                run.reason = run.reason or "cancelled"
                run.followers.add(peer.session)
                self._tell_end(run)
                self.cancelled.set()
            case m.Attach(id) | m.Cancel(id):
                self._tell(peer, m.Problem(ErrorInfo(Code.UNKNOWN_REQUEST, "no such request"), id))
            case m.Replay(id, first, until):
                self._page(peer, self.runs[id], first, until)
            case m.EndAck(ids):
                for id in ids:
                    self.runs[id].followers.discard(peer.session)
                self.acknowledged.set()
            case m.Query(query, what, argument):
                self._answer(peer, query, what, argument)
            case m.DrainWorker(query, worker, undo):
                data = msgpack.packb({"worker": worker, "draining": not undo})
                self._tell(peer, m.Result(query, 0, 1, data))

    # --- answers -------------------------------------------------------------------------------------------------

    def _welcome(self, route: bytes) -> None:
        self._sessions += 1
        peer = Peer(route, b"sess%04d" % self._sessions, b"topic-of-peer%03d" % self._sessions)
        self.peers[peer.session] = peer
        welcome = m.Welcome(peer.session, self.port + 3, peer.topic, heartbeat_ms=self.heartbeat_ms)
        self._say(route, codec.NO_SESSION, welcome)

    def _submit(self, peer: Peer, request: m.InferenceRequest, prompt: str) -> None:
        kind, _, text = prompt.partition(":")
        if kind == "refuse":
            self._tell(peer, m.Problem(ErrorInfo(Code.BUSY, text.strip(), 250), request.id))
            return
        run = self.runs.get(request.id)
        if run is None:
            run = self.runs[request.id] = _script(request, kind, text.strip())
        self._tell(peer, m.Accepted(request.id, 0, "tiny", FINGERPRINT))
        self.on_request(run)
        self._stream(peer, run, request.have)

    def _tell_end(self, run: Run) -> None:
        for session in run.followers & self.peers.keys():
            self._tell(self.peers[session], run.end())

    def _stream(self, peer: Peer, run: Run, have: int) -> None:
        run.followers.add(peer.session)
        if run.request.stream:
            for frame in chunks(run, have, len(run.pieces)):
                self._publish(peer.topic + frame)
        end = run.end()
        if end is not None:
            self._tell(peer, end)
            if not run.request.stream:
                self._page(peer, run, have, 0)

    def _page(self, peer: Peer, run: Run, first: int, until: int) -> None:
        total = len(run.pieces)
        after = min(until or total, first + 20 * LONG_FRAME, total)
        self._tell(peer, m.Page(run.request.id, first, after, total, list(chunks(run, first, after))))

    def _answer(self, peer: Peer, query: int, what: str, argument: str) -> None:
        found = [id.hex() for id in self.runs if id.hex().startswith(argument)]
        answers: dict[str, Any] = {
            "status": {"broker": "double", "workers": 1},
            "workers": [{"worker": "double"}] * 100,
            "find": {"id": found[0]} if found else {},
            "junk": [],
        }
        if what == "events":
            return  # never answered
        if what not in answers:
            self._tell(peer, m.Problem(ErrorInfo(Code.BAD_REQUEST, f"what is {what}?"), query=query))
            return
        data = msgpack.packb(answers[what])
        parts = [data[at : at + 500] for at in range(0, len(data), 500)]
        for number, part in enumerate(parts):
            self._tell(peer, m.Result(query, number, len(parts), part))

    # --- the wire ------------------------------------------------------------------------------------------------

    def _beat(self, peer: Peer) -> None:
        peer.number += 1
        if peer.subscribed:
            self._tokens.send(peer.topic + tokens.encode_beat(peer.number, peer.session))
        mine = [run for run in self.runs.values() if peer.session in run.followers]
        progress = {run.request.id: len(run.pieces) for run in mine if run.request.stream}
        self._tell(peer, m.BrokerHeartbeat(peer.number, progress=progress))
        for run in mine:
            self._tell(peer, run.end())

    def _publish(self, frame: bytes) -> None:
        self._frames += 1
        if not self.lose(self._frames):
            self._tokens.send(frame)

    def _tell(self, peer: Peer, message: m.Message | None) -> None:
        if message is not None:
            self._say(peer.route, peer.session, message)

    def _say(self, route: bytes, session: bytes, message: m.Message) -> None:
        self._control.send_multipart([route, *codec.encode(session, [(message, None)])])


def chunks(run: Run, first: int, until: int) -> list[bytes]:
    step = LONG_FRAME if len(run.pieces) > 1_000 else 1
    key = run.request.id + DISPATCH
    found = []
    for at in range(first, until, step):
        pieces = run.pieces[at : min(at + step, until)]
        found.append(tokens.encode_chunk(key, at, list(range(at, at + len(pieces))), pieces))
    return found


def _script(request: m.InferenceRequest, kind: str, text: str) -> Run:
    match kind:
        case "split":
            return Run(request, [bytes([byte]) for byte in text.encode()], "stop")
        case "endless":
            return Run(request, [b"and "], None)
        case "count":
            return Run(request, [b"x"] * int(text), "length")
        case "fail":
            words = [word.encode() + b" " for word in text.split()]
            return Run(request, words, "error", ErrorInfo(Code.ENGINE_FAILED, "the engine died twice"))
        case _:
            return Run(request, [word.encode() + b" " for word in text.split()], "stop")


def monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def bind_both(context: zmq.Context[Any]) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes], int]:
    """Control and tokens-out, three ports apart as in a real broker."""
    for _ in range(100):
        control, out = context.socket(zmq.ROUTER), context.socket(zmq.XPUB)
        out.sndhwm = 0
        port = control.bind_to_random_port("tcp://127.0.0.1")
        try:
            out.bind(f"tcp://127.0.0.1:{port + 3}")
        except zmq.ZMQError:
            control.close(linger=0)
            out.close(linger=0)
            continue
        return control, out, port
    raise AssertionError("no two free ports that are three apart were found")
