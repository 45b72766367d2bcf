"""Taking no new work, by an operator's order or because this process is to end."""

from __future__ import annotations

from llambo.mesh import messages as m
from llambo.worker.engine_life import NEVER_MS


class Leaving:
    """The truth about both: brokers come and go, and each may pass on another order."""

    def __init__(self, drain_ms: int) -> None:
        self.drained = False
        #: What runs is to be taken elsewhere: that is for the brokers to do.
        self.moving = False
        #: When to leave at the latest.
        self.at_ms = NEVER_MS
        self._drain_ms = drain_ms

    @property
    def leaves(self) -> bool:
        return self.at_ms != NEVER_MS

    @property
    def draining(self) -> bool:
        return self.drained or self.leaves

    def ordered(self, order: m.Drain) -> str:
        """What is new about that, if anything."""
        before = self.drained, self.moving
        self.drained, self.moving = not order.undo, order.move and not order.undo
        if (self.drained, self.moving) == before:
            return ""
        if not self.drained:
            return "the drain is over"
        return "drained: what runs here goes on elsewhere" if self.moving else "drained: no new work"

    def stop(self, urgent: bool, now_ms: int) -> str:
        """The first time: when all is done, or the time for that is over. The second time: now."""
        again = self.leaves
        self.at_ms = now_ms if urgent or again else now_ms + self._drain_ms
        return "" if again else "stopping: no new work"
