"""Log lines for systemd's journal, in its own protocol, and for people.

Lines are sent to the socket of the journal and not written to stderr, because then they have fields:
`journalctl LLAMBO_REQUEST=3f2a…` shows the lines of one request from all workers of a host. `<4>` before a line on
stderr would give it a priority and nothing else. If the socket does not take a line (the journal restarts, its queue
is full), the line goes to stderr in that form, which the journal reads as well.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Mapping
from typing import TextIO

from llambo.mesh.wire.errors import printable

SOCKET = "/run/systemd/journal/socket"
#: A longer line is cut: a datagram cannot be much longer, and people read these lines.
LINE_CHARS = 16_384
#: What a line can refer to: the attribute of its record, and the field in the journal.
FIELDS = {"worker": "LLAMBO_WORKER", "request": "LLAMBO_REQUEST"}
_LENGTH = struct.Struct("<Q")


def priority(level: int) -> int:
    """The number in syslog."""
    for least, number in ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6)):
        if level >= least:
            return number
    return 7


def encode(fields: Mapping[str, str]) -> bytes:
    """One entry. A value with a line break is preceded by its length, or it would end there."""
    parts = []
    for name, text in fields.items():
        value = text.encode("utf-8", "replace")
        if b"\n" in value:
            parts.append(name.encode() + b"\n" + _LENGTH.pack(len(value)) + value + b"\n")
        else:
            parts.append(name.encode() + b"=" + value + b"\n")
    return b"".join(parts)


def is_journal(environ: Mapping[str, str], descriptor: int) -> bool:
    """Whether this descriptor leads to the journal. The variable alone does not tell: stderr may be redirected."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


class JournalHandler(logging.Handler):
    """`about`: the ids that every line of this process gets, by the names of FIELDS."""

    def __init__(self, program: str, stream: TextIO, about: dict[str, str], path: str = SOCKET) -> None:
        super().__init__()
        self._program = program
        self._stream = stream
        self._about = about
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text, number = printable(self.format(record))[:LINE_CHARS], priority(record.levelno)
            fields = {"MESSAGE": text, "PRIORITY": str(number), "SYSLOG_IDENTIFIER": self._program}
            fields |= {FIELDS[name]: value for name, value in about(record, self._about).items()}
            try:
                self._socket.sendto(encode(fields | {"LLAMBO_LOGGER": record.name}), self._path)
            except OSError:
                self._stream.write("".join(f"<{number}>{line}\n" for line in with_ids(text, fields).splitlines()))
                self._stream.flush()
        except Exception:  # noqa: BLE001  # logging prints any error to stderr, and the work goes on
            self.handleError(record)

    def show(self, text: str) -> None:
        """A text for people, such as the first line of a service, which is not a log line elsewhere."""
        self.handle(logging.makeLogRecord({"name": __name__, "msg": text, "levelno": logging.INFO}))

    def close(self) -> None:
        self._socket.close()
        super().close()


class HumanFormatter(logging.Formatter):
    """One line, and the ids that it refers to without naming them."""

    def __init__(self, line: str = "%(asctime)s %(levelname)s %(name)s: %(message)s") -> None:
        super().__init__(line)

    def format(self, record: logging.LogRecord) -> str:
        return printable(with_ids(super().format(record), about(record, {})))


def about(record: logging.LogRecord, always: Mapping[str, str]) -> dict[str, str]:
    """The ids that a line refers to, by the names of FIELDS; empty ones are left out."""
    ids = {name: getattr(record, name, "") or always.get(name, "") for name in FIELDS}
    return {name: str(value) for name, value in ids.items() if value}


def with_ids(text: str, ids: Mapping[str, str]) -> str:
    """`ids`: by the names of FIELDS, or by its values."""
    missing = []
    for name, field in FIELDS.items():
        value = ids.get(name) or ids.get(field) or ""
        # Most texts name a request by the beginning of its id.
        if value and value not in text and (name != "request" or value[:8] not in text):
            missing.append(f"{name} {value}")
    return f"{text} ({', '.join(missing)})" if missing else text
