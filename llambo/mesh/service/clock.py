"""The two clocks, in milliseconds. Shells read them; a core is given the time with each event."""

from __future__ import annotations

import time


def now_ms() -> int:
    """The monotonic clock: for timers and timeouts, within one process."""
    return time.monotonic_ns() // 1_000_000


def wall_ms() -> int:
    """The time since 1970: for what other processes or people read. It jumps when the clock is set."""
    return time.time_ns() // 1_000_000
