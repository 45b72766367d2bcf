"""The largest (or smallest) of what was seen in the last while, at the cost of one step for each look."""

from __future__ import annotations

from collections import deque


class Extreme:
    """Of a span that ends now. Until looks cover the whole span there is none: what was not seen is not known."""

    def __init__(self, span_ms: int, gap_ms: int, *, largest: bool) -> None:
        """`gap_ms`: after a pause between two looks that is longer, everything before it counts for nothing."""
        self._span_ms = span_ms
        self._gap_ms = gap_ms
        self._sign = 1 if largest else -1
        self._seen: deque[tuple[int, float]] = deque()
        self._since_ms: int | None = None
        self._last_ms = 0

    def look(self, value: float, now_ms: int) -> None:
        if self._since_ms is None or now_ms - self._last_ms > self._gap_ms:
            self._seen.clear()
            self._since_ms = now_ms
        self._last_ms = now_ms
        # What is older and no larger will never be the answer again.
        while self._seen and self._sign * self._seen[-1][1] <= self._sign * value:
            self._seen.pop()
        self._seen.append((now_ms, value))
        while self._seen[0][0] < now_ms - self._span_ms:
            self._seen.popleft()

    def value(self) -> float | None:
        if self._since_ms is None or self._last_ms - self._since_ms < self._span_ms:
            return None
        return self._seen[0][1]
