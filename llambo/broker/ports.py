"""The broker's four sockets: how they are made and bound, and who may subscribe to what.

With keys, each has its own ZAP domain.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import zmq

from llambo.broker.access.zap_handler import ZapHandler
from llambo.broker.records.registry import ClientEntry
from llambo.mesh.link import sockets
from llambo.mesh.service.host import descriptors
from llambo.mesh.service.service_manager import Inherited
from llambo.mesh.wire import limits, tokens
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.identity import CLIENT_DOMAIN, WORKER_DOMAIN

#: How often descriptors and peers are counted, and when a warning is repeated.
LOOK_MS, WARN_AGAIN_MS = 1_000, 60_000
#: New sessions are refused when so many percent of the descriptors are in use: their peers can be sent the reason.
CROWDED_PERCENT = 90
#: Tries to find four free ports in a row when any will do.
PORT_TRIES = 100

log = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]


class Ports(NamedTuple):
    """In the order of their ports."""

    clients: Socket
    workers: Socket
    tokens_in: Socket
    tokens_out: Socket


def make(context: zmq.Context[Any], token_hwm: int, zap: ZapHandler | None) -> Ports:
    _randomize_routes()
    outside = zap.door(CLIENT_DOMAIN) if zap else None
    inside = zap.door(WORKER_DOMAIN) if zap else None
    ports = Ports(
        sockets.control(context, zmq.ROUTER, sockets.CLIENT_HWM, curve=outside),
        sockets.control(context, zmq.ROUTER, curve=inside),
        sockets.token(context, zmq.SUB, token_hwm, curve=inside),
        sockets.token(context, zmq.XPUB, token_hwm, curve=outside),
    )
    ports.tokens_out.setsockopt(zmq.XPUB_MANUAL, 1)
    for prefix in (tokens.CHUNK, tokens.BEAT):
        ports.tokens_in.setsockopt(zmq.SUBSCRIBE, prefix)
    return ports


def _randomize_routes() -> None:
    """Make the routing ids of the next peers unpredictable.

    A ROUTER numbers its peers upwards from a number that libzmq takes from rand(), which it never seeds: it is the same
    in every process. A peer may choose its id itself, and libzmq aborts when it is about to assign one that is taken.
    With known numbers two connections could so end a broker.
    """
    ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4), "big"))


def bind(
    context: zmq.Context[Any],
    host: str,
    port: int,
    token_hwm: int,
    zap: ZapHandler | None = None,
    inherited: Inherited | None = None,
) -> tuple[Ports, int]:
    """All four, at `port` and the three after it; with 0, at any free ones. Returns the first port as well."""
    for _ in range(1 if port else PORT_TRIES):
        ports = make(context, token_hwm, zap)
        try:
            return ports, _bind(ports, host, port, inherited)
        except zmq.ZMQError as error:
            for socket in ports:
                socket.close(linger=0)
            if port:
                text = f"cannot listen on {host}, ports {port} to {port + 3}: {error.strerror}"
                raise LlamboError(Code.BAD_SETTING, text) from error
    raise LlamboError(Code.BAD_SETTING, f"no four free ports in a row were found on {host}")


def _bind(ports: Ports, host: str, port: int, inherited: Inherited | None) -> int:
    if inherited is not None:
        for socket, descriptor in zip(ports, inherited.descriptors, strict=True):
            # Then `bind` accepts connections there. Closing the socket closes our copy of the descriptor.
            socket.setsockopt(zmq.USE_FD, descriptor)
    if not port:
        port = ports.clients.bind_to_random_port(sockets.endpoint(host, 0).rpartition(":")[0])
    else:
        ports.clients.bind(sockets.endpoint(host, port))
    ports.workers.bind(sockets.endpoint(host, port + sockets.WORKER_OFFSET))
    ports.tokens_in.bind(sockets.endpoint(host, port + sockets.TOKENS_IN_OFFSET))
    ports.tokens_out.bind(sockets.endpoint(host, port + sockets.TOKENS_OUT_OFFSET))
    return port


def watch_disconnections(socket: Socket, context: zmq.Context[Any]) -> Socket:
    """A socket that is readable when connections have ended. libzmq's I/O thread writes to it, and must not wait."""
    endpoint = f"inproc://disconnected-{os.urandom(8).hex()}"
    socket.monitor(endpoint, zmq.EVENT_DISCONNECTED)
    watch: Socket = context.socket(zmq.PAIR)
    watch.linger = watch.rcvhwm = 0  # without a limit
    watch.connect(endpoint)
    return watch


class Headroom:
    """The descriptors that sockets may use up."""

    def __init__(self) -> None:
        #: The limit of descriptors, while most of them are in use; else 0.
        self.crowded = 0
        self._look_at = self._warn_at = self._warned_percent = 0

    def look(self, now_ms: int) -> None:
        if now_ms >= self._look_at:
            self._look_at = now_ms + LOOK_MS
            self._count_descriptors(now_ms)

    def _count_descriptors(self, now_ms: int) -> None:
        """libzmq is silent about connections that it cannot accept, and tries again and again."""
        used, limit = descriptors()
        percent = 100 if used >= limit else CROWDED_PERCENT if 100 * used >= CROWDED_PERCENT * limit else 0
        self.crowded = limit if percent else 0
        if percent and (percent > self._warned_percent or now_ms >= self._warn_at):
            self._warn_at = now_ms + WARN_AGAIN_MS
            which = f"all {limit}" if percent == 100 else f"{used} of {limit}"
            log.warning("%s descriptors are in use: no new peer is admitted; raise the limit (ulimit -Hn)", which)
        self._warned_percent = percent


#: The first byte of what arrives at an XPUB socket.
SUBSCRIBE, UNSUBSCRIBE = 1, 0


class SubscriptionGrants:
    """Decides on each upstream frame of the XPUB socket, in the order they are read.

    libzmq gives a grant to the pipe of the last event it handed out. A frame sent upstream that is no subscription at
    all makes it lose step, and a grant given then would go to the pipe of another peer. So after any such frame every
    grant is refused until the socket has been drained: then it is in step again. Refused clients subscribe again when
    their token plane turns out to be silent.
    """

    def __init__(self, topics: Mapping[bytes, ClientEntry]) -> None:
        self.refused = 0
        self.junk = 0
        self._topics = topics
        self._out_of_step = False

    def admit(self, frame: bytes, user: str = "") -> bytes | None:
        """The topic to grant to the sender of this frame, whose key is `user`, or None."""
        if not frame or frame[0] not in (SUBSCRIBE, UNSUBSCRIBE):
            self.junk += 1
            self._out_of_step = True
            return None
        if frame[0] == UNSUBSCRIBE:
            return None
        topic = frame[1:]
        client = self._topics.get(topic)
        if self._out_of_step or len(topic) != limits.TOPIC_BYTES or client is None or client.link.user != user:
            self.refused += 1
            return None
        return topic

    def drained(self) -> None:
        """The socket had nothing more to read."""
        self._out_of_step = False
