"""Nodes that end by themselves: who is begun again, when, and what is told of it.

Failures are counted for each class on each host, so that a bad host does not keep a class from the others, and a bad
class does not keep others from a host. After the first one there is no pause. After the second in a row there is, twice
as long each time, and when it is over one node is tried, and not as many as are missing: a class that cannot run costs
its hosts one attempt now and then, and its place in the count goes to nodes that run. One that has been ready for
`LASTED_MS` ends the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: The pause after the second failure in a row, and the longest.
PAUSE_MS = (2_000, 300_000)
#: A node that was ready for so long was no failure, however it ended.
LASTED_MS = 60_000
#: So many in a row are told as a crash loop.
LOOP = 3
#: Of what it said last, so much is kept.
WORDS_LINES, WORDS_CHARS = 5, 400


@dataclass(slots=True)
class _Row:
    failures: int = 0
    until_ms: int = 0
    last_ms: int = 0
    node: str = ""
    how: str = ""
    words: str = ""


@dataclass(frozen=True, slots=True)
class CrashLoop:
    node_class: str
    host: str
    failures: int
    #: The one that failed last, how, and its last lines.
    node: str
    how: str
    words: str
    again_in_ms: int


@dataclass(slots=True)
class Crashes:
    _rows: dict[tuple[str, str], _Row] = field(default_factory=dict)
    #: Ready nodes, and since when.
    _ready: dict[str, int] = field(default_factory=dict)

    def ready(self, node: str, now_ms: int) -> None:
        """Said as often as one likes."""
        self._ready.setdefault(node, now_ms)

    def ended_well(self, node: str) -> None:
        """It was told to."""
        self._ready.pop(node, None)

    def died(self, node: str, node_class: str, host: str, how: str, words: str, now_ms: int) -> None:
        """Or was not ready in time, which is the same."""
        since = self._ready.pop(node, None)
        row = self._rows.setdefault((node_class, host), _Row())
        if (since is not None and now_ms - since >= LASTED_MS) or now_ms - row.last_ms > LASTED_MS + 2 * PAUSE_MS[1]:
            row.failures = 0
        if now_ms >= row.until_ms:
            row.failures += 1
            row.until_ms = now_ms + pause_ms(row.failures)
        # Otherwise it was begun before the pause, with others: many that fail together are not many in a row.
        row.last_ms = now_ms
        row.node, row.how, row.words = node, how, last_words(words)

    def lasted(self, nodes: Mapping[str, tuple[str, str]], now_ms: int) -> list[tuple[str, str]]:
        """`nodes`: those that are ready, with class and host. Which of those are well again, of those that were not."""
        well = []
        for node, where in nodes.items():
            row, since = self._rows.get(where), self._ready.get(node)
            if row is not None and since is not None and now_ms - max(since, row.last_ms) >= LASTED_MS:
                del self._rows[where]
                if row.failures >= LOOP:
                    well.append(where)
        return well

    def barred(self, now_ms: int) -> dict[tuple[str, str], str]:
        """Where none may be begun now."""
        return {
            where: f"{_times(row)}, again in {_seconds(row.until_ms - now_ms)}"
            for where, row in self._rows.items()
            if row.until_ms > now_ms
        }

    def probed(self, now_ms: int) -> dict[tuple[str, str], str]:
        """Where only one may be on its way at a time."""
        return {where: _times(row) for where, row in self._rows.items() if row.failures > 1 and row.until_ms <= now_ms}

    def loops(self, now_ms: int) -> list[CrashLoop]:
        return [
            CrashLoop(*where, row.failures, row.node, row.how, row.words, max(0, row.until_ms - now_ms))
            for where, row in sorted(self._rows.items())
            if row.failures >= LOOP
        ]

    def forgive(self, node_class: str) -> None:
        """Its settings are others now, or somebody says that it is mended."""
        for where in [where for where in self._rows if where[0] == node_class]:
            del self._rows[where]

    def next_wakeup_ms(self, now_ms: int) -> int | None:
        return min((row.until_ms for row in self._rows.values() if row.until_ms > now_ms), default=None)


def pause_ms(failures: int) -> int:
    return 0 if failures < 2 else min(PAUSE_MS[0] << min(failures - 2, 16), PAUSE_MS[1])


def last_words(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()][-WORDS_LINES:]
    return "\n".join(lines)[-WORDS_CHARS:]


def _times(row: _Row) -> str:
    return (
        f"{row.node} {row.how}" if row.failures == 1 else f"{row.failures} have failed in a row, {row.node} {row.how}"
    )


def _seconds(ms: int) -> str:
    return f"{max(ms, 0) / 1000:.0f} s"
