"""What holds for every test."""

from __future__ import annotations

import asyncio
import inspect
import signal

import pytest

from llambo.testing.processes import TIMEOUT_S
from tests import systemd_here

# Started under nohup, or by a shell in the background, everything would ignore a terminal that is closed and Ctrl-C,
# and so would the programs that tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine function on an event loop of its own, with a deadline.

    The deadline only ends a test that hangs: each wait in it, and each start of a process, has a shorter one.
    """
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}

    async def limited() -> None:
        async with asyncio.timeout(3 * TIMEOUT_S):
            await pyfuncitem.obj(**arguments)

    asyncio.run(limited())
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first: several files run at a time, each in a process of its own."""
    items.sort(key=lambda item: not item.path.name.startswith("test_teeth"))


def pytest_report_header() -> list[str]:
    return systemd_here.report()
