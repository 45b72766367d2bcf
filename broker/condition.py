"""How a broker is, in the words of its service manager."""

from __future__ import annotations

from llambo.broker.state import State
from llambo.mesh.herald_core import Condition


def condition(state: State, *, leaving: bool) -> Condition:
    """It listens when it can be asked this, so it is ready; that its loop turns is shown by its asking."""
    workers, running, waiting = len(state.registry.workers), len(state.running), state.room.count
    if leaving:
        status = f"stopping, {running} running go on without it" if running else "stopping"
    else:
        status = f"{workers or 'no'} worker{'s' * (workers != 1)}, {running} running, {waiting} waiting"
    return Condition(status, ready=True, leaving=leaving)
