"""The history of a run: one JSON object a line; each process that observes has a file of its own.

`t` is milliseconds of the machine's monotonic clock, which all its processes share; `e` says what happened. Lines by
clients (`load.py`):

    submit      id, seed, prompt, max, how (stream, generate, detached)
    chunk       id, i (index of the first), ids, d (pairs: dispatch in hex, how many of the tokens it made),
                r (which reading, if an answer is read more than once)
    end         id, reason, count, moves, worker, crc (of the text), r
    error       id, code, text, r
    why         id, story (what the broker knows of a request that failed)
    left        the client stopped, with nothing left to do

and by the harness (`whom` names whom it is about):

    fault, healed, skipped, gone    n, the number of the fault; `gone`: a hung engine was ended
    begun, ended                    a process, pid, code
    killed                          a client; its requests have no reader any more
    event                           a line of a broker's feed
    workers, status                 who is ready, as a broker sees it; its counters
    size                            of a process: pid, rss, fds
    back, emptied                   ms after a broker came back, and after a worker was drained or stopped
    refused, broken, orphan         what should not have happened to the harness itself, or to its processes
    last, knows                     what the brokers say at the end: of everything, of a request that went wrong
    calm, over                      the faults are over; so is the run
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class Journal:
    """Appends to one file. Each line is handed to the kernel at once, so that a killed process loses none."""

    def __init__(self, path: Path, who: str) -> None:
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._who = who

    def write(self, event: str, **facts: Any) -> None:
        line = {"t": now_ms(), "who": self._who, "e": event, **facts}
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def close(self) -> None:
        self._file.close()


def read(folder: Path) -> Iterator[Line]:
    """All files of a run, each in its own order. The last line of a killed process may be cut: it is left out."""
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            yield from parse(file)


def parse(lines: Iterable[str]) -> Iterator[Line]:
    for line in lines:
        if line.endswith("\n"):
            yield json.loads(line)
