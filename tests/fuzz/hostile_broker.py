"""A hostile broker: it welcomes any peer, and then sends arbitrary messages."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from typing import Any

import zmq

from llambo.mesh.link import sockets
from llambo.mesh.wire import codec, tokens
from llambo.mesh.wire import messages as m
from tests.fuzz import plausible
from tests.fuzz.hostile_peer import ENDS_IT, HANG_S, LISTEN_EVERY, HostilePeer, Said, ends
from tests.fuzz.target import Frames


class HostileBroker(HostilePeer):
    """Attacks a worker, or with `client` a client."""

    def __init__(self, context: zmq.Context[Any], seed: str, *, client: bool) -> None:
        super().__init__(seed)
        self._client = client
        self._seq = 0
        self._route = b""
        self._topic = bytes(16)
        self._queries: list[int] = []
        self.sessions = 0
        self.lost_s = 0.0
        self.control = sockets.control(context, zmq.ROUTER)
        self.tokens = sockets.token(context, zmq.XPUB if client else zmq.SUB)
        if not client:
            self.tokens.subscribe(b"")
        self.port = self.control.bind_to_random_port("tcp://127.0.0.1")
        self._token_port = self.tokens.bind_to_random_port("tcp://127.0.0.1")

    @property
    def address(self) -> str:
        """A worker adds one to the port that clients use."""
        return f"tcp://127.0.0.1:{self.port - (0 if self._client else sockets.WORKER_OFFSET)}"

    def close(self) -> None:
        self.control.close(linger=0)
        self.tokens.close(linger=0)

    def wait(self) -> None:
        """Until the target has joined."""
        self._route, until = b"", time.monotonic() + HANG_S
        while not self._route:
            left_ms = int((until - time.monotonic()) * 1_000)
            assert left_ms > 0 and self.control.poll(left_ms), f"no hello for {HANG_S} s"
            self._listen()

    def send_one(self, sent: Counter[str]) -> None:
        if sent.total() % LISTEN_EVERY == 0:
            self._listen()
        if not self._route:
            began = time.monotonic()
            self.wait()
            self.lost_s += time.monotonic() - began
        if self._client and self.chance.random() < 0.3:
            self.tokens.send(self._topic + self._frame())
            sent["tokens"] += 1
            return
        direction, decoder = ("to_client", codec.to_client) if self._client else ("to_worker", codec.to_worker)
        frames = self.message(direction, self._say)
        if frames and ends(frames, decoder) and self.chance.random() > ENDS_IT:
            return
        self._send(frames)
        sent[direction] += bool(frames)
        if not self._client and sent.total() % 64 == 0:
            self._free()

    def _frame(self) -> bytes:
        if self.chance.random() < 0.9:
            return self.chunk()
        return tokens.encode_beat(self.chance.choice((1, 2**53, 2**64 - 1)), self.session)

    def _say(self) -> Said:
        if self._client:
            return plausible.to_client(self.chance, self.alive, self._queries)
        self._seq += 1
        return plausible.to_worker(self.chance, self.alive, self._seq, "fake")

    def _free(self) -> None:
        """Free the slots, so that the honest broker's requests run as well."""
        for key in self.alive:
            self._send(codec.encode(self.session, [(m.Cancel(key[:16], key[16:]), None), (m.EndAck([key]), None)]))

    def _send(self, frames: Frames) -> None:
        if not frames:
            return
        until = time.monotonic() + HANG_S
        while self._route:
            try:
                self.control.send_multipart([self._route, *frames], zmq.DONTWAIT)
                return
            except zmq.Again:
                assert time.monotonic() < until, f"the target takes nothing for {HANG_S} s"
                self._listen()
                time.sleep(0.001)  # libzmq does not report when a ROUTER has room for one peer again
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self._route = b""

    def _listen(self) -> None:
        decoder = codec.from_client if self._client else codec.from_worker
        with suppress(zmq.Again):
            for _ in range(1_000):
                route, *frames = self.control.recv_multipart(zmq.DONTWAIT)
                bundle = decoder.decode(frames)
                assert not bundle.problems, f"the target broke the protocol: {bundle.problems}"
                for message, _ in bundle.messages:
                    self._hear(route, message)
        with suppress(zmq.Again):
            for _ in range(1_000):
                self.tokens.recv(zmq.DONTWAIT)

    def _hear(self, route: bytes, message: m.Message) -> None:
        match message:
            case m.ClientHello() | m.WorkerHello():
                self._route, self.session = route, self.chance.randbytes(8)
                self.sessions += 1
                self.alive, self._seq = [], 0
                welcome = m.Welcome(self.session, self._token_port, self._topic if self._client else b"")
                self._send(codec.encode(codec.NO_SESSION, [(welcome, None)]))
            case m.InferenceRequest(id) | m.Attach(id):
                self.alive = [*self.alive[-8:], id]
                self.remember(id)
            case m.Query(query):
                self._queries = [*self._queries[-8:], query]
                self.remember(query)
            case m.Accept(id, dispatch):
                self.alive = [*self.alive[-8:], id + dispatch]
                self.remember(id, id + dispatch)
            case m.WorkerHeartbeat(beat=beat):
                self._send(codec.encode(self.session, [(m.BrokerHeartbeat(1, beat, seq=self._seq), None)]))
            case m.Goodbye():
                self._route = b""
            case _:
                pass
