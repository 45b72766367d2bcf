"""Alarms for cores that have many: one for each key. To set one is cheap, and the next one is known."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

#: No alarm is set.
NEVER_MS = 2**62

K = TypeVar("K", bound=Hashable)


class Timers(Generic[K]):
    """A heap with lazy deletion: an entry is valid only if the key was last set to its time."""

    def __init__(self) -> None:
        self._at: dict[K, int] = {}
        self._heap: list[tuple[int, int, K]] = []
        self._order = 0  # breaks ties, so that equal times fire in the order they were set

    def __len__(self) -> int:
        return len(self._at)

    def set(self, key: K, at_ms: int) -> None:
        if self._at.get(key) == at_ms:
            return
        self._at[key] = at_ms
        self._order += 1
        heappush(self._heap, (at_ms, self._order, key))
        if len(self._heap) > 64 + 4 * len(self._at):
            self._heap = [entry for entry in self._heap if self._at.get(entry[2]) == entry[0]]
            heapify(self._heap)

    def clear(self, key: K) -> None:
        self._at.pop(key, None)

    def due(self, now_ms: int) -> list[K]:
        """The keys whose time has come. Their alarms are cleared."""
        keys = []
        while self._heap and self._heap[0][0] <= now_ms:
            at_ms, _, key = heappop(self._heap)
            if self._at.get(key) == at_ms:
                del self._at[key]
                keys.append(key)
        return keys

    def next_wakeup_ms(self) -> int:
        while self._heap and self._at.get(self._heap[0][2]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else NEVER_MS


def backoff_ms(failures: int, first_ms: int, longest_ms: int) -> int:
    """The pause after so many failures in a row: 0 after the first, then `first_ms`, then twice as long each time."""
    return 0 if failures < 2 else min(first_ms << min(failures - 2, 16), longest_ms)
