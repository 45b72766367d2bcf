"""Hostile peers and honest ones at the same sockets. `python -m tests.fuzz` does the same by the million."""

from __future__ import annotations

import pytest

from tests.fuzz import bombs, live, sessions

MESSAGES = 6_000
SESSIONS, IDLE = 400, 60
#: RLIMIT_AS of a broker that is thrown a bomb at: three times what it has in address space.
LIMIT_BYTES = 768 * 2**20


@pytest.mark.parametrize("role", live.ROLES)
def test_mutated_messages_do_not_keep_anybody_from_being_served(role: str) -> None:
    report = live.ROLES[role](MESSAGES, "test")
    assert not report.wrong, report.show()
    assert report.sent.total() >= MESSAGES


def test_hostile_connections_leave_nothing_behind() -> None:
    with sessions.mesh_for_it() as mesh:
        report = sessions.attack(mesh, SESSIONS, IDLE, "test", alone_s=0.5)
    assert report.alive and report.sessions == SESSIONS and report.idle == IDLE
    assert not [tally for tally in report.told.values() if tally["wrong"] or tally["errors"]], report.told
    assert report.told["during"]["answers"]
    assert report.settled, report.descriptors


def test_a_broker_that_a_bomb_has_killed_is_back_with_its_clients() -> None:
    report = bombs.attack("endless message, port +0", LIMIT_BYTES, seconds=3.0, alone_s=1.0)
    assert report.deaths, "the limit of memory was not reached"
    assert not report.faults, report.told
    assert report.told["after"]["answers"], report.told


@pytest.mark.parametrize("bomb", ["ping behind a full queue, port +3", "names that are taken, port +0"])
def test_what_would_abort_libzmq_aborts_nobody(bomb: str) -> None:
    report = bombs.attack(bomb, 0, seconds=2.0, alone_s=0.5)
    assert not report.deaths and not report.faults, (report.deaths, report.told)
