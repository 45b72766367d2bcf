"""A peer of bare sockets, which sends any bytes and any messages, to test how a broker handles them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from llambo.mesh.link import sockets
from llambo.mesh.wire import codec, limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import PeerKey
from llambo.testing.processes import TIMEOUT_S

T = TypeVar("T", bound=m.Message)

#: All messages that a broker sends.
_from_broker: codec.Codec[Any] = codec.Codec(m.BrokerToClient | m.BrokerToWorker)


class RawPeer:
    """A DEALER to one of the control sockets, and other sockets on request."""

    def __init__(
        self, port: int, offset: int = 0, key: PeerKey | None = None, context: zmq.Context[Any] | None = None
    ) -> None:
        """With a context of the caller, `close` leaves it open."""
        self.context: zmq.Context[Any] = context or zmq.Context()
        self._owns_context = context is None
        self.session = codec.NO_SESSION
        self.topic = b""
        #: All messages that it received, each with its session.
        self.received: list[tuple[bytes, m.Message]] = []
        self._unread: list[m.Message] = []
        self._base = port
        self._key = key
        self._tokens: list[zmq.Socket[bytes]] = []
        self.control = sockets.control(self.context, zmq.DEALER, curve=key)
        self.control.connect(f"tcp://127.0.0.1:{port + offset}")

    def close(self) -> None:
        for socket in (self.control, *self._tokens):
            socket.close(linger=0)
        if self._owns_context:
            self.context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- control -------------------------------------------------------------------------------------

    def send(self, *frames: bytes) -> None:
        assert self.control.poll(int(TIMEOUT_S * 1_000), zmq.POLLOUT), "the broker accepts nothing"
        self.control.send_multipart(list(frames))

    def send_messages(
        self, *messages: m.Message, blobs: list[bytes] | None = None, session: bytes | None = None
    ) -> None:
        body = msgspec.msgpack.encode(list(messages))
        self.send(codec.MAGIC + (self.session if session is None else session), body, *(blobs or []))

    def send_map(self, fields: dict[str, Any], *blobs: bytes) -> None:
        """Send a map, which need not be a valid message."""
        self.send(codec.MAGIC + self.session, msgspec.msgpack.encode([fields]), *blobs)

    def expect(self, kind: type[T], **fields: Any) -> T:
        """The next message of this kind with these values. Other messages are left to later calls."""
        deadline = time.monotonic() + TIMEOUT_S
        seen = 0
        while True:
            for at in range(seen, len(self._unread)):
                message = self._unread[at]
                if isinstance(message, kind) and all(getattr(message, name) == fields[name] for name in fields):
                    del self._unread[at]
                    return message
            seen = len(self._unread)
            wait_ms = int((deadline - time.monotonic()) * 1_000)
            assert wait_ms > 0 and self.control.poll(wait_ms), f"no {kind.__name__} {fields} came, but {self.received}"
            self._receive()

    def _receive(self) -> None:
        bundle = _from_broker.decode(self.control.recv_multipart())
        assert not bundle.problems, "the broker itself broke the protocol"
        self.received += [(bundle.session, message) for message, _ in bundle.messages]
        self._unread += [message for message, _ in bundle.messages]

    def join_as_client(self) -> m.Welcome:
        self.send_messages(m.ClientHello(name="raw"), session=codec.NO_SESSION)
        return self.joined()

    def join_as_worker(self, name: str = "raw", model: str = "raw") -> m.Welcome:
        hello = m.WorkerHello(name, secrets.token_bytes(8), [m.ModelInfo(model)], 1)
        self.send_messages(hello, session=codec.NO_SESSION)
        return self.joined()

    def joined(self) -> m.Welcome:
        welcome = self.expect(m.Welcome)
        self.session, self.topic = welcome.session, welcome.topic
        return welcome

    def disconnected_by(self, *frames: bytes, on: zmq.Socket[bytes] | None = None) -> None:
        """Send invalid frames, and wait until the broker has disconnected and the socket has connected again.

        Messages that are sent in between may be lost with the old connection.
        """
        socket = on or self.control
        with self._events(socket, zmq.EVENT_DISCONNECTED, zmq.EVENT_HANDSHAKE_SUCCEEDED):
            socket.send_multipart(list(frames))

    @contextmanager
    def _events(self, socket: zmq.Socket[bytes], *events: int) -> Iterator[None]:
        """Wait at the end of the block for these events of the socket, in this order."""
        monitor = socket.get_monitor_socket(sum(events), f"inproc://{secrets.token_hex(8)}")
        try:
            yield
            for event in events:
                while True:
                    assert monitor.poll(int(TIMEOUT_S * 1_000)), f"no {zmq.Event(event).name} in {TIMEOUT_S} s"
                    if recv_monitor_message(monitor)["event"] == event:
                        break
        finally:
            socket.disable_monitor()
            monitor.close()

    # --- the token planes ------------------------------------------------------------------------------

    def tokens_out(self) -> zmq.Socket[bytes]:
        """An XSUB: a SUB that can send any bytes upstream."""
        return self._connected(zmq.XSUB, sockets.TOKENS_OUT_OFFSET)

    def tokens_in(self) -> zmq.Socket[bytes]:
        """An XPUB to which the broker has subscribed, so that nothing that it publishes is lost."""
        socket = self._connected(zmq.XPUB, sockets.TOKENS_IN_OFFSET)
        for _ in range(2):  # to chunks and to beats
            assert socket.poll(int(TIMEOUT_S * 1_000)), "the broker does not subscribe"
            socket.recv()
        return socket

    def _connected(self, kind: int, offset: int) -> zmq.Socket[bytes]:
        socket = sockets.token(self.context, kind, curve=self._key)
        self._tokens.append(socket)
        with self._events(socket, zmq.EVENT_HANDSHAKE_SUCCEEDED):
            socket.connect(f"tcp://127.0.0.1:{self._base + offset}")
        return socket


def inference_request(**changes: Any) -> dict[str, Any]:
    """The fields of a valid request, with these changes."""
    fields = {"type": "inference_request", "id": secrets.token_bytes(limits.REQUEST_ID_BYTES), "max_tokens": 5}
    return {**fields, **changes}
