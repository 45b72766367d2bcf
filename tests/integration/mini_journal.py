"""A journal for tests: listens where systemd's does, and writes each entry as a line of JSON on stdout.

    python mini_journal.py       says {"listening": true} first

Both of its doors: the socket for entries with fields, which services and the manager use, and the one that a service's
stdout and stderr are connected to. What comes over that is lines, with a header by the manager.
"""

from __future__ import annotations

import json
import selectors
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

FOLDER = Path("/run/systemd/journal")
#: Lines by the manager before the first of the service: identifier, unit, priority, and switches.
HEADER_LINES = 7


def parse(entry: bytes) -> dict[str, str]:
    fields: dict[str, str] = {}
    while entry:
        line, _, rest = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + length], rest[9 + length :]
        fields[name.decode()], entry = value.decode(), rest
    return fields


def say(entry: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(entry) + "\n")
    sys.stdout.flush()


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as the first process it inherits the others' children
    FOLDER.mkdir(parents=True, exist_ok=True)
    selector = selectors.DefaultSelector()
    entries = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    entries.bind(str(FOLDER / "socket"))
    streams = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    streams.bind(str(FOLDER / "stdout"))
    streams.listen(64)
    for name in ("socket", "stdout"):
        (FOLDER / name).chmod(0o666)
    selector.register(entries, selectors.EVENT_READ)
    selector.register(streams, selectors.EVENT_READ)
    heads: dict[socket.socket, tuple[list[str], bytes]] = {}
    say({"listening": True})
    while True:
        for key, _ in selector.select():
            there = key.fileobj
            assert isinstance(there, socket.socket)
            if there is entries:
                say(parse(entries.recv(256 * 1024)))
            elif there is streams:
                connection = streams.accept()[0]
                selector.register(connection, selectors.EVENT_READ)
                heads[connection] = ([], b"")
            else:
                data = there.recv(64 * 1024)
                head, rest = heads[there]
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if len(head) < HEADER_LINES:
                        head.append(line.decode())
                    else:
                        say(
                            {
                                "MESSAGE": line.decode("utf-8", "replace"),
                                "SYSLOG_IDENTIFIER": head[0],
                                "STREAM": head[1],
                            }
                        )
                heads[there] = (head, rest)
                if not data:
                    selector.unregister(there)
                    there.close()


if __name__ == "__main__":
    main()
