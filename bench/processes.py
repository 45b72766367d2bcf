"""The processes that a benchmark starts and measures: `python -m bench.node KIND OPTIONS PARENT`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llambo.testing.processes import Process, thread_cpu_s

ROOT = Path(__file__).resolve().parent.parent


class Node(Process):
    """One process of `bench.node`. It is ready when the constructor, or else `ready`, returns."""

    def __init__(self, kind: str, options: dict[str, Any] | None = None, *, wait: bool = True) -> None:
        words = ["-m", "bench.node", kind, json.dumps(options or {}), str(os.getpid())]
        super().__init__(*words, name=kind, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
        #: The line that it printed when it was ready.
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


@dataclass(frozen=True)
class Round:
    """The result of one round; times in microseconds per request or token."""

    rate: float
    main_us: float
    zmq_us: float
    generator_us: float


class Meter:
    """Wall and processor time between two moments: of a node, and of this process."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._before = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        return (time.perf_counter(), *self._node.cpu_s(), time.process_time())

    def round_of(self, count: int) -> Round:
        """So many since the start, and what each took: of the node's main thread, its libzmq threads, this process."""
        wall, main, other, mine = (after - before for after, before in zip(self._now(), self._before, strict=True))
        return Round(count / wall, main / count * 1e6, other / count * 1e6, mine / count * 1e6)
