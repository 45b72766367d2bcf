"""Processes that a test starts: their output as it arrives, what they use, and whether they have ended.

Every wait is for an event and has a deadline. A missed deadline fails with the output of the process.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self

#: No wait takes longer, however busy the machine is.
TIMEOUT_S = 60.0
#: How long a process may take to end after SIGTERM.
STOP_S = 5.0


class Process:
    """`python WORDS...`. The lines of its stdout and stderr are collected as they arrive."""

    def __init__(
        self,
        *words: str,
        name: str = "",
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: str | None = None,
    ) -> None:
        self.name = name or " ".join(words)
        #: Lines of stdout, of stderr, and of both in the order in which they were read.
        self.out: list[str] = []
        self.err: list[str] = []
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=env, cwd=cwd,
        )  # fmt: skip
        self.pid = self.process.pid
        self._readers = [
            threading.Thread(target=self._read, args=(pipe, lines), daemon=True)
            for pipe, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()
        if self.process.stdin is not None and stdin is not None:
            self.process.stdin.write(stdin)
            self.process.stdin.close()

    def _read(self, pipe: IO[str], lines: list[str]) -> None:
        for line in pipe:
            with self._changed:
                lines.append(line.rstrip("\n"))
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    # --- waiting -------------------------------------------------------------------------------------

    def follow(self, start: int = 0, timeout_s: float = TIMEOUT_S, what: str = "another line") -> Iterator[str]:
        """The lines of stdout and stderr from this one on, as they arrive. It fails at the deadline or the end."""
        deadline = time.monotonic() + timeout_s
        while True:
            with self._changed:
                while len(self.lines) <= start:
                    over = not self.running and not any(reader.is_alive() for reader in self._readers)
                    assert not over or len(self.lines) > start, self.story(f"it ended without writing {what}")
                    left_s = deadline - time.monotonic()
                    assert left_s > 0, self.story(f"it did not write {what} in {timeout_s} s")
                    self._changed.wait(min(1.0, left_s))
                text = self.lines[start]
            start += 1
            yield text

    def line(self, pattern: str, timeout_s: float = TIMEOUT_S, *, nth: int = 1) -> re.Match[str]:
        """The first line (or the nth), on stdout or stderr, that matches."""
        found = (re.search(pattern, text) for text in self.follow(0, timeout_s, repr(pattern)))
        return next(islice(filter(None, found), nth - 1, None))

    def first_line(self, timeout_s: float = TIMEOUT_S) -> str:
        """The first line on stdout: programs of a mesh write it when they are ready."""
        with self._changed:
            self._changed.wait_for(lambda: self.out or not self._readers[0].is_alive(), timeout_s)
        # The end of a process that wrote nothing is seen before the last lines of its log are.
        if not self.out and not self.running:
            self._join(timeout_s)
        assert self.out, self.story(f"it was not ready within {timeout_s} s")
        return self.out[0]

    def end(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit status, once all of its output has been read."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.story(f"it still runs after {timeout_s} s")) from None
        self._join(timeout_s)
        return code

    def _join(self, timeout_s: float) -> None:
        for reader in self._readers:
            reader.join(timeout_s)
            assert not reader.is_alive(), self.story("another process still holds its output open")

    # --- looking -------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def objects(self) -> list[dict[str, Any]]:
        """Lines of JSON on stdout."""
        return [json.loads(line) for line in self.out]

    def children(self) -> list[int]:
        return children(self.pid) if self.running else []

    def rss_bytes(self) -> int:
        return rss_bytes(self.pid)

    def log(self) -> str:
        """Its stderr so far."""
        return "\n".join(self.err)

    def story(self, what: str) -> str:
        return "\n".join([f"{self.name}: {what}; it wrote:", *(f"    {line}" for line in self.lines[-200:])])

    # --- ending --------------------------------------------------------------------------------------

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        """Send SIGTERM, and kill it if it does not end."""
        if self.running:
            self.send(signal.SIGCONT)
            self.send(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        self.kill()

    def kill(self) -> None:
        if self.running:
            self.process.kill()
        self.process.wait(TIMEOUT_S)
        self._join(TIMEOUT_S)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def children(pid: int) -> list[int]:
    """The processes that this one has started, in any of its threads."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


def family(pid: int) -> list[int]:
    """The descendants of this process."""
    found = children(pid)
    return found + [one for child in found for one in family(child)]


def has_ended(pid: int, timeout_s: float = TIMEOUT_S) -> bool:
    """True if a process ends in time. It need not be a child of this process; a zombie has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except (ProcessLookupError, FileNotFoundError):
        return True  # or the number is a thread's by now
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)


def wait_until_gone(pid: int, timeout_s: float = TIMEOUT_S) -> None:
    assert has_ended(pid, timeout_s), f"process {pid} still runs: {Path(f'/proc/{pid}/status').read_text()}"


def marked(name: str, value: str) -> list[int]:
    """Processes with this variable in their environment. A zombie has no environment."""
    wanted = f"{name}={value}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended meanwhile, or belongs to another user
    return found


def line_of(process: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> str:
    """The next line of its stdout, read byte by byte, so that the rest is left to another reader."""
    assert process.stdout is not None
    descriptor, line, deadline = process.stdout.fileno(), b"", time.monotonic() + timeout_s
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no line within {timeout_s} s: {line!r}"
        byte = os.read(descriptor, 1)
        assert byte, f"it has ended after {line!r}"
        line += byte
    return line.decode()


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def thread_cpu_s(task: Path) -> float:
    """CPU time of one thread: from nanoseconds if the kernel counts them, or else from clock ticks."""
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except OSError:
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """CPU time of all its threads."""
    return sum(thread_cpu_s(task) for task in Path(f"/proc/{pid}/task").iterdir())
