"""What holds for every test."""

from __future__ import annotations

import asyncio
import inspect
import signal
from pathlib import Path

import hypothesis
import pytest

from llambo.testing.processes import TIMEOUT_S
from tests import needs

# A busy machine is slow, which says nothing of the code.
hypothesis.settings.register_profile("llambo", deadline=None)
hypothesis.settings.load_profile("llambo")

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


HERE = Path(__file__).resolve().parent
#: The files that take longest, in this order. They begin first, so that none of them is alone at the end.
LONGEST = (
    "acceptance/test_cli.py",
    "acceptance/test_fleet.py",
    "acceptance/test_fleet_rolling.py",
    "integration/test_fleet_hosts.py",
    "integration/test_llama_mesh.py",
    "integration/test_llama_tools.py",
    "acceptance/test_chat.py",
    "integration/test_llama_engine.py",
    "acceptance/test_node.py",
    "acceptance/test_benches.py",
    "integration/test_hostile.py",
    "acceptance/test_dashboard.py",
    "acceptance/test_openai.py",
    "acceptance/test_api_clients.py",
    "integration/test_llama_libraries.py",
    "integration/test_failover.py",
    "sim/test_sim.py",
    "integration/test_systemd.py",
    "integration/test_llama_tasks.py",
    "integration/test_gateway.py",
    "integration/test_top.py",
    "integration/test_losses.py",
    "integration/test_fleet_units.py",
    "acceptance/test_damage.py",
    "integration/test_draining.py",
    "acceptance/test_shell.py",
    "sim/test_teeth.py",
    "integration/test_chaos.py",
    "integration/test_gateway_schema.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order for `--dist loadfile`: several files run at a time, each in one process."""
    place = {HERE / name: number for number, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in place), "a file in LONGEST has another name now"
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{needs.MARK}(*names): skipped where one of these cannot be had; tests/needs.py"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before its fixtures are made."""
    needs.skip_without(item)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line of all. A process of xdist has no reporter."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and (line := needs.count(reporter.stats.get("skipped", []))):
        reporter.write_line(line)
