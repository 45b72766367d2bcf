"""Nodes that end by themselves: where the next one is started, when, and what is reported about it.

Failures are counted for each class on each host, so that a bad host does not keep a class from other hosts, and a bad
class does not keep other classes from a host. After the first failure there is no pause. After the second in a row
there is one, and it doubles with each failure. When it is over, one node is tried, and not as many as are missing: a
class that cannot run costs its hosts one attempt now and then, and its share of resources goes to nodes that run. A
node that has been ready for `LASTED_MS` ends the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llambo.mesh.wire.timers import backoff_ms

#: The pause after the second failure in a row, and the longest.
PAUSE_MS = (2_000, 300_000)
#: A node that was ready for so long did not fail, however it ended.
LASTED_MS = 60_000
#: So many in a row are reported as a crash loop.
LOOP = 3
#: How much of the end of a log is shown.
TAIL_LINES, TAIL_CHARS = 5, 400


@dataclass(slots=True)
class _Row:
    """Failures in a row of one class on one host."""

    failures: int = 0
    paused_until_ms: int = 0
    #: The last failure: when, of which node, how it ended, and the end of its log.
    last_ms: int = 0
    node: str = ""
    how: str = ""
    log_tail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashLoop:
    node_class: str
    host: str
    failures: int
    #: The node that failed last, how, and the end of its log.
    node: str
    how: str
    log_tail: str
    again_in_ms: int


@dataclass(slots=True)
class Crashes:
    #: By class and host.
    _rows: dict[tuple[str, str], _Row] = field(default_factory=dict)
    #: Ready nodes, and since when.
    _ready: dict[str, int] = field(default_factory=dict)

    def note_ready(self, node: str, now_ms: int) -> None:
        """May be called again while it stays ready."""
        self._ready.setdefault(node, now_ms)

    def note_stopped(self, node: str) -> None:
        """It is stopped on purpose. How long it was ready does not count for the next node of its name."""
        self._ready.pop(node, None)

    def note_failure(self, node: str, node_class: str, host: str, how: str, log: str, now_ms: int) -> None:
        """It ended by itself, or was not ready in time."""
        since = self._ready.pop(node, None)
        row = self._rows.setdefault((node_class, host), _Row())
        if (since is not None and now_ms - since >= LASTED_MS) or now_ms - row.last_ms > LASTED_MS + 2 * PAUSE_MS[1]:
            row.failures = 0
        # During the pause it is one of those that were started before it: many that fail together are one failure.
        if now_ms >= row.paused_until_ms:
            row.failures += 1
            row.paused_until_ms = now_ms + pause_ms(row.failures)
        row.last_ms = now_ms
        row.node, row.how, row.log_tail = node, how, log_tail(log)

    def recovered(self, ready: Mapping[str, tuple[str, str]], now_ms: int) -> list[tuple[str, str]]:
        """`ready`: nodes with class and host. Which crash loops have ended because one of these nodes lasted."""
        found = []
        for node, where in ready.items():
            row, since = self._rows.get(where), self._ready.get(node)
            if row is not None and since is not None and now_ms - max(since, row.last_ms) >= LASTED_MS:
                del self._rows[where]
                if row.failures >= LOOP:
                    found.append(where)
        return found

    def blocked(self, now_ms: int) -> dict[tuple[str, str], str]:
        """Where no node may be started now, and why."""
        return {
            where: f"{_failures(row)}, again in {_seconds(row.paused_until_ms - now_ms)}"
            for where, row in self._rows.items()
            if row.paused_until_ms > now_ms
        }

    def probing(self, now_ms: int) -> dict[tuple[str, str], str]:
        """Where only one node may be starting at a time, and why."""
        return {
            where: _failures(row)
            for where, row in self._rows.items()
            if row.failures > 1 and row.paused_until_ms <= now_ms
        }

    def loops(self, now_ms: int) -> list[CrashLoop]:
        return [
            CrashLoop(
                node_class=node_class, host=host, failures=row.failures, node=row.node, how=row.how,
                log_tail=row.log_tail, again_in_ms=max(0, row.paused_until_ms - now_ms),
            )
            for (node_class, host), row in sorted(self._rows.items())
            if row.failures >= LOOP
        ]  # fmt: skip

    def reset(self, node_class: str) -> None:
        """Its settings have changed."""
        for where in [where for where in self._rows if where[0] == node_class]:
            del self._rows[where]

    def next_wakeup_ms(self, now_ms: int) -> int | None:
        pauses = (row.paused_until_ms for row in self._rows.values() if row.paused_until_ms > now_ms)
        return min(pauses, default=None)


def pause_ms(failures: int) -> int:
    return backoff_ms(failures, *PAUSE_MS)


def log_tail(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()][-TAIL_LINES:]
    return "\n".join(lines)[-TAIL_CHARS:]


def _failures(row: _Row) -> str:
    return (
        f"{row.node} {row.how}" if row.failures == 1 else f"{row.failures} have failed in a row, {row.node} {row.how}"
    )


def _seconds(ms: int) -> str:
    return f"{max(ms, 0) / 1000:.0f} s"
