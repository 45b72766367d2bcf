"""The only place where sockets are made. Every option that matters is set here, on purpose.

Left to its defaults libzmq queues for peers that are gone, lingers for ever at exit, accepts messages of
any size and does not notice a cut cable.
"""

from __future__ import annotations

import ipaddress
import socket as pysocket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import zmq

from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.identity import Pair, PeerKey

#: Messages a socket queues for one peer, by plane.
CONTROL_HWM = 10_000
TOKEN_HWM = 100_000
#: The kernel notices a cut cable: it asks a silent host after so many seconds, and gives up one that acknowledges
#: nothing for so long. That proves a host, not a process; leases are there for processes. ZeroMQ's own heartbeats stay
#: off: libzmq aborts when one is due on a connection that died while its reader was behind (docs/decisions.md).
ASK_AFTER_S = 1
UNACKNOWLEDGED_MS = 2_000
RECONNECT_MS = (20, 1_000)
#: How long a closing socket may take to hand over its last messages.
LINGER_MS = 200
#: How long a peer may take to shake hands.
HANDSHAKE_MS = 5_000

DEFAULT_PORT = 7330
#: Where the other three sockets of a broker are, counted from its client port.
WORKER_OFFSET, TOKENS_IN_OFFSET, TOKENS_OUT_OFFSET = 1, 2, 3


#: Who is asked whether a key is valid (ZAP).
ASK_AT = "inproc://zeromq.zap.01"


@dataclass(frozen=True, slots=True)
class CurveServer:
    """A broker's end: it shows its key, and whoever asks is let in by the keyring's word on this domain."""

    pair: Pair
    domain: str


#: How a socket proves itself; None: not at all.
Curve = CurveServer | PeerKey | None


def make(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, *, hwm: int, max_frame: int, curve: Curve = None
) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = LINGER_MS
    socket.sndhwm = socket.rcvhwm = hwm
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, ASK_AFTER_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, ASK_AFTER_S)
    socket.setsockopt(zmq.TCP_MAXRT, UNACKNOWLEDGED_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS[0])
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1])
    if isinstance(curve, CurveServer):
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, curve.pair.secret.encode())
        socket.setsockopt(zmq.ZAP_DOMAIN, curve.domain.encode())
        # Without it everybody is let in as long as nobody answers.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    elif curve is not None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, curve.broker.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, curve.pair.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, curve.pair.secret.encode())
    if kind == zmq.ROUTER:
        # Without it a message for a peer that is gone disappears silently.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    if kind == zmq.XPUB:
        # A repeated subscription is news too: it means that a peer came back.
        socket.setsockopt(zmq.XPUB_VERBOSER, 1)
        # It takes in at once whatever is subscribed, so a limit limits nothing; and without one its queue is never
        # full, which is what a peer needs to abort us by a PING (docs/decisions.md).
        socket.rcvhwm = 0
    return socket


def control(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, hwm: int = CONTROL_HWM, *, curve: Curve = None
) -> zmq.Socket[bytes]:
    return make(context, kind, hwm=hwm, max_frame=limits.CONTROL_FRAME_BYTES, curve=curve)


def token(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, hwm: int = TOKEN_HWM, *, curve: Curve = None
) -> zmq.Socket[bytes]:
    """What comes towards an XPUB is subscriptions, so only those have room there, and what shakes hands."""
    subscriptions = limits.SUBSCRIPTION_FRAME_BYTES
    max_frame = subscriptions if kind == zmq.XPUB else limits.TOKEN_FRAME_BYTES + limits.TOPIC_BYTES
    return make(context, kind, hwm=hwm, max_frame=max_frame, curve=curve)


def receive(socket: zmq.Socket[Any]) -> list[zmq.Frame]:
    """All frames of the next message; raises zmq.Again if there is none.

    A frame knows whether it is the last one. pyzmq's own function asks the socket after each, which takes longer than
    to receive it.
    """
    take = socket.recv
    frames = [take(zmq.DONTWAIT, copy=False)]
    while frames[-1].more:
        frames.append(take(zmq.DONTWAIT, copy=False))
    return frames


def split(address: str) -> tuple[str, int]:
    """Host and port of `tcp://host[:port]` or `host[:port]`."""
    text = address if "://" in address else f"tcp://{address}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise LlamboError(Code.BAD_SETTING, f"{address!r} is not an address: {error}") from error
    if parts.scheme != "tcp" or not host or parts.path or parts.query:
        raise LlamboError(Code.BAD_SETTING, f"{address!r} is not an address like tcp://host:{DEFAULT_PORT}")
    return host, DEFAULT_PORT if port is None else port


def split_all(addresses: str) -> list[tuple[str, int]]:
    """One address, or several with commas between them."""
    return [split(address.strip()) for address in addresses.split(",") if address.strip()] or [split(addresses)]


def literal(host: str) -> bool:
    """Whether it is an IP address, for which nobody has to be asked."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def resolve(host: str) -> list[str]:
    """The IP addresses of a name, which are taken for a broker each.

    Of one family only: a name of a host with IPv4 and IPv6 is one broker and not two. Two sockets of one link must
    not reach two hosts, so a link resolves its name once, for all its sockets.
    """
    if literal(host):
        return [host]
    try:
        found = pysocket.getaddrinfo(host, None, type=pysocket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LlamboError(Code.NO_BROKER, f"{host!r} cannot be resolved: {error}") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found if entry[0] == found[0][0]))


def resolve_all(addresses: str) -> list[tuple[str, int]]:
    """Where the brokers of this list are. A name that cannot be resolved is left out, if that leaves any."""
    found: dict[tuple[str, int], None] = {}
    failed: LlamboError | None = None
    for host, port in split_all(addresses):
        try:
            found |= dict.fromkeys((ip, port) for ip in resolve(host))
        except LlamboError as error:
            failed = error
    if failed is not None and not found:
        raise failed
    return list(found)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there. A name other than localhost may be anything."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


#: A socket that is bound to all addresses of a host is reached at this one from the same host.
_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}  # noqa: S104 - only compared with


def local_endpoint(bound_to: str, port: int) -> str:
    """Where a process on this host reaches a socket that is bound to `bound_to`."""
    return endpoint(_LOOPBACK_OF.get(bound_to, bound_to), port)


def endpoint(ip: str, port: int) -> str:
    return f"tcp://[{ip}]:{port}" if ":" in ip else f"tcp://{ip}:{port}"
