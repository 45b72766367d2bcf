"""Processes in tests: whose children they are, and whether they are gone. Waits are for events, with a deadline."""

from __future__ import annotations

import os
import select
import subprocess
import time
from pathlib import Path


def children(pid: int) -> list[int]:
    """The processes that this one has started, in whichever of its threads."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


def wait_until_gone(pid: int, timeout_s: float) -> None:
    """Any process, not only our own child. A zombie counts as gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        readable, _, _ = select.select([fd], [], [], timeout_s)
    finally:
        os.close(fd)
    assert readable, f"process {pid} still lives after {timeout_s} s: {Path(f'/proc/{pid}/status').read_text()}"


def marked(name: str, value: str) -> list[int]:
    """Processes that run with this in their environment. A zombie has none."""
    wanted = f"{name}={value}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # gone meanwhile, or somebody else's
    return found


def line_of(process: subprocess.Popen[str], timeout_s: float) -> str:
    """The next line on its stdout. It is read byte by byte: what comes after it is left for whoever reads next."""
    assert process.stdout is not None
    descriptor, line, deadline = process.stdout.fileno(), b"", time.monotonic() + timeout_s
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no line within {timeout_s} s: {line!r}"
        byte = os.read(descriptor, 1)
        assert byte, f"it has ended after {line!r}"
        line += byte
    return line.decode()
