"""The provider `process`: nodes outlive the process that started them, are found again, and never run twice."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from llambo.fleet.model import NodeFailed, NodeRecord
from llambo.fleet.providers.process import Processes
from llambo.testing.processes import wait_until_gone

BROKER = [sys.executable, "-m", "llambo.cli.services.broker", "--port", "0"]


def a_record(name: str = "broker") -> NodeRecord:
    return NodeRecord(
        name=name, node_class="broker", host="here", fingerprint="x", memory_bytes=1, cores=0.0, slots=0, begun_ms=1
    )


def in_a_loop(test: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    @functools.wraps(test)
    def run(folder: Path) -> None:
        asyncio.run(test(folder))

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    left = Processes(tmp_path)
    for record in left.records():
        if pid := left.pid(record.name):
            os.kill(pid, signal.SIGKILL)
            wait_until_gone(pid, 20)


@in_a_loop
async def test_a_node_is_found_again_by_another_process_and_ended(folder: Path) -> None:
    first = Processes(folder)
    assert int(await first.spawn(a_record(), BROKER, 30)) > 0
    pid = first.pid("broker")
    assert pid is not None

    second = Processes(folder)
    assert second.records() == [a_record()] and second.pid("broker") == pid
    await second.end("broker", 30)
    assert second.pid("broker") is None and second.records() == []
    wait_until_gone(pid, 20)


@in_a_loop
async def test_a_node_whose_lock_is_taken_ends_at_once(folder: Path) -> None:
    processes = Processes(folder)
    await processes.spawn(a_record(), BROKER, 30)
    lock = str(folder / "nodes" / "broker" / "lock")
    twin = await asyncio.create_subprocess_exec(
        *BROKER, "--hold", lock, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _, output = await asyncio.wait_for(twin.communicate(), 30)
    assert twin.returncode == 1 and b"this node is already running" in output
    await processes.end("broker", 30)


@in_a_loop
async def test_one_that_does_not_listen_is_killed(folder: Path) -> None:
    processes = Processes(folder)
    await processes.spawn(a_record(), BROKER, 30)
    pid = processes.pid("broker")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await processes.end("broker", 0.2)
    wait_until_gone(pid, 20)


@in_a_loop
async def test_one_that_ends_before_it_is_ready_leaves_its_words_and_nothing_else(folder: Path) -> None:
    processes = Processes(folder)
    with pytest.raises(NodeFailed) as failed:
        await processes.spawn(a_record(), [*BROKER, "--bind", "192.0.2.1", "--keys", "/nowhere"], 30)
    assert str(failed.value) == "broker ended with status 2" and "/nowhere" in failed.value.log_tail
    assert processes.records() == [] and "/nowhere" in processes.log_tail("broker")
    with pytest.raises(NodeFailed) as failed:
        await processes.spawn(a_record(), ["/nowhere/python"], 30)
    assert failed.value.how == "cannot be started: No such file or directory" and processes.records() == []


@in_a_loop
async def test_how_one_ended_that_was_killed(folder: Path) -> None:
    processes = Processes(folder)
    await processes.spawn(a_record(), BROKER, 30)
    pid = processes.pid("broker")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid, 20)
    assert processes.pid("broker") is None, "it is a zombie, and holds nothing"
    assert processes.how_it_ended("broker") == "was killed by SIGKILL"


@in_a_loop
async def test_one_that_lives_is_not_forgotten(folder: Path) -> None:
    processes = Processes(folder)
    await processes.spawn(a_record(), BROKER, 30)
    with pytest.raises(NodeFailed):
        await Processes(folder).spawn(a_record(), BROKER, 30)
    processes.forget("broker")
    assert processes.records() == [a_record()] and processes.pid("broker")
    await processes.end("broker", 30)
