"""This host and this process: memory and cores that may be used, ending with the parent, signals that ask to stop.

Linux only. Functions that read files take the root of the file system as an argument, for tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

#: Returned for memory where nothing says how much there is.
UNLIMITED_BYTES = 2**62
#: From linux/prctl.h: the signal this process gets when its parent dies.
PR_SET_PDEATHSIG = 1
_ROOT = Path("/")


def memory_bytes(root: Path = _ROOT) -> int:
    """The memory of the machine, or less where a control group limits us."""
    limits = (_number(group / "memory.max") for group in _control_groups(root))
    return min(_meminfo_bytes(root, "MemTotal"), *(limit for limit in limits if limit is not None), UNLIMITED_BYTES)


def free_memory_bytes(root: Path = _ROOT) -> int:
    """What can be allocated now without swapping. Limits of control groups count, as MemoryMax of a unit is one."""
    free = min(_meminfo_bytes(root, "MemAvailable"), UNLIMITED_BYTES)
    for group in _control_groups(root):
        used = _number(group / "memory.current")
        for name in ("memory.max", "memory.high"):
            limit = _number(group / name)
            if limit is not None and used is not None:
                free = min(free, max(0, limit - used))
    return free


def cpus() -> int:
    """Hardware threads that this process may use."""
    return len(os.sched_getaffinity(0))


def physical_cores() -> int:
    """Cores that this process may use. Two threads on one core slow each other down when both decode."""
    cores = set()
    for number in os.sched_getaffinity(0):
        try:
            path = f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
            cores.add(Path(path).read_text(encoding="ascii").strip())
        except OSError:
            cores.add(str(number))
    return len(cores)


def end_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when `parent` ends, however it ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)


@contextlib.contextmanager
def stop_signals_wake(fd: int) -> Iterator[None]:
    """SIGTERM and SIGINT become bytes on `fd`, so that they are seen between two events and never within one."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    fd_before = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, handler in before.items():
            signal.signal(number, handler)


def _meminfo_bytes(root: Path, name: str) -> int:
    with (root / "proc/meminfo").open(encoding="ascii") as lines:
        for line in lines:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return UNLIMITED_BYTES


def _control_groups(root: Path) -> Iterator[Path]:
    """The folder of our control group (version 2), then those of the groups that contain it."""
    top = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = next(line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        own = ""
    group = top / own
    yield group
    yield from (parent for parent in group.parents if parent.is_relative_to(top))


def _number(path: Path) -> int | None:
    """None for `max`, and for a file that is missing or cannot be read."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
