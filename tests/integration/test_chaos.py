"""A short run of the harness in `tests/chaos`: every fault that the mesh is proof against, at once, for seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llambo.testing.processes import marked

ROOT = Path(__file__).resolve().parents[2]
MARK = "TEST_CHAOS"
TIMEOUT_S = 240.0
#: Per minute. Restarts of brokers are not among them: they have a test of their own.
FAULTS = "kill=20,stop=8,hang=6,link=6,cut=8,hold=4,halfopen=4,delay=4,throttle=4,drain=4,client=4,poison=5"


def chaos(*arguments: str, mark: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.chaos", *arguments]
    environment = {**os.environ, MARK: mark}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_nothing_is_lost_in_some_seconds_of_chaos(tmp_path: Path) -> None:
    mark = tmp_path.name
    folder = tmp_path / "history"
    done = chaos("--faults", FAULTS, "--minutes", "0.2", "--lease-ms", "1000", "--keep", str(folder), mark=mark)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "duplicated 0" in printed
    assert "faults: " in printed
    assert "faults: none" not in printed
    assert not marked(MARK, mark), "a process outlived the harness"
    # And the history says the same when it is read once more.
    again = chaos("--read", str(folder))
    assert again.returncode == 0, again.stdout


@pytest.mark.parametrize("wanted", ["--list", "--plan"])
def test_it_tells_what_it_would_do(wanted: str) -> None:
    done = chaos(wanted)
    assert done.returncode == 0, done.stderr
    assert "kill" in done.stdout
