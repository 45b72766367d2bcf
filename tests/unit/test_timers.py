"""Alarms: each once, in order, and bounded."""

from __future__ import annotations

from llambo.mesh.wire.timers import NEVER_MS, Timers


def test_alarms_ring_once_and_in_order() -> None:
    timers: Timers[str] = Timers()
    timers.set("late", 30)
    timers.set("soon", 10)
    timers.set("as soon", 10)
    assert timers.next_wakeup_ms() == 10
    assert timers.due(9) == []
    assert timers.due(30) == ["soon", "as soon", "late"]
    assert timers.due(100) == []
    assert timers.next_wakeup_ms() == NEVER_MS


def test_setting_again_moves_the_alarm_and_clearing_removes_it() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", 10)
    timers.set("a", 50)
    timers.set("b", 20)
    timers.clear("b")
    assert timers.next_wakeup_ms() == 50
    assert timers.due(49) == []
    timers.set("a", 5)
    assert timers.due(49) == ["a"]
    assert timers.due(100) == []


def test_moved_alarms_do_not_pile_up() -> None:
    timers: Timers[str] = Timers()
    for at_ms in range(10_000):
        timers.set("a", at_ms)
    assert len(timers._heap) < 100
