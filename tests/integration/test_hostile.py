"""Hostile peers and honest ones at the same sockets. `python -m tests.fuzz` does the same by the million."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest

from llambo import SyncClient
from llambo.testing.mesh import Mesh
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import FakeOptions
from tests.fuzz import bombs, live, sessions, wire

MESSAGES = 6_000
SESSIONS, IDLE = 400, 60
#: RLIMIT_AS of a broker that is thrown a bomb at: three times what it has in address space.
LIMIT_BYTES = 768 * 2**20
#: How much a broker may grow by answers that one client does not read.
UNREAD_MIB = 64


@pytest.mark.parametrize("role", live.ROLES)
def test_mutated_messages_do_not_keep_anybody_from_being_served(role: str) -> None:
    report = live.ROLES[role](MESSAGES, "test")
    assert not report.wrong, report.show()
    assert report.sent.total() >= MESSAGES


def test_hostile_connections_leave_nothing_behind() -> None:
    with sessions.mesh_for_it() as mesh:
        report = sessions.attack(mesh, SESSIONS, IDLE, "test", alone_s=0.5)
    assert report.alive and report.sessions == SESSIONS and report.idle == IDLE
    assert not [tally for tally in report.tallies.values() if tally["wrong"] or tally["errors"]], report.tallies
    assert report.tallies["during"]["answers"]
    assert report.settled, report.descriptors


@pytest.mark.parametrize(
    ("bomb", "seconds"),
    [
        # libzmq drops the connection, or ends the process: that depends on what of it finds no memory.
        ("endless message, port +0", TIMEOUT_S),
        ("small parts without end, port +0", TIMEOUT_S),
        # It ends the process.
        ("ping behind a full queue, port +0", 3.0),
    ],
)
def test_a_broker_that_was_thrown_a_bomb_at_is_back_with_its_clients(bomb: str, seconds: float) -> None:
    report = bombs.attack(bomb, LIMIT_BYTES, seconds, alone_s=0.5)
    assert report.deaths or report.peak_mib > LIMIT_BYTES / 2**21, "the limit of memory was not reached"
    assert not report.faults, report.tallies
    assert report.tallies["after"]["answers"], report.tallies


def test_answers_that_are_not_read_are_bounded_in_bytes() -> None:
    report = bombs.attack("unread replays and queries", 0, seconds=1.5, alone_s=0.2)
    before = report.first_mib
    assert report.sent_mib > 1 and not report.deaths, report.row()
    assert report.peak_mib - before < UNREAD_MIB, f"{before:.0f} MiB before, {report.row()}"
    assert report.tallies["during"]["answers"] and not report.faults, report.tallies


@pytest.mark.parametrize("bomb", ["ping behind a full queue, port +3", "names that are taken, port +0"])
def test_what_would_abort_libzmq_aborts_no_broker(bomb: str) -> None:
    report = bombs.attack(bomb, 0, seconds=2.0, alone_s=0.5)
    assert not report.deaths and not report.faults, (report.deaths, report.tallies)


def test_a_broker_whose_descriptors_are_used_up_says_so_and_admits_peers_when_some_are_free() -> None:
    with Mesh(1, fake=FakeOptions(slots=1), broker="process") as mesh:
        broker = mesh.process
        assert broker is not None
        limit = 8 + max(int(each.name) for each in Path(f"/proc/{broker.pid}/fd").iterdir())
        resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, (limit, limit))
        idle = [socket.create_connection((wire.HOST, mesh.port)) for _ in range(20)]
        broker.line(f"all {limit} descriptors are in use")
        for each in idle:
            each.close()
        with SyncClient(mesh.address) as client:
            assert client.stream("hello", max_tokens=3).result().ids
