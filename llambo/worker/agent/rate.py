"""Tokens per second over the last moments: of the worker, and of each of its streams."""

from __future__ import annotations

from collections import deque

WINDOW_MS = 1_000
#: Longer for the pace of streams, so that waiting for a first token counts beside the tokens that follow.
PACE_WINDOW_MS = 3_000


#: With less time of streams than this in the window nothing can be said about their pace.
MEASURABLE_MS = 200


class Rate:
    """The owner adds to `count`, and says how time passes; rates are taken between the samples that beats leave."""

    def __init__(self) -> None:
        self.count = 0
        #: Of the worker, when it was last measured.
        self.last = 0.0
        #: Time of all streams together.
        self._stream_ms = 0
        self._now_ms = 0
        self._samples: deque[tuple[int, int, int]] = deque()

    def begin_again(self) -> None:
        """Another engine: what the last one did says nothing about it."""
        self._samples.clear()

    def passed(self, streams: int, now_ms: int) -> None:
        """So many streams were with the engine until now."""
        if streams:
            self._stream_ms += streams * (now_ms - self._now_ms)
        self._now_ms = now_ms

    def sample(self, now_ms: int) -> tuple[float, float]:
        """Of the worker, and of a stream of it; 0: nothing is known."""
        samples, now = self._samples, (now_ms, self.count, self._stream_ms)
        samples.append(now)
        while len(samples) > 2 and now_ms - samples[1][0] >= PACE_WINDOW_MS:
            samples.popleft()
        recent = next((each for each in reversed(samples) if now_ms - each[0] >= WINDOW_MS), samples[0])
        whole = (self.count - recent[1]) * 1000 / (now_ms - recent[0]) if now_ms > recent[0] else 0.0
        streamed_ms = self._stream_ms - samples[0][2]
        pace = (self.count - samples[0][1]) * 1000 / streamed_ms if streamed_ms >= MEASURABLE_MS else 0.0
        self.last = round(whole, 1)
        return self.last, round(pace, 2)
