"""Processes in tests: whose children they are, and whether they are gone. Waits are for events, with a deadline."""

from __future__ import annotations

import os
import select
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
