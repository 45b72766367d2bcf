"""What is sent to a service manager arrives, wherever it listens, and no call waits when it does not."""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from llambo.mesh.service import journal
from llambo.mesh.service.notify_core import Condition
from llambo.mesh.service.service_manager import Manager, Notifier, manager
from tests.integration.mini_journal import parse

READY = Condition("idle", ready=True)


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A manager's socket, and how it is called in NOTIFY_SOCKET."""
    name = f"@llambo-{secrets.token_hex(8)}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind(name.replace("@", "\0"))
        there.settimeout(10)
        yield there, name


def test_words_arrive(listener: tuple[socket.socket, str]) -> None:
    there, name = listener
    notifier = Notifier(manager({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "4000000"}, 1))
    notifier.update(READY, 0)
    assert there.recv(4_096) == b"READY=1\nSTATUS=idle\nWATCHDOG=1"
    notifier.close()


def test_a_manager_that_is_slow_is_not_waited_for_and_hears_the_last_of_each(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind(str(tmp_path / "n"))
        notifier = Notifier(Manager(str(tmp_path / "n"), 4_000))
        notifier.update(READY, 0)
        for second in range(1, 10_000):  # far more than its queue takes
            notifier.update(Condition(f"busy {second}", ready=True), second * 1_000)
        there.setblocking(False)
        datagrams = []
        while True:
            try:
                datagrams.append(there.recv(4_096).decode())
            except BlockingIOError:
                break
        assert len(datagrams) < 9_000, "it was waited for"
        assert datagrams[0] == "READY=1\nSTATUS=idle\nWATCHDOG=1"
        notifier.update(Condition("idle again", ready=True), 10_000_000)
        assert sorted(there.recv(4_096).decode().split("\n")) == ["STATUS=idle again", "WATCHDOG=1"]
        notifier.close()


def test_a_manager_that_is_gone_is_complained_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier(Manager(str(tmp_path / "no-such-socket")))
    for second in range(5):
        notifier.update(Condition(f"busy {second}", ready=True), second * 1_000)
    assert [record.message for record in caplog.records] == [
        "cannot notify the service manager: No such file or directory"
    ]
    notifier.close()


def test_a_line_reaches_the_journal_with_its_fields_or_else_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    path, id = tmp_path / "socket", "3f2a" * 8
    about = {"worker": "w1"}
    handler = journal.JournalHandler("llambo-worker", sys.stderr, about, str(path))
    record = logging.makeLogRecord(
        {"msg": "lost\nits engine", "levelno": logging.WARNING, "name": "llambo.worker", "request": id}
    )
    try:
        handler.handle(record)
        ids = f"(worker w1, request {id})"
        assert capsys.readouterr().err == f"<4>lost\n<4>its engine {ids}\n"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
            there.bind(str(path))
            there.settimeout(10)
            handler.handle(record)
            assert parse(there.recv(65_536)) == {
                "MESSAGE": "lost\nits engine",
                "PRIORITY": "4",
                "SYSLOG_IDENTIFIER": "llambo-worker",
                "LLAMBO_WORKER": "w1",
                "LLAMBO_REQUEST": id,
                "LLAMBO_LOGGER": "llambo.worker",
            }
            handler.show("w1 is ready")
            assert parse(there.recv(65_536))["MESSAGE"] == "w1 is ready"
        assert capsys.readouterr().err == ""
    finally:
        handler.close()
