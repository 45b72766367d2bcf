"""Which lines a service sends to its service manager, and when. The condition of the service in, lines out.

    READY=1              once, when the service is ready for the first time
    STATUS=              when the status has changed, at most once a second
    WATCHDOG=1           four times in each watchdog period, as long as the service is well
    EXTEND_TIMEOUT_USEC  during start and shutdown, which may take any time as long as the loop turns
    STOPPING=1           once, when the shutdown begins

The owner calls it from the loop that does the work and from nowhere else. A loop that hangs sends nothing, which is
what the watchdog of the manager detects.
"""

from __future__ import annotations

from dataclasses import dataclass

from llambo.mesh.wire.timers import NEVER_MS

#: The pause between two looks at the service, unless `update_soon` was called.
LOOK_MS = 1_000
#: WATCHDOG=1 is sent so often in each period: one turn of the loop may be late, and the next one too.
WATCHDOG_SENDS = 4
#: How much time is asked for during start and shutdown, and how often: a loop that hangs is noticed after the former.
EXTEND_MS = 30_000
EXTEND_EVERY_MS = 5_000
#: Length of a status; `systemctl status` shows no more.
STATUS_CHARS = 500


@dataclass(frozen=True, slots=True)
class Condition:
    """The condition of a service. `ready`: it can do its work. `well`: its work makes progress."""

    status: str
    ready: bool = False
    well: bool = True
    leaving: bool = False


class NotifyCore:
    def __init__(self, watchdog_ms: int = 0) -> None:
        """`watchdog_ms`: the manager kills the service after this time without WATCHDOG=1; 0: there is no watchdog."""
        self._watchdog_ms = watchdog_ms
        self._ready_sent = False
        self._stopping_sent = False
        self._status = ""
        self._look_at = 0
        self._watchdog_at = 0
        self._extend_at = 0

    def next_wakeup_ms(self) -> int:
        """When `update` has to be called at the latest."""
        return min(self._look_at, self._watchdog_at if self._watchdog_ms else NEVER_MS)

    def update_soon(self) -> None:
        """The condition has changed in a way that the manager has to know at once."""
        self._look_at = 0

    def update(self, condition: Condition, now_ms: int) -> list[str]:
        lines: list[str] = []
        if condition.ready and not self._ready_sent and not condition.leaving:
            self._ready_sent = True
            lines.append("READY=1")
        if condition.leaving and not self._stopping_sent:
            self._stopping_sent, self._extend_at = True, 0
            lines.append("STOPPING=1")
        if (status := _line(condition.status)) != self._status:
            self._status = status
            lines.append(f"STATUS={status}")
        if self._watchdog_ms and condition.well and now_ms >= self._watchdog_at:
            self._watchdog_at = now_ms + max(1, self._watchdog_ms // WATCHDOG_SENDS)
            lines.append("WATCHDOG=1")
        elif not condition.well:
            self._watchdog_at = now_ms + LOOK_MS  # it may be well again by then
        if (condition.leaving or not self._ready_sent) and condition.well and now_ms >= self._extend_at:
            self._extend_at = now_ms + EXTEND_EVERY_MS
            lines.append(f"EXTEND_TIMEOUT_USEC={EXTEND_MS * 1_000}")
        self._look_at = now_ms + LOOK_MS
        return lines


def _line(status: str) -> str:
    """A status is one line: the manager would read a second one as another assignment."""
    return " ".join(status.split())[:STATUS_CHARS]
