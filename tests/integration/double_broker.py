"""A test double of a broker: two raw sockets without logic. It sends what a test sends, and heartbeats.

It is here so that the worker agent can be tested alone, down to the bytes; the real broker is in `broker/`.
"""

from __future__ import annotations

import time
from typing import Any, TypeVar

import zmq

from llambo.mesh.wire import codec, tokens
from llambo.mesh.wire import messages as m

T = TypeVar("T")
TIMEOUT_S = 30.0


class DoubleBroker:
    """Serves one worker at a time. Whatever it waits for has a deadline and ends with the story when it is missed."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.control = self.context.socket(zmq.ROUTER)
        self.control.linger = 0
        self.worker_port = self.control.bind_to_random_port("tcp://127.0.0.1")
        self.tokens_in = self.context.socket(zmq.SUB)
        self.token_port = self.tokens_in.bind_to_random_port("tcp://127.0.0.1")
        self.tokens_in.subscribe(b"T")
        self.tokens_in.subscribe(b"B")
        self.session = codec.NO_SESSION
        self.route = b""
        self.seen_beat = 0
        self.worker_state = "unknown"
        self.seq = 0
        #: Chunks as they came; messages not yet expected; everything, for the story.
        self.chunks: list[tokens.TokenChunk] = []
        self.inbox: list[Any] = []
        self.story: list[Any] = []

    @property
    def address(self) -> str:
        """Workers add one to the port that clients use."""
        return f"tcp://127.0.0.1:{self.worker_port - 1}"

    def close(self) -> None:
        self.control.close(linger=0)
        self.tokens_in.close(linger=0)
        self.context.term()

    # --- saying --------------------------------------------------------------------------------------

    def send(self, message: m.Message, blob: bytes | None = None) -> None:
        self.send_frames(codec.encode(self.session, [(message, blob)]))

    def send_frames(self, frames: list[bytes]) -> None:
        self.control.send_multipart([self.route, *frames])

    def dispatch(self, number: int, prompt: bytes = b"hello", **changes: Any) -> bytes:
        self.seq += 1
        fields = {"model": "fake", "max_tokens": 20, "seed": 7, **changes}
        message = m.Dispatch(bytes([number]) * 16, b"dispatch", seq=self.seq, **fields)
        self.send(message, prompt)
        return message.id + message.dispatch

    def welcome(self, session: bytes = b"session1") -> m.WorkerHello:
        """Wait for a hello and answer it, until the worker's beats come through and it has loaded its model."""
        hello = self.expect(m.WorkerHello)
        self.session, self.seen_beat, self.worker_state = session, 0, "unknown"
        self.send(m.Welcome(session, self.token_port, heartbeat_ms=50))
        self.until(lambda: self.seen_beat > 0, "a beat on the token plane")
        self.send(m.BrokerHeartbeat(1, self.seen_beat, seq=self.seq))
        self.until(lambda: self.worker_state == "ready", "a worker that is ready")
        return hello

    # --- hearing -------------------------------------------------------------------------------------

    def expect(self, kind: type[T], **fields: Any) -> T:
        """The next message of this kind that has these fields; others of this kind before it are passed over."""
        found: list[T] = []

        def arrived() -> bool:
            while self.inbox:
                message = self.inbox.pop(0)
                if isinstance(message, kind) and all(getattr(message, k) == v for k, v in fields.items()):
                    found.append(message)
                    return True
            return False

        self.until(arrived, f"{kind.__name__} {fields}")
        return found[0]

    def until(self, condition: Any, what: str, timeout_s: float = TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        poller = zmq.Poller()
        poller.register(self.control, zmq.POLLIN)
        poller.register(self.tokens_in, zmq.POLLIN)
        while not condition():
            left_ms = int(1000 * (deadline - time.monotonic()))
            if left_ms <= 0:
                story = "\n".join(map(str, self.story[-20:]))
                raise AssertionError(f"{what} did not come within {timeout_s} s; {len(self.chunks)} chunks; {story}")
            ready = dict(poller.poll(left_ms))
            if self.tokens_in in ready:
                self._hear_token(self.tokens_in.recv())
            if self.control in ready:
                self._hear(self.control.recv_multipart())

    def _hear_token(self, frame: bytes) -> None:
        beat = tokens.decode_beat(frame)
        if beat is not None:
            self.seen_beat = beat[0] if beat[1] == self.session else self.seen_beat
        else:
            chunk = tokens.decode_chunk(frame)
            assert chunk is not None, f"not a chunk: {frame!r}"
            self.chunks.append(chunk)

    def _hear(self, frames: list[bytes]) -> None:
        bundle = codec.from_worker.decode(frames[1:])
        assert not bundle.problems, bundle.problems
        self.route = frames[0]
        for message, _ in bundle.messages:
            self.inbox.append(message)
            self.story.append(message)
            if isinstance(message, m.WorkerHeartbeat) and bundle.session == self.session:
                self.worker_state = message.state
                self.send(m.BrokerHeartbeat(message.beat, self.seen_beat, seq=self.seq))

    # --- tokens --------------------------------------------------------------------------------------

    def ids(self, key: bytes) -> list[int]:
        """Published ids of a run in order; an assertion fails if an index is missing or doubled."""
        mine = [chunk for chunk in self.chunks if chunk.key == key]
        ids: list[int] = []
        for chunk in mine:
            assert chunk.first == mine[0].first + len(ids), "a gap or a repetition on the token plane"
            ids += chunk.body.ids
        return ids
