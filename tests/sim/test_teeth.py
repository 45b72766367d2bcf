"""Each guard of the delivery rules is there for a reason: without it the simulator finds a broken run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.sim.mutants import GUARDS, ROOT

#: Within so many seeds each removal has to be noticed.
SEEDS = 1_000
DEADLINE_S = 240


@pytest.mark.parametrize("guard", GUARDS)
def test_removing_a_guard_is_noticed(guard: str) -> None:
    command = [sys.executable, "-m", "tests.sim", "--seeds", str(SEEDS), "--check-every", "2", "--without", guard]
    command += ["--brokers", str(GUARDS[guard].brokers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-2_000:]
    assert "caught by seed" in done.stdout
