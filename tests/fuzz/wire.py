"""ZMTP 3.1 by hand, and bytes that are none: what a peer sends that does not use libzmq.

A peer that uses libzmq cannot say half a greeting, announce a frame of 2^63 bytes or break off in the middle of one.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable

HOST = "127.0.0.1"
#: How long a hostile peer waits for anything.
LIMIT_S = 5.0
MORE, LONG, COMMAND = 1, 2, 4
GREETING_BYTES = 64
#: The broker's sockets by their distance from the base port, and the socket types that connect to them.
PARTNERS = (b"DEALER", b"DEALER", b"PUB", b"SUB")


def greeting(mechanism: bytes = b"NULL", *, version: bytes = b"\x03\x01", server: bool = False) -> bytes:
    return b"\xff" + bytes(8) + b"\x7f" + version + mechanism.ljust(20, b"\0") + bytes([server]) + bytes(31)


def frame(body: bytes, flags: int = 0) -> bytes:
    if len(body) < 256:
        return bytes([flags, len(body)]) + body
    return bytes([flags | LONG]) + struct.pack(">Q", len(body)) + body


def command(name: bytes, body: bytes = b"") -> bytes:
    return frame(bytes([len(name)]) + name + body, COMMAND)


def ready(kind: bytes, **more: bytes) -> bytes:
    """The metadata that ends a handshake without keys."""
    properties = {b"Socket-Type": kind, **{name.encode(): value for name, value in more.items()}}
    return command(b"READY", b"".join(_property(name, value) for name, value in properties.items()))


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


def connect(port: int) -> socket.socket:
    raw = socket.create_connection((HOST, port), timeout=LIMIT_S)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return raw


def shake_hands(raw: socket.socket, kind: bytes, **more: bytes) -> None:
    """As one without keys does; returns when both ends are ready."""
    raw.sendall(greeting())
    _exactly(raw, GREETING_BYTES)
    raw.sendall(ready(kind, **more))
    flags, size = _exactly(raw, 2)
    size = struct.unpack(">Q", bytes([size]) + _exactly(raw, 7))[0] if flags & LONG else size
    _exactly(raw, size)


def _exactly(raw: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = raw.recv(count - len(data))
        if not part:
            raise ConnectionError("hung up")
        data += part
    return data


def reset(raw: socket.socket) -> None:
    """Break the connection, so that the other end sees it at once."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


# --- what hostile sessions do ----------------------------------------------------------------------------------

#: One session: what it does on a fresh connection to the socket at this distance from the base port.
Deed = Callable[[random.Random, socket.socket, int], None]


def garbage(chance: random.Random, raw: socket.socket, offset: int) -> None:
    raw.sendall(chance.randbytes(chance.randrange(1, 4_096)))


def another_protocol(chance: random.Random, raw: socket.socket, offset: int) -> None:
    raw.sendall(
        chance.choice((b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-x\r\n", b"\x16\x03\x01\x02\x00\x01", b"\0" * 64))
    )


def half_a_greeting(chance: random.Random, raw: socket.socket, offset: int) -> None:
    raw.sendall(greeting()[: chance.randrange(1, GREETING_BYTES)])


def slowly(chance: random.Random, raw: socket.socket, offset: int) -> None:
    """A byte at a time, each in a segment of its own, and then no more."""
    for byte in (greeting() + ready(PARTNERS[offset]))[: chance.randrange(5, 100)]:
        raw.sendall(bytes([byte]))


def other_mechanism(chance: random.Random, raw: socket.socket, offset: int) -> None:
    mechanism = chance.choice((b"CURVE", b"PLAIN", b"GSSAPI", b"null", b"", b"\xff" * 20))
    raw.sendall(greeting(mechanism, server=chance.random() < 0.3))
    raw.sendall(command(b"HELLO", chance.randbytes(194)))


def other_version(chance: random.Random, raw: socket.socket, offset: int) -> None:
    raw.sendall(greeting(version=chance.choice((b"\x00\x00", b"\x01\x00", b"\x02\x00", b"\x03\x63", b"\xff\xff"))))
    raw.sendall(frame(chance.randbytes(5)))


def zmtp_1(chance: random.Random, raw: socket.socket, offset: int) -> None:
    """The oldest one: a length, flags, an identity, then messages."""
    raw.sendall(b"\x01\x00" + b"\x05\x00junk" * chance.randrange(100))


def other_metadata(chance: random.Random, raw: socket.socket, offset: int) -> None:
    raw.sendall(greeting())
    kind = chance.choice((b"ROUTER", b"REQ", b"PUSH", b"PAIR", b"XPUB", b"", b"x" * 300, b"\0", PARTNERS[offset]))
    identity = chance.choice((b"", b"\0\0\0\0\1", b"x" * 255, b"x" * 300, chance.randbytes(5)))
    raw.sendall(ready(kind, Identity=identity, **{chance.choice(("X", "Resource", "y" * 200)): chance.randbytes(99)}))


def broken_metadata(chance: random.Random, raw: socket.socket, offset: int) -> None:
    raw.sendall(greeting())
    body = bytearray(ready(PARTNERS[offset], Identity=b"x"))
    for _ in range(chance.randrange(1, 4)):
        body[chance.randrange(len(body))] = chance.randrange(256)
    raw.sendall(bytes(body))


def two_handshakes(chance: random.Random, raw: socket.socket, offset: int) -> None:
    shake_hands(raw, PARTNERS[offset])
    raw.sendall(ready(PARTNERS[offset]) + greeting() + ready(b"REQ"))


def huge_length(chance: random.Random, raw: socket.socket, offset: int) -> None:
    shake_hands(raw, PARTNERS[offset])
    size = chance.choice((2**63, 2**63 - 1, 2**64 - 1, 2**32, 2**31, 5 * 2**20))
    raw.sendall(bytes([LONG | chance.choice((0, MORE, COMMAND))]) + struct.pack(">Q", size) + bytes(100))


def wild_frames(chance: random.Random, raw: socket.socket, offset: int) -> None:
    """Frames with any flags, also those that mean nothing."""
    shake_hands(raw, PARTNERS[offset])
    for _ in range(chance.randrange(1, 200)):
        raw.sendall(
            frame(
                chance.randbytes(chance.choice((0, 1, 5, 12, 33, 34, 300))), chance.choice((0, 1, 4, 5, 8, 0x80, 0xFD))
            )
        )


def wild_commands(chance: random.Random, raw: socket.socket, offset: int) -> None:
    """Commands that are known and others, too short and too long, alone and as part of a message."""
    shake_hands(raw, PARTNERS[offset])
    names = (b"PING", b"PONG", b"SUBSCRIBE", b"CANCEL", b"READY", b"ERROR", b"JOIN", b"LEAVE", b"", b"x" * 200)
    for _ in range(chance.randrange(1, 100)):
        body = chance.randbytes(chance.choice((0, 1, 2, 3, 16, 17, 20, 300)))
        flags = chance.choice((COMMAND, COMMAND, COMMAND | MORE))
        name = chance.choice(names)
        size = len(name) if chance.random() < 0.9 else chance.randrange(256)
        raw.sendall(frame(bytes([size]) + name + body, flags))


def short_pings(chance: random.Random, raw: socket.socket, offset: int) -> None:
    """A PING has a time to live of two bytes, and libzmq reads them without looking whether they are there."""
    shake_hands(raw, PARTNERS[offset])
    for _ in range(chance.randrange(1, 300)):
        raw.sendall(command(b"PING", b"\0" * chance.randrange(3)))


def deadly_pings(chance: random.Random, raw: socket.socket, offset: int) -> None:
    """A PING that asks to be forgotten at once."""
    shake_hands(raw, PARTNERS[offset])
    raw.sendall(command(b"PING", b"\0\1") * 10 + command(b"PING", b"\xff\xff" + bytes(300)))


def subscriptions(chance: random.Random, raw: socket.socket, offset: int) -> None:
    """Some hundred, at a socket that has subscribers or not."""
    shake_hands(raw, PARTNERS[offset])
    topics = [chance.randbytes(chance.choice((0, 1, 15, 16, 17, 200))) for _ in range(300)]
    raw.sendall(b"".join(frame(b"\1" + topic) for topic in topics))
    raw.sendall(b"".join(command(b"SUBSCRIBE", topic) + command(b"CANCEL", topic) for topic in topics))


def endless_message(chance: random.Random, raw: socket.socket, offset: int) -> None:
    """A small one: parts without a last one."""
    shake_hands(raw, PARTNERS[offset])
    raw.sendall(frame(bytes(200), MORE) * chance.randrange(1, 300))


def half_a_message(chance: random.Random, raw: socket.socket, offset: int) -> None:
    shake_hands(raw, PARTNERS[offset])
    good = frame(b"llb\x01" + bytes(8), MORE) + frame(b"\x91" * 300)
    raw.sendall(good[: chance.randrange(1, len(good))])


def nothing(chance: random.Random, raw: socket.socket, offset: int) -> None:
    """Connected, and not a word."""


def a_hello_and_gone(chance: random.Random, raw: socket.socket, offset: int) -> None:
    """A client or worker that joins and vanishes: sessions until their leases are over."""
    shake_hands(raw, PARTNERS[offset])
    hello = b"\x91\x81\xa4type\xacclient_hello" if offset == 0 else b"\x91\x81\xa4type\xacworker_hello"
    raw.sendall(frame(b"llb\x01" + bytes(8), MORE) + frame(hello))


ACTIONS: tuple[Deed, ...] = (
    garbage, another_protocol, half_a_greeting, slowly, other_mechanism, other_version, zmtp_1, other_metadata,
    broken_metadata, two_handshakes, huge_length, wild_frames, wild_commands, short_pings, deadly_pings, subscriptions,
    endless_message, half_a_message, nothing, a_hello_and_gone,
)  # fmt: skip
