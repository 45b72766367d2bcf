"""What this machine has for workers: its memory, and the cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

#: Kept for everything else on the machine, in percent.
RESERVE_PERCENT = 10


def memory_bytes(root: Path = Path("/")) -> int:
    """What the kernel has, or what our control group may have, less the reserve."""
    total = 0
    for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    for group in _groups(root):
        try:
            limit = (group / "memory.max").read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total * (100 - RESERVE_PERCENT) // 100


def cores() -> float:
    return float(len(os.sched_getaffinity(0)))


def _groups(root: Path) -> list[Path]:
    """Ours and those around it."""
    top = root / "sys/fs/cgroup"
    try:
        own = next(
            line.split("::", 1)[1].strip("/")
            for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
            if line.startswith("0::")
        )
    except (OSError, StopIteration):
        return [top]
    path = top / own
    return [path, *(parent for parent in path.parents if parent.is_relative_to(top))]
