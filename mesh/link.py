"""The sockets of one link, as its core orders them. Belongs to the thread that polls it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from typing import Any

import zmq

from llambo.mesh import codec, sockets
from llambo.mesh import messages as m
from llambo.mesh.errors import LlamboError
from llambo.mesh.link_core import CloseLink, LinkOrder, OpenControl, OpenTokens, Publish, Send

log = logging.getLogger(__name__)

#: Control messages held back while the connection is being made or blips; then the oldest go first.
PENDING_MESSAGES = 1_024
#: Messages taken from one socket before the others get a turn.
DRAIN_MESSAGES = 1_000


class Link:
    """DEALER for control, and SUB (client) or XPUB (worker) for tokens."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        *,
        token_kind: int,
        offset: int,
        decoder: codec.Codec[Any],
        token_hwm: int = sockets.TOKEN_HWM,
    ) -> None:
        self.control: zmq.Socket[bytes] | None = None
        self.tokens: zmq.Socket[bytes] | None = None
        self.dropped_frames = 0
        self._context = context
        self._address = address
        self._offset = offset
        self._token_kind = token_kind
        self._token_hwm = token_hwm
        self._decoder = decoder
        self._ip = ""
        self._outbox: list[tuple[m.Message, bytes | None]] = []
        self._outbox_session = codec.NO_SESSION
        self._pending: deque[list[bytes]] = deque(maxlen=PENDING_MESSAGES)

    # --- orders --------------------------------------------------------------------------------------

    def perform(self, order: LinkOrder) -> None:
        match order:
            case Send(_, session, message, blob):
                if session != self._outbox_session or len(self._outbox) >= 64:
                    self.flush()
                self._outbox_session = session
                self._outbox.append((message, blob))
            case Publish(_, frames):
                self._publish(frames)
            case OpenControl():
                self._open_control()
            case OpenTokens(_, port, topic):
                self._open_tokens(port, topic)
            case CloseLink():
                self.flush()
                self.close()

    def flush(self) -> None:
        """Send what was ordered since the last flush, as one bundle."""
        if self._outbox:
            self._pending.extend(codec.encode_all(self._outbox_session, self._outbox))
            self._outbox = []
        self.push()

    def push(self) -> None:
        """Hand pending messages to the socket, as far as it takes them."""
        while self._pending and self.control is not None:
            try:
                self.control.send_multipart(self._pending[0], zmq.DONTWAIT, copy=True)
            except zmq.Again:
                return
            self._pending.popleft()

    @property
    def wants_to_write(self) -> bool:
        return bool(self._pending) and self.control is not None

    # --- arrivals ------------------------------------------------------------------------------------

    def receive_control(self) -> Iterator[codec.Bundle[Any]]:
        for _ in range(DRAIN_MESSAGES):
            if self.control is None:
                return
            try:
                frames = self.control.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            yield self._decoder.decode(frames)

    def receive_tokens(self) -> list[bytes]:
        """Frames from the token plane. Each is checked for itself, so it does not matter how they were sent."""
        frames: list[bytes] = []
        if self.tokens is None:
            return frames
        receive = self.tokens.recv
        try:
            for _ in range(DRAIN_MESSAGES):
                frames.append(receive(zmq.DONTWAIT))
        except zmq.Again:
            pass
        return frames

    # --- inside --------------------------------------------------------------------------------------

    def _publish(self, frames: list[bytes]) -> None:
        if self.tokens is None:
            return
        for frame in frames:
            try:
                self.tokens.send(frame, zmq.DONTWAIT)
            except zmq.Again:
                self.dropped_frames += 1

    def _open_control(self) -> None:
        self.close()
        try:
            self._ip, port = sockets.resolve(self._address, self._offset)
        except LlamboError as error:
            # The core sees a greeting without an answer and tries again after its back-off.
            log.warning("%s", error)
            return
        self.control = sockets.control(self._context, zmq.DEALER)
        self.control.connect(sockets.endpoint(self._ip, port))

    def _open_tokens(self, port: int, topic: bytes) -> None:
        if self.tokens is not None:
            self.tokens.close(linger=0)
        self.tokens = sockets.token(self._context, self._token_kind, self._token_hwm)
        if self._token_kind == zmq.SUB:
            self.tokens.setsockopt(zmq.SUBSCRIBE, topic)
        self.tokens.connect(sockets.endpoint(self._ip, port))

    def close(self) -> None:
        if self.control is not None:
            self.control.close()
        if self.tokens is not None:
            self.tokens.close(linger=0)
        self.control = self.tokens = None
        self._pending.clear()
        self._outbox = []
