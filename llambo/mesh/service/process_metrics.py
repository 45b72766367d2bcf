"""What a process knows of itself, under the names that everybody's processes use in Prometheus."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

from llambo.mesh.service.prometheus import Metric
from llambo.mesh.service.prometheus import page as page_of

CPU = Metric("process_cpu_seconds_total", "counter", "Time this process has computed, in its code and the system's")
MEMORY = Metric("process_resident_memory_bytes", "gauge", "Memory it holds")
STARTED = Metric("process_start_time_seconds", "gauge", "When it was started, in seconds since 1970")
FILES = Metric("process_open_fds", "gauge", "Files, pipes and sockets that it has open")
TABLE = (CPU, MEMORY, STARTED, FILES)


def page() -> str:
    families = [metric.scalars() for metric in TABLE]
    values = (time.process_time(), _resident_bytes(), _started_s(), sum(1 for _ in Path("/proc/self/fd").iterdir()))
    for family, value in zip(families, values, strict=True):
        family.one.value = value
    return page_of(families)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@cache
def _started_s() -> float:
    """As the kernel has it, in ticks after the boot; asked once, because the boot moves when the clock is set."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
    lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    booted = next(int(line.split()[1]) for line in lines if line.startswith("btime "))
    return booted + ticks / os.sysconf("SC_CLK_TCK")
