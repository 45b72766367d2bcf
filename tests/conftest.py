"""What holds for every test."""

from __future__ import annotations

import signal

import pytest

from tests import systemd_here

# Started under nohup, or by a shell in the background, everything would ignore a terminal that is closed and Ctrl-C,
# and so would the programs that tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first: several files run at a time, each in a process of its own."""
    items.sort(key=lambda item: not item.path.name.startswith("test_teeth"))


def pytest_report_header() -> list[str]:
    return systemd_here.report()
