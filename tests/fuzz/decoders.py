"""Mutated messages through every decoder, by as many processes as there are cores; and through every core.

Each piece of work is some thousand messages that follow from a seed, so that whatever is found can be done again:
`python -m tests.fuzz decoders --target NAME --seed SEED --count N` with what the finding says.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.fuzz import cores, targets
from tests.fuzz.target import Target

#: Messages of one piece of work.
PIECE = 20_000
#: Targets that read files get a tenth of the messages: they are slow, and files do not arrive by the million.
FILES = {"settings", "keyrings", "model-files"}
SHARE_OF_FILES = 10
#: Seconds between two lines of progress.
TELL_S = 15.0

Work = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Result:
    target: str
    seed: str
    done: int
    #: What was found, with the frames that did it; empty if nothing was.
    finding: str


def names() -> list[str]:
    return [target.name for target in targets.every()] + list(cores.CORES)


_targets: dict[str, Target] = {}


def run(work: Work) -> Result:
    """One piece of work, in any process."""
    name, seed, count = work
    if name in cores.CORES:
        return Result(name, seed, *cores.fire(name, seed, count))
    if not _targets:
        _targets.update({target.name: target for target in targets.every()})
    done, error, frames = targets.mutants(_targets[name], seed, count)
    if error is None:
        return Result(name, seed, done, "")
    story = "".join(traceback.format_exception(error)[-3:])
    return Result(name, seed, done, f"message {done}: {[frame[:200] for frame in frames]}\n{story}")


def pieces(chosen: Sequence[str], each: int, seed: str) -> Iterator[Work]:
    """In turns, so that a run that is broken off has done some of each."""
    for at in range(0, each, PIECE):
        for name in chosen:
            count = min(PIECE, each - at)
            yield name, f"{seed}/{name}/{at}", count if name not in FILES else -(-count // SHARE_OF_FILES)


def main(
    chosen: Sequence[str], each: int, seed: str, jobs: int, minutes: float, tell: Callable[[str], None] = print
) -> int:
    """1 if there was a finding. With `minutes` it stops after them, whatever is left."""
    began = reported = time.monotonic()
    done: Counter[str] = Counter()
    findings: list[Result] = []
    with multiprocessing.Pool(jobs) as pool:
        for result in pool.imap_unordered(run, pieces(chosen, each, seed)):
            done[result.target] += result.done
            if result.finding:
                findings.append(result)
                tell(f"FINDING {result.target} --seed {result.seed}\n{result.finding}")
            now = time.monotonic()
            if now - reported > TELL_S:
                reported = now
                tell(f"{now - began:5.0f} s: {done.total():,} messages, {done.total() / (now - began):,.0f} a second")
            if minutes and now - began > minutes * 60:
                pool.terminate()
                break
    spent = time.monotonic() - began
    for name in chosen:
        tell(f"{name:<24}{done[name]:>14,}")
    tell(f"{'all':<24}{done.total():>14,} in {spent:.0f} s, {done.total() / spent:,.0f} a second, {jobs} processes")
    tell(f"findings: {len(findings)}")
    return bool(findings)
