"""Whether a worker takes new work, and when its process ends: an operator's drain, and `drain_ms`."""

from __future__ import annotations

from llambo.mesh.wire import messages as m
from llambo.mesh.wire.timers import NEVER_MS


class DrainState:
    """Whether this worker takes new work: an operator can drain it, and a process that is stopping takes none.

    The worker has the truth about both. Brokers come and go, and each may pass on another order.
    """

    def __init__(self, drain_ms: int) -> None:
        self.drained = False
        #: Brokers have to move what runs here to other workers.
        self.moving = False
        #: Some broker has passed on an order to this process.
        self.ordered = False
        #: When the process ends at the latest.
        self.stop_at_ms = NEVER_MS
        #: How often the process was asked to stop unless it is busy, and was busy.
        self.refusals = 0
        self._drain_ms = drain_ms

    @property
    def stopping(self) -> bool:
        return self.stop_at_ms != NEVER_MS

    @property
    def draining(self) -> bool:
        return self.drained or self.stopping

    def on_order(self, order: m.Drain) -> str:
        """What has changed, for the log; empty if nothing has."""
        before, self.ordered = (self.drained, self.moving), True
        self.drained, self.moving = not order.undo, order.move and not order.undo
        if (self.drained, self.moving) == before:
            return ""
        if not self.drained:
            return "the drain is over"
        return "drained: what runs here goes on elsewhere" if self.moving else "drained: no new work"

    def stop(self, urgent: bool, now_ms: int) -> str:
        """The first time: stop when all runs have ended, or after `drain_ms`. The second time, or `urgent`: now."""
        again = self.stopping
        self.stop_at_ms = now_ms if urgent or again else now_ms + self._drain_ms
        return "" if again else "stopping: no new work"
