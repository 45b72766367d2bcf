"""Processes whose output is lost: written to a full disk, or to a pipe that has no reader any more. They work on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from llambo.testing.commands import BROKER, LLAMBO, WORKER, Commands, environment
from llambo.testing.processes import TIMEOUT_S
from tests.chaos.world import free_port

FULL = "/dev/full"


@contextmanager
def without_output(how: str, commands: Sequence[list[str]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Each with its stdout and stderr on a full disk, or in a pipe whose reader has gone."""
    if how == "full":
        target = os.open(FULL, os.O_WRONLY)
    else:
        reader, target = os.pipe()
        os.close(reader)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *command], stdout=target, stderr=target, stdin=subprocess.DEVNULL, env=environment()
        )
        for command in commands
    ]
    os.close(target)
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait(TIMEOUT_S)


@pytest.mark.parametrize("how", ["full", "gone"])
def test_a_broker_and_a_worker_without_output_work_on(how: str) -> None:
    mesh = Commands(f"tcp://127.0.0.1:{(port := free_port(21_000))}")
    commands = [
        [BROKER, "-v", "--port", str(port)],
        [WORKER, "-v", "--broker", mesh.address, "--name", "w"],
    ]
    with without_output(how, commands) as (broker, worker):
        # The client waits for a broker, and the broker, which has just started, for its worker.
        answer = mesh.ok("send", "--max-tokens", "5", "hello")
        assert answer.out.count(" ") == 5
        for process in (worker, broker):
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0


def test_a_whole_mesh_without_output_works_on() -> None:
    mesh = Commands(f"tcp://127.0.0.1:{(port := free_port(22_000))}")
    with without_output("full", [[LLAMBO, "up", "--workers", "1", "--port", str(port)]]) as (running,):
        assert mesh.ok("send", "--max-tokens", "5", "hello").out.count(" ") == 5
        running.send_signal(signal.SIGTERM)
        assert running.wait(TIMEOUT_S) == 0
