"""The same targets, guided by what they cover: atheris, which is libFuzzer for Python.

    pip install -e '.[fuzz]'                # wheels for Linux on x86-64; nothing else needs it
    python -m tests.fuzz coverage --target codec-client --seconds 600 --keep

It begins with the corpus of the repository and `--keep`s in it what covers something new, made small. The corpus is
replayed by a unit test, without atheris.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tests.fuzz import corpus

if TYPE_CHECKING:
    from tests.fuzz.target import Target

#: Longer inputs cover nothing that shorter ones do not, and make the corpus large.
MOST_BYTES = 700


def main(name: str, seconds: int, *, keep: bool) -> int:
    """In a process of its own, since libFuzzer ends the one it runs in. Not 0 if there was a finding."""
    from tests.fuzz import targets

    with tempfile.TemporaryDirectory(prefix="llambo-fuzz-") as folder:
        begun, target = Path(folder, "corpus"), targets.named(name)
        begun.mkdir()
        for number, frames in enumerate([*target.seeds, *corpus.read(name)]):
            Path(begun, str(number)).write_bytes(corpus.join(list(frames)))
        options = [f"-max_total_time={seconds}", f"-max_len={MOST_BYTES}", "-timeout=10", "-print_final_stats=1"]
        found = _run(name, *options, f"-artifact_prefix={folder}/", str(begun))
        for crash in sorted(Path(folder).glob("crash-*")) + sorted(Path(folder).glob("timeout-*")):
            print(f"FINDING {crash.name}: {corpus.split(crash.read_bytes())!r}")
        if keep and not found:
            inputs = [path.read_bytes() for path in begun.iterdir() if path.stat().st_size <= MOST_BYTES]
            corpus.write(name, covering(target, [corpus.split(data) for data in sorted(inputs, key=len) if data]))
            print(f"{name}: {len(corpus.read(name))} inputs in the corpus")
    return found


def covering(target: Target, inputs: Iterable[list[bytes]]) -> list[list[bytes]]:
    """Those that take a step from one line of ours to another which none before them has taken."""
    steps: set[tuple[str, int, int]] = set()
    new: set[tuple[str, int, int]] = set()
    last: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if "llambo" not in frame.f_code.co_filename:
            return None
        step = (frame.f_code.co_filename, last.get(frame, 0), frame.f_lineno)
        last[frame] = frame.f_lineno
        if step not in steps:
            new.add(step)
        return trace

    reached = []
    for frames in inputs:
        sys.settrace(trace)
        try:
            target.run(list(frames))
        finally:
            sys.settrace(None)
        if new:
            reached.append(frames)
            steps |= new
        new.clear()
        last.clear()
    return reached


def _run(name: str, *options: str) -> int:
    return subprocess.run([sys.executable, "-m", "tests.fuzz.coverage", name, *options], check=False).returncode


def fuzz(name: str, options: list[str]) -> None:
    """Never returns."""
    import atheris  # an extra: not installed for the tests alone

    # What is imported from here on reports what it runs: nothing of ours may have been imported before.
    with atheris.instrument_imports(include=["llambo"]):
        from tests.fuzz import targets
    target = targets.named(name)

    def one(data: bytes) -> None:
        frames = corpus.split(data)
        if frames:
            target.run(frames)

    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz(sys.argv[1], sys.argv[2:])
