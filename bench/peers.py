"""A client and a worker that only speak the protocol, as cheaply as Python can: they repair nothing, check nothing and
never join again. They share the machine with what is measured, so they must not be the slow part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import zmq

from llambo.mesh.link import sockets
from llambo.mesh.wire import codec, limits, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import PeerKey
from llambo.testing.raw_peer import RawPeer

#: How long joining may take.
JOIN_MS = 10_000
#: A worker sends heartbeats well within its lease.
BEAT_S = 0.3
#: Settings of a broker whose peers are silent between their rounds.
SILENT = {"lease_ms": 60_000, "client_lease_ms": 60_000}
#: A client's beat on the token plane is this long; every chunk is longer.
BEAT_FRAME_BYTES = limits.TOPIC_BYTES + tokens.BEAT_BYTES
#: What the fake worker publishes: the body of a chunk with one token.
BODY = tokens.encode_chunk(bytes(24), 0, [4711], [b" word"])[tokens.HEAD_BYTES :]

Socket = zmq.Socket[bytes]
Pairs = Sequence[tuple[m.Message, bytes | None]]


class Peer(RawPeer):
    """A DEALER for control and a socket for tokens."""

    def __init__(
        self, context: zmq.Context[Socket], port: int, offset: int, token_kind: int, decoder: codec.Codec[Any],
        key: PeerKey | None,
    ) -> None:  # fmt: skip
        super().__init__(port, offset, key, context)
        self.tokens = sockets.token(context, token_kind, curve=key)
        self._tokens.append(self.tokens)
        self._decode = decoder.decode

    def send_all(self, pairs: Pairs) -> None:
        """All messages, in as few bundles as the limits allow."""
        for frames in codec.encode_all(self.session, pairs):
            self.control.send_multipart(frames)

    def send_each(self, pairs: Pairs) -> None:
        """Each message in a bundle of its own."""
        for one in pairs:
            self.control.send_multipart(codec.encode(self.session, [one]))

    def receive(self) -> list[tuple[Any, bytes]]:
        """All that has arrived."""
        received: list[tuple[Any, bytes]] = []
        try:
            while True:
                bundle = self._decode(self.control.recv_multipart(zmq.DONTWAIT))
                if bundle.problems:
                    raise RuntimeError(f"{bundle.problems}")
                received += bundle.messages
        except zmq.Again:
            return received

    def receive_tokens(self) -> list[bytes]:
        frames: list[bytes] = []
        receive, keep = self.tokens.recv, frames.append
        try:
            while True:
                keep(receive(zmq.DONTWAIT))
        except zmq.Again:
            return frames


class FakeClient(Peer):
    def __init__(self, context: zmq.Context[Socket], port: int, key: PeerKey | None = None) -> None:
        super().__init__(context, port, 0, zmq.SUB, codec.to_client, key)
        welcome = self.join_as_client()
        self.tokens.setsockopt(zmq.SUBSCRIBE, welcome.topic)
        self.tokens.connect(f"tcp://127.0.0.1:{welcome.token_port}")
        if not self.tokens.poll(JOIN_MS):
            raise RuntimeError(f"no beat on the token plane within {JOIN_MS} ms")

    def close(self) -> None:
        self.send_all([(m.Goodbye("done"), None)])
        super().close()


class FakeWorker(Peer):
    """`seq` stays 0 and nothing is claimed: no dispatch then counts as lost, and none has to be remembered."""

    def __init__(
        self, context: zmq.Context[Socket], port: int, slots: int, name: str = "bench", key: PeerKey | None = None
    ) -> None:
        super().__init__(context, port, sockets.WORKER_OFFSET, zmq.XPUB, codec.to_worker, key)
        self.beat = 0
        models = [m.ModelInfo("fake", "fake")]
        self.send_messages(m.WorkerHello(name=name, incarnation=b"bench", models=models, slots=slots))
        welcome = self.joined()
        self.tokens.connect(f"tcp://127.0.0.1:{welcome.token_port}")
        if not self.tokens.poll(JOIN_MS):
            raise RuntimeError(f"no subscription within {JOIN_MS} ms")
        self.heartbeat()
        while not self.expect(m.BrokerHeartbeat).echo:
            pass

    def receive(self) -> list[tuple[Any, bytes]]:
        received = super().receive()
        self._confirm([message for message, _ in received])
        return received

    def _receive(self) -> None:
        super()._receive()
        self._confirm(self._unread)
        self._unread = [message for message in self._unread if type(message) is not m.Cancel]

    def _confirm(self, messages: list[m.Message]) -> None:
        """The broker cancels runs that never were, to learn what was read; without an answer it dispatches no more."""
        cancelled = [message for message in messages if type(message) is m.Cancel]
        if cancelled:
            self.send_all([(m.End(cancel.id, 0, "cancelled", cancel.dispatch), None) for cancel in cancelled])

    def heartbeat(self) -> None:
        self.beat += 1
        self.tokens.send(tokens.encode_beat(self.beat, self.session))
        self.send_all([(m.WorkerHeartbeat(beat=self.beat), None)])

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
