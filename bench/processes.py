"""The processes that a benchmark starts and measures: `python -m bench.node KIND OPTIONS PARENT`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from llambo.testing.processes import Process, thread_cpu_s

ROOT = Path(__file__).resolve().parent.parent


class Node(Process):
    """One process of `bench.node`. It is ready when the constructor, or else `ready`, returns."""

    def __init__(self, kind: str, options: dict[str, Any] | None = None, *, wait: bool = True) -> None:
        words = ["-m", "bench.node", kind, json.dumps(options or {}), str(os.getpid())]
        super().__init__(*words, name=kind, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
        #: What it wrote when it was ready.
        self.facts: dict[str, Any] = {}
        if wait:
            try:
                self.ready()
            except BaseException:
                self.kill()
                raise

    def ready(self) -> None:
        self.facts = json.loads(self.first_line())

    @property
    def port(self) -> int:
        """The first of a broker, or that of a gateway."""
        return int(self.facts["ports"][0])

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def cpu_s(self) -> tuple[float, float]:
        """Seconds of processor time so far: of the main thread, and of the threads of libzmq."""
        main = other = 0.0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            used = thread_cpu_s(task)
            if task.name == str(self.pid):
                main = used
            else:
                other += used
        return main, other


class Meter:
    """Wall and processor time between two moments: of a node, and of this process."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._before = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        return (time.perf_counter(), *self._node.cpu_s(), time.process_time())

    def read(self) -> tuple[float, float, float, float]:
        """Seconds since the start: wall, the main thread of the node, its libzmq threads, this process."""
        wall, main, other, mine = (after - before for after, before in zip(self._now(), self._before, strict=True))
        return wall, main, other, mine
