"""A connection that breaks while its reader is behind is the reader's business, and no reason to abort.

libzmq aborts the process when a heartbeat of its own is due on such a connection, so our sockets have none.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys

import pytest

#: Longer than any heartbeat of ZeroMQ that may be switched on.
QUIET_S = 1.5
#: Shorter than the time after which it would give up a reader that does not answer.
FULL_S = 0.3
DEADLINE_S = 20.0

READER = """
import sys, zmq
from llambo.mesh.link import sockets

with zmq.Context() as context, sockets.token(context, zmq.SUB, hwm=1) as reader:
    reader.subscribe(b"")
    print(reader.bind_to_random_port("tcp://127.0.0.1"), flush=True)
    sys.stdin.readline()
    count = 0
    while reader.poll(500):
        reader.recv()
        count += 1
    print(count, flush=True)
"""

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 3) + b"PUB"


def publish_until_it_is_full(port: int) -> None:
    """Shake hands as a publisher, send until the reader takes no more, and break the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as raw:
        raw.sendall(GREETING)
        raw.recv(64, socket.MSG_WAITALL)
        raw.sendall(b"\x04" + bytes([len(READY)]) + READY)
        raw.settimeout(FULL_S)
        with pytest.raises(TimeoutError):
            raw.sendall(b"\x00\x05hello" * 10_000_000)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_connection_that_breaks_while_its_reader_is_behind_ends_no_process() -> None:
    # Given a reader that does not read, and a connection as full as it can be
    command = [sys.executable, "-c", READER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        # When the connection is reset
        publish_until_it_is_full(int(reader.stdout.readline()))
        # Then the process lives on
        with pytest.raises(subprocess.TimeoutExpired):
            reader.wait(QUIET_S)
        # And reads what it had
        out, _ = reader.communicate("\n", DEADLINE_S)
        assert int(out) > 0 and reader.returncode == 0
