"""What is reported to a service manager, and when: without a manager and without a clock."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llambo.broker.config import BrokerConfig
from llambo.broker.records.state import State
from llambo.broker.server import condition as of_broker
from llambo.cli.services.service import LASTED_MS, Life, Restarts, next_life, pause_ms
from llambo.mesh.service import journal
from llambo.mesh.service.notify_core import EXTEND_EVERY_MS, LOOK_MS, Condition, NotifyCore
from llambo.mesh.service.service_manager import Manager, Notifier, manager, message
from llambo.mesh.wire.timers import NEVER_MS

READY = Condition("idle", ready=True)
STARTING = Condition("loading")


# --- the notifier ------------------------------------------------------------------------------------------


def test_ready_is_sent_once_and_when_it_is_true() -> None:
    notifier = NotifyCore()
    assert notifier.update(STARTING, 0) == ["STATUS=loading", "EXTEND_TIMEOUT_USEC=30000000"]
    assert notifier.update(READY, 1_000) == ["READY=1", "STATUS=idle"]
    assert notifier.update(STARTING, 2_000) == ["STATUS=loading"], "a model that is loaded again is not a start"
    assert notifier.update(READY, 3_000) == ["STATUS=idle"]


def test_more_time_is_asked_for_again_and_again_until_it_is_ready() -> None:
    notifier = NotifyCore()
    updates = [notifier.update(STARTING, now_ms) for now_ms in range(0, 3 * EXTEND_EVERY_MS, 1_000)]
    assert [number for number, words in enumerate(updates) if any("EXTEND" in word for word in words)] == [0, 5, 10]
    notifier.update(READY, 20_000)
    assert notifier.update(READY, 40_000) == []


def test_no_more_time_for_what_is_stuck() -> None:
    assert NotifyCore().update(Condition("stuck", well=False), 0) == ["STATUS=stuck"]


def test_the_watchdog_is_fed_four_times_in_its_period_and_only_while_all_is_well() -> None:
    notifier = NotifyCore(watchdog_ms=2_000)
    fed = []
    now = 0
    while now <= 2_000:
        if "WATCHDOG=1" in notifier.update(READY, now):
            fed.append(now)
        assert notifier.next_wakeup_ms() > now
        now = notifier.next_wakeup_ms()
    assert fed == [0, 500, 1_000, 1_500, 2_000]
    sick = Condition("the engine stalled", ready=True, well=False)
    assert not [now for now in range(2_500, 9_000, 100) if "WATCHDOG=1" in notifier.update(sick, now)]
    assert "WATCHDOG=1" in notifier.update(READY, 10_000), "it is fed again after recovery"


def test_what_is_stuck_is_looked_at_again_and_without_hurry() -> None:
    notifier = NotifyCore(watchdog_ms=2_000)
    notifier.update(Condition("stuck", ready=True, well=False), 5_000)
    assert notifier.next_wakeup_ms() == 5_000 + LOOK_MS


def test_stopping_is_sent_once_and_asks_for_time() -> None:
    notifier = NotifyCore(watchdog_ms=4_000)
    notifier.update(READY, 0)
    leaving = Condition("stopping", ready=True, leaving=True)
    assert notifier.update(leaving, 100) == ["STOPPING=1", "STATUS=stopping", "EXTEND_TIMEOUT_USEC=30000000"]
    assert notifier.update(leaving, 1_000) == ["WATCHDOG=1"]


def test_who_leaves_before_he_was_ready_never_says_ready() -> None:
    assert "READY=1" not in NotifyCore().update(Condition("stopping", ready=True, leaving=True), 0)


def test_a_hurry_is_looked_at_at_once() -> None:
    notifier = NotifyCore()
    notifier.update(READY, 1_000)
    assert notifier.next_wakeup_ms() == 1_000 + LOOK_MS
    notifier.update_soon()
    assert notifier.next_wakeup_ms() <= 1_000


def test_a_status_is_one_line() -> None:
    assert NotifyCore().update(Condition("a\nREADY=1\tb", ready=True, leaving=True), 0)[1] == "STATUS=a READY=1 b"


# --- the manager's variables -----------------------------------------------------------------------------


def test_the_variables_are_used_up() -> None:
    environ = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7", "HOME": "/"}
    assert manager(environ, 7) == Manager("/run/n", 3_000)
    assert environ == {"HOME": "/"}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, None),
        ({"NOTIFY_SOCKET": "@abstract"}, Manager("\0abstract")),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "8"}, Manager("/n")),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "3000000"}, Manager("/n", 3_000)),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "soon"}, Manager("/n")),
        ({"NOTIFY_SOCKET": "vsock:2:1"}, None),
        ({"NOTIFY_SOCKET": "/"}, None),
    ],
)
def test_where_notifications_are_sent(environ: dict[str, str], wanted: Manager | None) -> None:
    assert manager(environ, 7) == wanted


def test_without_a_manager_nothing_is_due() -> None:
    notifier = Notifier()
    notifier.update(READY, 0)
    assert notifier.next_wakeup_ms() == NEVER_MS


def test_a_message_is_lines() -> None:
    assert message(["READY=1", "STATUS=ä"]) == "READY=1\nSTATUS=ä".encode()


def test_a_broker_says_what_it_has_to_do() -> None:
    state = State(BrokerConfig(), lambda count: b"\0" * count)
    assert of_broker(state, leaving=False) == Condition("no workers, 0 running, 0 waiting", ready=True)
    assert of_broker(state, leaving=True) == Condition("stopping", ready=True, leaving=True)


# --- restarts --------------------------------------------------------------------------------------------


def test_pauses_double_to_a_minute() -> None:
    assert [pause_ms(failures) for failures in (0, 1, 2, 3, 4, 7, 8, 9, 1_000)] == [
        0, 0, 1_000, 2_000, 4_000, 32_000, 60_000, 60_000, 60_000
    ]  # fmt: skip


def test_a_long_life_is_no_failure_and_a_pause_is_no_life() -> None:
    assert next_life(None, 5) == Life(0, 5)
    assert next_life(Life(0, 0), 1_000) == Life(1, 1_000)
    assert next_life(Life(8, 0), LASTED_MS + 59_000) == Life(9, LASTED_MS + 59_000), "it has waited a minute of it"
    assert next_life(Life(8, 0), LASTED_MS + 60_000) == Life(0, LASTED_MS + 60_000)
    assert next_life(Life(3, 9_000), 1_000) == Life(0, 1_000), "the machine was started meanwhile"


def test_failures_are_counted_in_the_runtime_directory(tmp_path: Path) -> None:
    environ = {"RUNTIME_DIRECTORY": f"{tmp_path}:/elsewhere"}
    assert [Restarts(environ).begin(now) for now in (0, 100, 200, 1_500)] == [0, 0, 1_000, 2_000]
    Restarts(environ).ended_well()
    assert Restarts(environ).begin(2_000) == 0
    (tmp_path / "failures").write_text("rubbish")
    assert Restarts(environ).begin(2_000) == 0


def test_without_a_runtime_directory_nothing_is_counted() -> None:
    restarts = Restarts({})
    assert [restarts.begin(now) for now in (0, 1, 2, 3)] == [0, 0, 0, 0]
    restarts.ended_well()


# --- the journal -----------------------------------------------------------------------------------------


def test_an_entry_is_fields_and_a_line_break_does_not_end_one() -> None:
    assert journal.encode({"MESSAGE": "a=b", "PRIORITY": "4"}) == b"MESSAGE=a=b\nPRIORITY=4\n"
    forged = journal.encode({"MESSAGE": "x\nPRIORITY=0"})
    assert forged == b"MESSAGE\n" + (12).to_bytes(8, "little") + b"x\nPRIORITY=0\n"


@pytest.mark.parametrize(("level", "number"), [(10, 7), (20, 6), (30, 4), (40, 3), (50, 2)])
def test_levels_have_priorities(level: int, number: int) -> None:
    assert journal.priority(level) == number


def test_stderr_is_the_journal_only_if_it_is_that_very_file(tmp_path: Path) -> None:
    with (tmp_path / "there").open("w") as file:
        there = (tmp_path / "there").stat()
        assert journal.is_journal({"JOURNAL_STREAM": f"{there.st_dev}:{there.st_ino}"}, file.fileno())
        assert not journal.is_journal({"JOURNAL_STREAM": f"{there.st_dev}:{there.st_ino + 1}"}, file.fileno())
        assert not journal.is_journal({}, file.fileno())
    assert not journal.is_journal({"JOURNAL_STREAM": "1:2"}, 10_000)


def record(text: str, **about: str) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": text, "levelname": "INFO", "levelno": 20, "name": "llambo.broker", **about})


def test_a_person_sees_the_ids_that_a_line_does_not_name() -> None:
    id = "3f2a" * 8
    format = journal.HumanFormatter().format
    assert format(record("request failed: busy", worker="w1", request=id)).endswith(
        f"llambo.broker: request failed: busy (worker w1, request {id})"
    )
    assert format(record("w1: gone, request 3f2a3f2a", worker="w1", request=id)).endswith("w1: gone, request 3f2a3f2a")
    assert format(record("plain", worker="")).endswith("llambo.broker: plain")
