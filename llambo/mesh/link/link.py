"""The sockets of one link, which performs the actions of its core. Used by one thread only, which polls it."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import struct
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import zmq

from llambo.mesh.link import sockets
from llambo.mesh.link.link_core import CloseLink, ConnectionChange, LinkAction, OpenControl, OpenTokens, Publish, Send
from llambo.mesh.wire import codec
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.identity import PeerKey

# --- The names of brokers are looked up in a thread, because that may take seconds. ---


class Lookup:
    """One call of the resolver, in a thread. Its descriptor becomes readable when the call has returned."""

    def __init__(self, addresses: str) -> None:
        self.done = False
        #: Why the lookup failed; empty if it did not.
        self.problem = ""
        self.found: list[tuple[str, int]] = []
        self._addresses = addresses
        self._reader, self._writer = os.pipe()
        threading.Thread(target=self._run, name="lookup", daemon=True).start()

    def fileno(self) -> int:
        return self._reader

    def close(self) -> None:
        """A resolver cannot be interrupted. If it still runs, its result will be ignored."""
        os.close(self._reader)

    def _run(self) -> None:
        try:
            self.found = sockets.resolve_all(self._addresses)
        except LlamboError as error:
            self.problem = error.text
        self.done = True
        with contextlib.suppress(BrokenPipeError):  # the lookup was closed
            os.write(self._writer, b"\0")
        os.close(self._writer)


log = logging.getLogger(__name__)

#: Control messages that wait while there is no connection. If there are more, the oldest are dropped.
PENDING_MESSAGES = 1_024
#: Messages read from one socket before the others are read.
DRAIN_MESSAGES = 1_000
#: Messages of one bundle.
BUNDLED_MESSAGES = 64
#: Events of the control connection that libzmq reports, each as a number and a value.
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | _FAILED
_EVENT = struct.Struct("=HI")


class Brokers:
    """The brokers of an address, in the order in which this peer tries them.

    With `spread` each peer has a random order, so that the peers are spread over the brokers; without it only the first
    broker is used. `first`: the address of the one to begin with.
    """

    def __init__(self, address: str, *, spread: bool, first: str = "") -> None:
        self.address = address
        self.found: list[tuple[str, int]] = []
        #: The number of the current broker, modulo the number of brokers.
        self.target = 0
        #: True if there is no name to look up.
        self.literal = all(sockets.literal(host) for host, _ in sockets.split_all(address))
        self._spread, self._first = spread, first
        self._shares: dict[tuple[str, int], float] = {}

    def take(self, found: list[tuple[str, int]]) -> None:
        """Use the results of a lookup. Known brokers stay in the same order."""
        if not self._spread:
            self.found = found[:1]
            return
        for place in found:
            self._shares.setdefault(place, -1.0 if sockets.endpoint(*place) == self._first else random.random())
        self.found = sorted(found, key=lambda place: self._shares[place])

    @property
    def current(self) -> tuple[str, int]:
        return self.found[self.target % len(self.found)]


class Outbox:
    """Control messages before they reach the socket. Those of one round are sent as one bundle."""

    def __init__(self) -> None:
        self.pending: deque[list[bytes]] = deque(maxlen=PENDING_MESSAGES)
        self._messages: list[tuple[m.Message, bytes | None]] = []
        self._session = codec.NO_SESSION

    def add(self, session: bytes, message: m.Message, blob: bytes | None) -> bool:
        """False if the outbox has to be flushed first."""
        if session != self._session or len(self._messages) >= BUNDLED_MESSAGES:
            if self._messages:
                return False
            self._session = session
        self._messages.append((message, blob))
        return True

    def bundle(self) -> None:
        if self._messages:
            self.pending.extend(codec.encode_all(self._session, self._messages))
            self._messages = []

    def clear(self) -> None:
        self.pending.clear()
        self._messages = []


class Link:
    """DEALER for control, and SUB (client) or XPUB (worker) for tokens.

    `address` may be a list, and a name may have several IP addresses: see `Brokers`. `OpenControl` has the number of
    the broker to connect to.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        *,
        token_kind: int,
        offset: int,
        decoder: codec.Codec[Any],
        token_hwm: int = sockets.TOKEN_HWM,
        spread: bool = False,
        first: str = "",
        key: PeerKey | None = None,
    ) -> None:
        self.control: zmq.Socket[bytes] | None = None
        self.tokens: zmq.Socket[bytes] | None = None
        #: Reports events of the control connection.
        self.monitor: zmq.Socket[bytes] | None = None
        #: A lookup in progress. When it is done, call `answered`.
        self.lookup: Lookup | None = None
        self.brokers = Brokers(address, spread=spread, first=first)
        self.dropped_frames = 0
        self._context = context
        self._offset = offset
        self._token_kind = token_kind
        self._token_hwm = token_hwm
        self._decoder = decoder
        self._key = key
        self._ip = ""
        self._connected = False
        self._outbox = Outbox()

    # --- actions --------------------------------------------------------------------------------------

    def perform(self, action: LinkAction) -> None:
        match action:
            case Send(_, session, message, blob):
                if not self._outbox.add(session, message, blob):
                    self.flush()
                    self._outbox.add(session, message, blob)
            case Publish(_, frames):
                self._publish(frames)
            case OpenControl(_, target):
                self._open_control(target)
            case OpenTokens(_, port, topic):
                self._open_tokens(port, topic)
            case CloseLink():
                self.flush()
                self.close()

    def flush(self) -> None:
        """Send the messages since the last flush as one bundle."""
        self._outbox.bundle()
        self.push()

    def push(self) -> None:
        """Pass pending messages to the socket until it is full."""
        pending = self._outbox.pending
        while pending and self.control is not None:
            try:
                self.control.send_multipart(pending[0], zmq.DONTWAIT, copy=True)
            except zmq.Again:
                return
            pending.popleft()

    @property
    def wants_to_write(self) -> bool:
        return bool(self._outbox.pending) and self.control is not None

    # --- arrivals ------------------------------------------------------------------------------------

    def receive_control(self) -> Iterator[codec.Bundle[Any]]:
        for _ in range(DRAIN_MESSAGES):
            if self.control is None:
                return
            try:
                frames = [frame.bytes for frame in sockets.receive(self.control)]
            except zmq.Again:
                return
            yield self._decoder.decode(frames)

    def receive_changes(self) -> Iterator[ConnectionChange]:
        """Changes of the control connection since the last call."""
        while self.monitor is not None:
            try:
                event, value = _EVENT.unpack(self.monitor.recv_multipart(zmq.DONTWAIT)[0])
            except zmq.Again:
                return
            connected, self._connected = self._connected, event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if self._connected:
                yield ConnectionChange.CONNECTED
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                yield ConnectionChange.KEY_DENIED
            elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
                yield ConnectionChange.KEY_MISMATCH
            elif event in (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
                yield ConnectionChange.HANDSHAKE_FAILED
            else:
                yield ConnectionChange.LOST if connected else ConnectionChange.REFUSED

    def receive_tokens(self) -> list[bytes]:
        """Frames from the token plane. Each is checked by itself, so multipart messages need no treatment."""
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

    def _open_control(self, target: int) -> None:
        self.close()
        self.brokers.target = target
        if self.brokers.literal:
            self.brokers.take(sockets.resolve_all(self.brokers.address))
        elif not self.brokers.found or target == 0:
            # Once in each round over all brokers: the name may have other addresses now.
            self.lookup = Lookup(self.brokers.address)
            return
        self._connect()

    def answered(self) -> None:
        """The lookup is done. If it failed, the hello of the core gets no answer, and the core tries again later."""
        lookup, self.lookup = self.lookup, None
        if lookup is None:
            return
        lookup.close()
        if lookup.problem:
            log.warning("%s", lookup.problem)
        if lookup.found:
            self.brokers.take(lookup.found)
        if self.brokers.found:
            self._connect()

    def _connect(self) -> None:
        self._ip, port = self.brokers.current
        self.control = sockets.control(self._context, zmq.DEALER, curve=self._key)
        self.monitor = self.control.get_monitor_socket(_WATCHED)
        self._connected = False
        self.control.connect(sockets.endpoint(self._ip, port + self._offset))

    def _open_tokens(self, port: int, topic: bytes) -> None:
        if self.tokens is not None:
            self.tokens.close(linger=0)
        self.tokens = sockets.token(self._context, self._token_kind, self._token_hwm, curve=self._key)
        if self._token_kind == zmq.SUB:
            self.tokens.setsockopt(zmq.SUBSCRIBE, topic)
        self.tokens.connect(sockets.endpoint(self._ip, port))

    def close(self) -> None:
        if self.lookup is not None:
            self.lookup.close()
        if self.monitor is not None and self.control is not None:
            self.control.disable_monitor()
            self.monitor.close(linger=0)
        self.lookup = self.monitor = None
        if self.control is not None:
            self.control.close()
        if self.tokens is not None:
            self.tokens.close(linger=0)
        self.control = self.tokens = None
        self._outbox.clear()
