"""Crash loops: backed off, tried again, reported, and harmless to other classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from llambo.fleet.decide.crashes_core import LASTED_MS, LOOP, PAUSE_MS, Crashes, log_tail, pause_ms
from llambo.fleet.decide.plan import PlanStep, StepKind
from llambo.fleet.model import Fleet
from llambo.fleet.node_manager import NodeManager
from llambo.fleet.orchestrator import Orchestrator
from llambo.mesh.client.client import Client

SECOND = 1_000
HERE, THERE = ("tiny", "box"), ("tiny", "shed")


def fail(crashes: Crashes, times: int, now_ms: int = 0, where: tuple[str, str] = HERE) -> int:
    """One attempt after the other, each as soon as allowed. Returns when the last one died."""
    for number in range(times):
        now_ms = max(
            [now_ms, *(at for at in [crashes.next_wakeup_ms(now_ms)] if at and where in crashes.blocked(now_ms))]
        )
        crashes.note_failure(f"tiny-{number:04}", *where, "ended with status 1", "no such model\n", now_ms)
    return now_ms


def test_the_first_failure_has_no_pause_and_then_they_double() -> None:
    crashes = Crashes()
    fail(crashes, 1)
    assert not crashes.blocked(0) and not crashes.probing(0) and not crashes.loops(0)
    assert fail(crashes, 1) == 0
    assert crashes.blocked(0) == {HERE: "2 have failed in a row, tiny-0000 ended with status 1, again in 2 s"}
    assert [pause_ms(count) for count in (1, 2, 3, 4, 9, 10, 99)] == [
        0,
        2_000,
        4_000,
        8_000,
        256_000,
        *PAUSE_MS[1:] * 2,
    ]


def test_after_the_pause_one_is_tried() -> None:
    crashes = Crashes()
    now_ms = fail(crashes, 3)
    assert crashes.next_wakeup_ms(now_ms) == now_ms + 4_000
    assert not crashes.probing(now_ms)
    assert crashes.probing(now_ms + 4_000) == {HERE: "3 have failed in a row, tiny-0002 ended with status 1"}
    assert not crashes.blocked(now_ms + 4_000)


def test_many_that_fail_together_are_not_many_in_a_row() -> None:
    crashes = Crashes()
    for number in range(50):
        crashes.note_failure(f"tiny-{number:04}", *HERE, "ended with status 1", "", 10 + number)
    (text,) = crashes.blocked(60).values()
    assert text.startswith("2 have failed in a row, tiny-0049")


def test_a_loop_is_reported_with_the_end_of_its_log() -> None:
    crashes = Crashes()
    words = "\n".join(f"line {number}" for number in range(9)) + "\n\n"
    now_ms = fail(crashes, LOOP - 1)
    crashes.note_failure("tiny-0009", *HERE, "was killed by SIGSEGV", words, now_ms + 2_000)
    (loop,) = crashes.loops(now_ms + 3_000)
    assert (loop.node_class, loop.host, loop.failures, loop.node) == ("tiny", "box", 3, "tiny-0009")
    assert (loop.how, loop.again_in_ms) == ("was killed by SIGSEGV", 3_000)
    assert loop.log_tail == "line 4\nline 5\nline 6\nline 7\nline 8"
    assert len(log_tail("x" * 5_000)) == 400


def test_other_classes_and_other_hosts_are_not_concerned() -> None:
    crashes = Crashes()
    fail(crashes, 5)
    fail(crashes, 1, where=THERE)
    assert set(crashes.blocked(crashes.next_wakeup_ms(0) or 0)) <= {HERE}
    assert {(loop.node_class, loop.host) for loop in crashes.loops(0)} == {HERE}


def test_one_that_lasts_ends_the_row() -> None:
    crashes = Crashes()
    now_ms = fail(crashes, 4) + 60 * SECOND
    crashes.note_ready("tiny-0007", now_ms)
    crashes.note_ready("tiny-0007", now_ms + 30 * SECOND)
    assert crashes.recovered({"tiny-0007": HERE}, now_ms + LASTED_MS - 1) == []
    assert crashes.loops(now_ms)
    assert crashes.recovered({"tiny-0007": HERE}, now_ms + LASTED_MS) == [HERE], "its recovery is reported"
    assert not crashes.loops(now_ms) and not crashes.probing(now_ms + LASTED_MS)


def test_one_that_lasted_and_then_dies_begins_a_new_row() -> None:
    crashes = Crashes()
    now_ms = fail(crashes, 4) + 60 * SECOND
    crashes.note_ready("tiny-0007", now_ms)
    crashes.note_failure("tiny-0007", *HERE, "was killed by SIGKILL", "", now_ms + LASTED_MS)
    assert not crashes.blocked(now_ms + LASTED_MS) and not crashes.loops(now_ms + LASTED_MS)


def test_ready_for_a_moment_is_not_well() -> None:
    crashes, now_ms = Crashes(), 0
    for number in range(6):
        now_ms = crashes.next_wakeup_ms(now_ms) or now_ms
        crashes.note_ready(f"tiny-{number:04}", now_ms)
        now_ms += SECOND
        crashes.note_failure(f"tiny-{number:04}", *HERE, "was killed by SIGSEGV", "", now_ms)
    assert crashes.loops(now_ms)[0].failures == 6


def test_an_end_that_was_ordered_is_no_failure_and_an_operator_may_forgive() -> None:
    crashes = Crashes()
    crashes.note_ready("tiny-0001", 0)
    crashes.note_stopped("tiny-0001")
    assert not crashes.blocked(0)
    fail(crashes, 5)
    crashes.reset("tiny")
    assert not crashes.loops(0) and crashes.next_wakeup_ms(0) is None


@pytest.mark.parametrize("kind", [StepKind.RETIRE, StepKind.REPLACE])
def test_a_node_stopped_on_purpose_leaves_nothing_to_the_next_of_its_name(kind: StepKind, tmp_path: Path) -> None:
    """Before, a replacement that could not start was forgiven because the node before it had lasted."""
    manager = NodeManager(Fleet(), tmp_path, "tcp://127.0.0.1:1", Client, lambda text: None)
    orchestrator = Orchestrator(SimpleNamespace(), manager, tmp_path, lambda text: None)
    crashes = orchestrator._crashes
    crashes.note_ready("tiny-0009", 0)
    now_ms = fail(crashes, LOOP - 1, 2 * LASTED_MS)
    manager.begin_step(PlanStep(kind, "tiny-0009", *HERE, "its settings have changed"))
    assert not crashes.loops(now_ms)
    crashes.note_failure("tiny-0009", *HERE, "ended with status 1", "", now_ms + PAUSE_MS[1])
    assert crashes.loops(now_ms)[0].failures == LOOP
