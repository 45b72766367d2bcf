"""What a service tells its manager, and when: facts about the service come in, lines for sd_notify come out.

    READY=1              once, the first time that it is true
    STATUS=              whenever another one is true, at most once in a second
    WATCHDOG=1           four times in each period that the manager watches, as long as the service is well
    EXTEND_TIMEOUT_USEC  while it starts or leaves: that takes as long as it takes, as long as its loop turns
    STOPPING=1           once, when it has begun to leave

Whoever owns this calls it from the loop that does the work and from nowhere else. A loop that hangs says nothing, and
that is what the manager waits for.
"""

from __future__ import annotations

from dataclasses import dataclass

from llambo.mesh.wire.timers import NEVER_MS

#: At least so long between two looks at the service, unless there is something that cannot wait.
LOOK_MS = 1_000
#: So often the watchdog is fed in each of its periods: one turn of the loop may be late, and the next one, too.
FED_IN_A_PERIOD = 4
#: How much time is asked for while it starts or leaves, and how often: a loop that hangs is noticed after the first.
EXTEND_MS = 30_000
EXTEND_EVERY_MS = 5_000
#: Of a status; more is not read in `systemctl status` anyway.
STATUS_CHARS = 500


@dataclass(frozen=True, slots=True)
class Condition:
    """How a service is. `ready`: it can do its work. `well`: what it should be doing goes on."""

    status: str
    ready: bool = False
    well: bool = True
    leaving: bool = False


class NotifyCore:
    def __init__(self, watchdog_ms: int = 0) -> None:
        """`watchdog_ms`: after so long without a word the manager kills the service; 0: never."""
        self._watchdog_ms = watchdog_ms
        self._ready_said = False
        self._stopping_said = False
        self._status = ""
        self._look_at = 0
        self._feed_at = 0
        self._extend_at = 0

    def next_wakeup_ms(self) -> int:
        """When `tell` is wanted at the latest."""
        return min(self._look_at, self._feed_at if self._watchdog_ms else NEVER_MS)

    def update_soon(self) -> None:
        """Something has changed that should be known at once."""
        self._look_at = 0

    def update(self, condition: Condition, now_ms: int) -> list[str]:
        words: list[str] = []
        if condition.ready and not self._ready_said and not condition.leaving:
            self._ready_said = True
            words.append("READY=1")
        if condition.leaving and not self._stopping_said:
            self._stopping_said, self._extend_at = True, 0
            words.append("STOPPING=1")
        if (status := _line(condition.status)) != self._status:
            self._status = status
            words.append(f"STATUS={status}")
        if self._watchdog_ms and condition.well and now_ms >= self._feed_at:
            self._feed_at = now_ms + max(1, self._watchdog_ms // FED_IN_A_PERIOD)
            words.append("WATCHDOG=1")
        elif not condition.well:
            self._feed_at = now_ms + LOOK_MS  # it may be well again by then
        if (condition.leaving or not self._ready_said) and condition.well and now_ms >= self._extend_at:
            self._extend_at = now_ms + EXTEND_EVERY_MS
            words.append(f"EXTEND_TIMEOUT_USEC={EXTEND_MS * 1_000}")
        self._look_at = now_ms + LOOK_MS
        return words


def _line(status: str) -> str:
    """A status is one line, and a second one would be taken for another word of ours."""
    return " ".join(status.split())[:STATUS_CHARS]
