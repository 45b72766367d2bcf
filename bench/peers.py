"""A client and a worker that only speak the protocol, as cheaply as Python can. They are fakes: they repair
nothing, check nothing and never join again. They share the machine with what is measured, so they must not be
what is slow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import zmq

from llambo.mesh.link import sockets
from llambo.mesh.wire import codec, limits, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import PeerKey

#: How long joining may take.
JOIN_MS = 10_000
#: A worker has to be heard well within its lease.
BEAT_S = 0.3
#: A broker's settings for peers that are silent between their rounds.
PATIENT = {"lease_ms": 60_000, "client_lease_ms": 60_000}
#: A client's beat on the token plane is this long; every chunk is longer.
BEAT_FRAME_BYTES = limits.TOPIC_BYTES + tokens.BEAT_BYTES
#: What the fake worker says: the body of a chunk with one token.
BODY = tokens.encode_chunk(bytes(24), 0, [4711], [b" word"])[tokens.HEAD_BYTES :]

Socket = zmq.Socket[bytes]
Said = Sequence[tuple[m.Message, bytes | None]]


class Peer:
    """A DEALER for control and a socket for tokens."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        control_port: int,
        token_kind: int,
        decoder: codec.Codec[Any],
        key: PeerKey | None,
    ):
        self.control = sockets.control(context, zmq.DEALER, curve=key)
        self.control.connect(f"tcp://127.0.0.1:{control_port}")
        self.tokens = sockets.token(context, token_kind, curve=key)
        self.session = codec.NO_SESSION
        self._heard: deque[tuple[Any, bytes]] = deque()
        self._decode = decoder.decode

    def say(self, said: Said) -> None:
        """Everything at once, in as few messages as the limits allow."""
        for frames in codec.encode_all(self.session, said):
            self.control.send_multipart(frames)

    def say_each(self, said: Said) -> None:
        """Everything in a message of its own."""
        for one in said:
            self.control.send_multipart(codec.encode(self.session, [one]))

    def hear(self) -> list[tuple[Any, bytes]]:
        """All that has arrived."""
        heard: list[tuple[Any, bytes]] = []
        try:
            while True:
                bundle = self._decode(self.control.recv_multipart(zmq.DONTWAIT))
                if bundle.problems:
                    raise RuntimeError(f"{bundle.problems}")
                heard += bundle.messages
        except zmq.Again:
            return heard

    def await_message(self, kind: type[m.Message]) -> Any:
        """The next one of this kind; what came before it is skipped, what came with it is kept."""
        while self._heard or self.control.poll(JOIN_MS):
            if not self._heard:
                self._heard.extend(self.hear())
            while self._heard:
                message, _ = self._heard.popleft()
                if isinstance(message, kind):
                    return message
        raise RuntimeError(f"no {kind.__name__} within {JOIN_MS} ms")

    def greet(self, hello: m.Message) -> m.Welcome:
        self.say([(hello, None)])
        welcome: m.Welcome = self.await_message(m.Welcome)
        self.session = welcome.session
        return welcome

    def hear_tokens(self) -> list[bytes]:
        frames: list[bytes] = []
        receive, keep = self.tokens.recv, frames.append
        try:
            while True:
                keep(receive(zmq.DONTWAIT))
        except zmq.Again:
            return frames

    def close(self) -> None:
        self.control.close(linger=0)
        self.tokens.close(linger=0)


class FakeClient(Peer):
    def __init__(self, context: zmq.Context[Socket], port: int, key: PeerKey | None = None) -> None:
        super().__init__(context, port, zmq.SUB, codec.to_client, key)
        welcome = self.greet(m.ClientHello(name="bench"))
        self.tokens.setsockopt(zmq.SUBSCRIBE, welcome.topic)
        self.tokens.connect(f"tcp://127.0.0.1:{welcome.token_port}")
        if not self.tokens.poll(JOIN_MS):
            raise RuntimeError(f"no beat on the token plane within {JOIN_MS} ms")

    def close(self) -> None:
        self.say([(m.Goodbye("done"), None)])
        super().close()


class FakeWorker(Peer):
    """`seq` stays 0 and nothing is claimed: no dispatch then counts as lost, and none has to be remembered."""

    def __init__(
        self, context: zmq.Context[Socket], port: int, slots: int, name: str = "bench", key: PeerKey | None = None
    ) -> None:
        super().__init__(context, port + sockets.WORKER_OFFSET, zmq.XPUB, codec.to_worker, key)
        self.beat = 0
        models = [m.ModelInfo("fake", "fake")]
        welcome = self.greet(m.WorkerHello(name=name, incarnation=b"bench", models=models, slots=slots))
        self.tokens.connect(f"tcp://127.0.0.1:{welcome.token_port}")
        if not self.tokens.poll(JOIN_MS):
            raise RuntimeError(f"no subscription within {JOIN_MS} ms")
        self.heartbeat()
        while not self.await_message(m.BrokerHeartbeat).echo:
            pass

    def heartbeat(self) -> None:
        self.beat += 1
        self.tokens.send(tokens.encode_beat(self.beat, self.session))
        self.say([(m.WorkerHeartbeat(beat=self.beat), None)])

    def answer(self, dispatch: m.Dispatch, flags: int = tokens.FINAL) -> list[tuple[m.Message, bytes | None]]:
        """One token, and the end."""
        key = dispatch.id + dispatch.dispatch
        self.tokens.send(tokens.CHUNK + key + _FIRST[flags] + BODY)
        return [
            (m.Accept(dispatch.id, dispatch.dispatch), None),
            (m.End(dispatch.id, 1, "length", dispatch.dispatch), None),
        ]


#: The rest of a chunk's head: index 0, one token, flags.
_FIRST = {
    flags: tokens.encode_chunk(bytes(24), 0, [1], [b""], flags)[tokens.KEY_END : tokens.HEAD_BYTES]
    for flags in (0, tokens.FINAL)
}


def request_ids(draw: bytes) -> list[bytes]:
    size = limits.REQUEST_ID_BYTES
    return [draw[at : at + size] for at in range(0, len(draw), size)]
