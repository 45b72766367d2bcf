"""The only place where sockets are created, with every option that matters.

With its defaults libzmq queues messages for peers that are gone, waits without limit at exit, accepts messages of any
size and does not notice a cut cable.
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
#: Those that a broker queues for a client, and from it. The client's own socket queues CONTROL_HWM before these.
CLIENT_HWM = 1_000
TOKEN_HWM = 100_000
#: The kernel notices a cut cable: it probes a silent host after so many seconds, and closes a connection on which
#: nothing is acknowledged for so long. That checks the host and not the process, which has a lease. ZeroMQ's own
#: heartbeats are off: libzmq aborts when one is due on a connection that died while its reader was behind
#: (docs/decisions.md).
KEEPALIVE_S = 1
UNACKNOWLEDGED_MS = 2_000
RECONNECT_MS = (20, 1_000)
#: How long a closing socket may take to send its last messages.
LINGER_MS = 200
#: How long a handshake may take. When a thousand peers with keys connect at once, each waits for those before it. With
#: 5 s on a busy machine all of them gave up and began again, without an end.
HANDSHAKE_MS = 15_000
#: Connections that wait to be accepted (the kernel may allow fewer: net.core.somaxconn).
BACKLOG = 4_096

DEFAULT_PORT = 7330
#: The ports of the other three sockets of a broker, relative to its client port.
WORKER_OFFSET, TOKENS_IN_OFFSET, TOKENS_OUT_OFFSET = 1, 2, 3


#: The address of the ZAP handler, which decides whether a key is accepted.
ZAP_ENDPOINT = "inproc://zeromq.zap.01"


@dataclass(frozen=True, slots=True)
class CurveServer:
    """The end of a broker: its key, and the ZAP domain, by which the ZAP handler decides about peers."""

    pair: Pair
    domain: str


#: The keys of a socket; None: it has none.
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
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_S)
    socket.setsockopt(zmq.TCP_MAXRT, UNACKNOWLEDGED_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.BACKLOG, BACKLOG)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS[0])
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1])
    if isinstance(curve, CurveServer):
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, curve.pair.secret.encode())
        socket.setsockopt(zmq.ZAP_DOMAIN, curve.domain.encode())
        # Without it all peers are accepted while there is no ZAP handler.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    elif curve is not None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, curve.broker.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, curve.pair.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, curve.pair.secret.encode())
    if kind == zmq.ROUTER:
        # Without it a message for a peer that is gone disappears silently.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    if kind == zmq.XPUB:
        # A repeated subscription is reported as well: it means that a peer has reconnected.
        socket.setsockopt(zmq.XPUB_VERBOSER, 1)
        # An XPUB processes subscriptions at once, so a limit would have no effect. Without one its queue is never full,
        # and with a full queue a PING of a peer makes libzmq abort this process (docs/decisions.md).
        socket.rcvhwm = 0
    return socket


def control(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, hwm: int = CONTROL_HWM, *, curve: Curve = None
) -> zmq.Socket[bytes]:
    return make(context, kind, hwm=hwm, max_frame=limits.CONTROL_FRAME_BYTES, curve=curve)


def token(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, hwm: int = TOKEN_HWM, *, curve: Curve = None
) -> zmq.Socket[bytes]:
    """An XPUB receives subscriptions and handshakes only, so its frames may not be longer than those."""
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
    if parts.scheme in ("http", "https") and host:
        text = f"{address!r} is an address of HTTP, so of a gateway; a broker has another one"
        raise LlamboError(Code.BAD_SETTING, text, hint=f"--broker {endpoint(host, DEFAULT_PORT)}, or LLAMBO_BROKER")
    if parts.scheme != "tcp" or not host or parts.path or parts.query:
        raise LlamboError(Code.BAD_SETTING, f"{address!r} is not an address like tcp://host:{DEFAULT_PORT}")
    return host, DEFAULT_PORT if port is None else port


def split_all(addresses: str) -> list[tuple[str, int]]:
    """One address, or several with commas between them."""
    return [split(address.strip()) for address in addresses.split(",") if address.strip()] or [split(addresses)]


def literal(host: str) -> bool:
    """True if it is an IP address, which need not be looked up."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def resolve(host: str) -> list[str]:
    """The IP addresses of a name. Each counts as a broker.

    They are of one family: a host with IPv4 and IPv6 is one broker and not two. The sockets of one link must not reach
    two hosts, so a link resolves its name once, for all its sockets.
    """
    if literal(host):
        return [host]
    try:
        found = pysocket.getaddrinfo(host, None, type=pysocket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        hint = "check the name of the broker's host, and that this machine can look it up"
        raise LlamboError(Code.NO_BROKER, f"{host!r} cannot be resolved: {why}", hint=hint) from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found if entry[0] == found[0][0]))


def resolve_all(addresses: str) -> list[tuple[str, int]]:
    """The brokers of a list of addresses. A name that cannot be resolved is left out, unless there is no other."""
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
    """True if only this machine can connect to this address. A name other than localhost may be any host."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


#: How the same host reaches a socket that is bound to all addresses.
_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}  # noqa: S104 - only compared with


def local_endpoint(bound_to: str, port: int) -> str:
    """The address at which this host reaches a socket that is bound to `bound_to`."""
    return endpoint(_LOOPBACK_OF.get(bound_to, bound_to), port)


def endpoint(ip: str, port: int) -> str:
    return f"tcp://[{ip}]:{port}" if ":" in ip else f"tcp://{ip}:{port}"
