"""This host and its processes: memory and cores that may be used, parents and children, metrics of this process.

Linux only. Functions that read files take the root of the file system as an argument, for tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import time
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

from llambo.mesh.service import prometheus
from llambo.mesh.service.prometheus import Metric

#: Returned for memory where no limit is known.
UNLIMITED_BYTES = 2**62
#: From linux/prctl.h: the signal this process gets when its parent dies.
PR_SET_PDEATHSIG = 1
_ROOT = Path("/")


def memory_bytes(root: Path = _ROOT) -> int:
    """The memory of the machine, or less where a control group limits us."""
    limits = (_number(group / "memory.max") for group in _control_groups(root))
    return min(_meminfo_bytes(root, "MemTotal"), *(limit for limit in limits if limit is not None), UNLIMITED_BYTES)


def free_memory_bytes(root: Path = _ROOT) -> int:
    """Memory that can be allocated now without swapping. Limits of control groups, such as MemoryMax, count."""
    free = min(_meminfo_bytes(root, "MemAvailable"), UNLIMITED_BYTES)
    for group in _control_groups(root):
        used = _number(group / "memory.current")
        if used is not None:
            # Files that were read, such as models, count as used, and the kernel drops them when memory is needed.
            used -= min(used, _inactive_file(group))
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


def cpu_quota(root: Path = _ROOT) -> float:
    """How many cores control groups allow; 0 if they set no limit."""
    quotas = []
    for group in _control_groups(root):
        try:
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        except OSError:  # the top group has no such file
            continue
        quotas += [int(quota) / int(period)] if quota != "max" else []
    return min(quotas, default=0.0)


# --- parents and children --------------------------------------------------------------------------------


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


def exit_text(code: int) -> str:
    """How a process ended, for people. `code` is negative for a signal, as in `subprocess`."""
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


async def ready_line(descriptor: int) -> str:
    """The line that a child process writes to a pipe when it is ready; empty if it ends before. Closes the descriptor.

    So the parent (`llambo up`, a fleet) need not guess from a log, or poll, and it notices a child that fails at once,
    because the pipe closes with the child. When a child is restarted is decided by each of them
    (docs/decisions.md, "Three ways to supervise a process").
    """
    import asyncio  # noqa: PLC0415  # an engine child imports this module, and has no event loop

    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb")
    )
    try:
        return (await reader.readline()).decode().strip()
    finally:
        transport.close()


# --- metrics of this process, under the names that all programs use in Prometheus ------------------------

PROCESS_METRICS = (
    Metric("process_cpu_seconds_total", "counter", "CPU time of this process, in user and system mode"),
    Metric("process_resident_memory_bytes", "gauge", "Resident memory of this process"),
    Metric("process_start_time_seconds", "gauge", "When this process was started, in seconds since 1970"),
    Metric("process_open_fds", "gauge", "Open files, pipes and sockets of this process"),
)


def descriptors() -> tuple[int, int]:
    """How many are in use, about, and how many this process may have. A new one gets the lowest number that is free."""
    import resource  # noqa: PLC0415  # not on every system

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        number = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return (limit if error.errno == errno.EMFILE else 0), limit
    os.close(number)
    return number, limit


def process_metrics_page() -> str:
    families = [metric.scalars() for metric in PROCESS_METRICS]
    values = (time.process_time(), _resident_bytes(), _started_s(), sum(1 for _ in Path("/proc/self/fd").iterdir()))
    for family, value in zip(families, values, strict=True):
        family.one.value = value
    return prometheus.page(families)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def own_memory(whole: Collection[str] = (), root: Path = _ROOT) -> tuple[int, int]:
    """Bytes of this process that are resident and belong to no file, and those of the files that it has mapped. Of
    those in `whole` all pages count that are mapped, and not only the resident ones."""
    anonymous = mapped = 0
    path = ""
    with (root / "proc/self/smaps").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            words = line.split(maxsplit=5)
            if not words[0].endswith(":"):
                path = words[5].strip() if len(words) > 5 else ""
            elif words[0] == ("Size:" if path in whole else "Rss:"):
                if path.startswith("/"):
                    mapped += int(words[1]) * 1024
                else:
                    anonymous += int(words[1]) * 1024
    return anonymous, mapped


@cache
def _started_s() -> float:
    """From the kernel, in ticks after the boot. Read once, because the time of the boot moves when the clock is set."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
    lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    booted = next(int(line.split()[1]) for line in lines if line.startswith("btime "))
    return booted + ticks / os.sysconf("SC_CLK_TCK")


# --- files of the kernel -----------------------------------------------------------------------------------


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


def _inactive_file(group: Path) -> int:
    """Bytes of files in memory that nothing has used for a while."""
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError, IndexError, StopIteration):
        return 0


def _number(path: Path) -> int | None:
    """None for `max`, and for a file that is missing or cannot be read."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
