"""The processes a benchmark starts, measures and ends. Only its own are ever touched, each by its pid."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
#: How long a process may take to say that it is ready, and to be gone when it was killed.
READY_S = 30.0
GONE_S = 10.0


class Node:
    """One process of `bench.node`. Ready, with what it told, when the constructor returns or `ready` is called."""

    def __init__(self, kind: str, options: dict[str, Any] | None = None, *, wait: bool = True) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "bench.node", kind, json.dumps(options or {}), str(os.getpid())]
        self.process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE)
        self.pid = self.process.pid
        self.told: dict[str, Any] = {}
        if wait:
            self.ready()

    def ready(self) -> None:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], READY_S)
        line = self.process.stdout.readline() if readable else b""
        if not line:
            self.end()
            raise RuntimeError(f"{self.process.args!r} was not ready within {READY_S} s")
        self.told = json.loads(line)

    def end(self) -> None:
        """Kill it if it lives, and reap it."""
        self.process.kill()
        self.process.wait(GONE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    # --- what it costs ---------------------------------------------------------------------------------

    def cpu_s(self) -> tuple[float, float]:
        """Seconds of processor time so far: of the main thread, and of libzmq's threads."""
        main = other = 0.0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            used = thread_cpu_s(task)
            if task.name == str(self.pid):
                main = used
            else:
                other += used
        return main, other

    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * PAGE_BYTES


def thread_cpu_s(task: Path) -> float:
    """In nanoseconds where the kernel keeps them, else in clock ticks of 10 ms."""
    with suppress(OSError):
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def process_cpu_s(pid: int) -> float:
    """Of all its threads."""
    return sum(thread_cpu_s(task) for task in Path(f"/proc/{pid}/task").iterdir())


def children(pid: int) -> list[int]:
    """The processes that this one has started, in whichever of its threads."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


def gone(pid: int, timeout_s: float = GONE_S) -> bool:
    """Whether a process, not only a child of ours, has ended; waits for it. A zombie has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], timeout_s)[0])
    finally:
        os.close(fd)


class Meter:
    """Wall and processor time between two moments: of nodes, and of this process."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._before = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        return (time.perf_counter(), *self._node.cpu_s(), time.process_time())

    def read(self) -> tuple[float, float, float, float]:
        """Seconds since the start: wall, the node's main thread, its libzmq threads, this process."""
        wall, main, other, mine = (after - before for after, before in zip(self._now(), self._before, strict=True))
        return wall, main, other, mine
