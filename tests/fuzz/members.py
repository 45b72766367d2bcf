"""Attacks by peers that have joined through libzmq, with a valid key where keys are needed."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import zmq

from llambo.mesh.link import sockets
from llambo.mesh.security import keys
from llambo.mesh.wire import codec
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import PeerKey
from llambo.testing.raw_peer import RawPeer
from tests.fuzz import wire

PART = bytes(60_000)
#: A connection that takes nothing for so long is full.
FULL_S = 0.15
#: ZeroMQ may say PING so often.
PING_MS = 1
READ_BYTES = 256 * 1024


def key_of(line: str) -> PeerKey | None:
    return keys.from_line(line) if line else None


def endless_message(port: int, offset: int, until: float, key: str) -> int:
    """Parts without a last one, from a client with a session."""
    sent = 0
    with RawPeer(port, key=key_of(key)) as peer:
        peer.join_as_client()
        peer.control.setsockopt(zmq.SNDTIMEO, 500)
        with suppress(zmq.Again):
            while time.monotonic() < until:
                peer.control.send(PART, zmq.SNDMORE)
                sent += len(PART)
    return sent


def subscriptions(port: int, offset: int, until: float, key: str) -> int:
    """Topics that belong to no session, as many as can be sent."""
    sent = 0
    with RawPeer(port, key=key_of(key)) as peer:
        peer.join_as_client()
        tokens_out = peer.tokens_out()
        tokens_out.setsockopt(zmq.SNDTIMEO, 500)
        with suppress(zmq.Again):
            while time.monotonic() < until:
                tokens_out.send(b"\1" + os.urandom(900))
                sent += 901
    return sent


def ping_behind_a_full_queue(port: int, offset: int, until: float, key: str) -> int:
    """ZeroMQ's own heartbeats, a flood, and a connection that breaks when it is full."""
    sent = 0
    while time.monotonic() < until:
        with Breaker(port + offset) as breaker, zmq.Context() as context:
            control = sockets.control(context, zmq.DEALER, curve=key_of(key))
            control.setsockopt(zmq.HEARTBEAT_IVL, PING_MS)
            control.setsockopt(zmq.SNDTIMEO, 100)
            control.connect(f"tcp://127.0.0.1:{breaker.port}")
            with suppress(zmq.Again):
                while time.monotonic() < until and not breaker.broken:
                    control.send(b"T")
                    sent += 1
            control.close(linger=0)
    return sent


class Breaker:
    """A way to the broker that passes on what comes, and resets the connection as soon as it takes no more."""

    def __init__(self, port: int) -> None:
        self.broken = False
        self._target = port
        self._listener = socket.create_server((wire.HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._pass_on)

    def __enter__(self) -> Breaker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.broken = True
        self._listener.close()
        self._thread.join()

    def _pass_on(self) -> None:
        with suppress(OSError):
            self._listener.settimeout(wire.LIMIT_S)
            near, _ = self._listener.accept()
            with near:
                far = wire.connect(self._target)
                far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, READ_BYTES)
                with suppress(OSError):
                    self._pump(near, far)
                wire.reset(far)
        self.broken = True

    def _pump(self, near: socket.socket, far: socket.socket) -> None:
        far.settimeout(FULL_S)
        ends: list[Any] = [near, far]
        while not self.broken:
            readable, _, _ = select.select(ends, [], [], FULL_S)
            if far in readable:
                data = far.recv(READ_BYTES)
                if not data:
                    return
                near.sendall(data)
            if near in readable:
                data = near.recv(READ_BYTES)
                if not data:
                    return
                far.sendall(data)  # TimeoutError: it is full


def questions(port: int, offset: int, until: float, key: str) -> int:
    """Bundles full of queries whose answers are long, by a client that does not read them."""
    sent = 0
    with RawPeer(port, key=key_of(key)) as peer:
        peer.join_as_client()
        asked = [
            (m.Query(number, what), None)
            for number in range(1, 65)
            for what in ("events", "workers", "status", "requests")
        ]
        frames = codec.encode(peer.session, asked)
        peer.control.setsockopt(zmq.SNDTIMEO, 500)
        with suppress(zmq.Again):
            while time.monotonic() < until:
                peer.control.send_multipart(frames)
                sent += sum(map(len, frames))
    return sent
