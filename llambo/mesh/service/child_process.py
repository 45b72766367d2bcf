"""What starters of child processes share: `llambo up` for its services, a fleet for its nodes.

Who restarts a child, and when, differs between them and is decided there (docs/decisions.md, "Three ways to supervise a
process"). A child reports that it is ready with one line on a pipe, so its parent need not guess from a log, or poll.
The pipe closes with the child, so a child that fails before that is noticed at once.
"""

from __future__ import annotations

import asyncio
import os
import signal


def exit_text(code: int) -> str:
    """How a process ended, for people. `code` is negative for a signal, as in `subprocess`."""
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


async def ready_line(descriptor: int) -> str:
    """The line that a child writes to its pipe when it is ready; empty if it ends before. Closes the descriptor."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb")
    )
    try:
        return (await reader.readline()).decode().strip()
    finally:
        transport.close()
