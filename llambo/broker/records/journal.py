"""What happened: the events feed that `llambo events` shows, and the lines for the log of the shell."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

#: Lines for the log that wait until the shell writes them.
LOG_LINES = 256


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One line of the events feed."""

    number: int
    at_ms: int
    kind: str
    text: str
    worker: str
    warning: bool


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line for the log of the shell, with what it is about. Never with a prompt or an answer."""

    text: str
    warning: bool = False
    worker: str = ""
    request: bytes = b""


class Journal:
    def __init__(self, entries: int) -> None:
        self.entries: deque[JournalEntry] = deque(maxlen=entries)
        #: Taken away by the shell; the oldest ones that it does not take are dropped.
        self.log: deque[LogLine] = deque(maxlen=LOG_LINES)
        self._count = 0

    def add(
        self, now_ms: int, kind: str, text: str, *, warning: bool = False, worker: str = "", request: bytes = b""
    ) -> None:
        self._count += 1
        self.entries.append(JournalEntry(self._count, now_ms, kind, text, worker, warning))
        self.log.append(LogLine(f"{kind}: {text}", warning, worker, request))
