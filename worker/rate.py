"""Tokens per second over the last moments."""

from __future__ import annotations

from collections import deque

WINDOW_MS = 1_000


class Rate:
    """The owner adds to `count`; the rate is taken between the samples that the beats leave behind."""

    def __init__(self) -> None:
        self.count = 0
        self._samples: deque[tuple[int, int]] = deque()

    def per_second(self, now_ms: int) -> float:
        samples = self._samples
        samples.append((now_ms, self.count))
        while len(samples) > 2 and now_ms - samples[1][0] >= WINDOW_MS:
            samples.popleft()
        at, count = samples[0]
        return round((self.count - count) * 1000 / (now_ms - at), 1) if now_ms > at else 0.0
