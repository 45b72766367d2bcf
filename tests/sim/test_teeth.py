"""Each guard of the delivery rules is there for a reason: without it the simulator finds a broken run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.sim.mutants import GUARDS, ROOT
from tests.sim.runner import run_seed

#: Within so many seeds each removal has to be noticed.
SEEDS = 1_000
DEADLINE_S = 240
CHECK_EVERY = 2
#: A seed of these that notices the removal. It is tried first and takes less than a second; the search takes up to two
#: minutes. If the seed notices nothing any more, because the simulator draws its random numbers in another order, all
#: seeds are searched, and the test prints the one that notices. Write it here.
NOTICED_BY = {
    "fence": 26,
    "index": 4,
    "trim": 2,
    "append before forward": 26,
    "end on control": 0,
    "end acknowledgement": 2,
    "claimed-set requeue": 41,
    "control sequence": 43,
    "receipt is asked for again": 7,
    "receipt counts": 3,
    "lease": 6,
    "a worker with runs has a short lease": 10,
    "dedup of submits": 22,
    "transcript in the re-dispatch": 1,
    "drain is sent again": 78,
    "fence left when it moves": 1,
    "moved requests go first": 20,
    "whole results": 20,
    "newer state of the client": 92,
    "abandoned is not ended": 92,
    "no END that is out of date": 974,
    "poison is ended": 20,
    "one suspect on an engine": 62,
    "one suspect of all brokers": 784,
    "progress clears a suspect": 20,
    "kills from outside are not charged": 1,
    "running limit in the queue": 25,
    "running limit without a queue": 25,
    "held back until one has ended": 25,
    "identities take turns": 193,
    "a moved request is charged once": 2,
    "limits apply to new requests": 288,
    "only what was sealed is adopted": 1,
    "a seal is for one worker": 201,
    "no partial result": 46,
    "an adapter is part of the fingerprint": 69,
    "tokens wait for their file": 519,
    "without a name no adapter is meant": 19,
    "budget of a host": 2,
    "what was measured counts, and no less": 7,
    "one engine for a model": 0,
    "what is in use stays loaded": 7,
    "what is held stays loaded": 3,
    "a model is loaded in one place": 14,
    "a wish is sent again": 15,
    "a load that fails ends its requests": 2,
}


def _search(guard: str, first: int, seeds: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.sim", "--first", str(first), "--seeds", str(seeds)]
    command += ["--check-every", str(CHECK_EVERY), "--without", guard, "--brokers", str(GUARDS[guard].brokers)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


@pytest.mark.parametrize("guard", GUARDS)
def test_removing_a_guard_is_noticed(guard: str) -> None:
    known = NOTICED_BY.get(guard)
    done = None if known is None else _search(guard, known, 1)
    if done is None or done.returncode != 0:
        done = _search(guard, 0, SEEDS)
        print(f"{guard}: the seed in NOTICED_BY is {known}; {done.stdout.splitlines()[-1:]}")
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-2_000:]
    assert "caught by seed" in done.stdout


@pytest.mark.parametrize("guard", NOTICED_BY)
def test_the_same_run_passes_with_the_guard(guard: str) -> None:
    assert NOTICED_BY[guard] < SEEDS
    seed = (NOTICED_BY[guard], CHECK_EVERY, GUARDS[guard].brokers)
    assert not run_seed(seed, hosts=GUARDS[guard].hosts).wrong
