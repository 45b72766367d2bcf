"""`python -m tests.integration.puller`: downloads, each in a process of its own, which is forked for a line on stdin.

A test kills these processes; to start a Python for each would take most of its time. For a line, a JSON list of the
name and of the largest file that may be written (0: no limit), two lines are written: the process id, and at its end
what came of it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from llambo.testing.commands import ROOT
from llambo.worker.store import pull, refs


class Watcher:
    """Says what it sees of a download."""

    def note(self, text: str) -> None:
        say(note=text)

    def moved(self, count: int) -> None:
        say(moved=count)

    def verified(self, path: Path, sha256: str) -> None:
        say(verified=sha256)


def say(**fields: Any) -> None:
    os.write(1, json.dumps(fields).encode() + b"\n")


def one(name: str, largest: int) -> None:
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        ref = refs.parse(name)
        assert ref is not None
        say(path=str(pull.carry_out(pull.plan(ref, Watcher()), ref, Watcher())))
    except refs.StoreError as error:
        say(error=str(error), hint=error.hint)


def main() -> None:
    for line in sys.stdin:
        name, largest = json.loads(line)
        pid = os.fork()
        if pid == 0:
            one(name, largest)
            os._exit(0)
        say(pid=pid)
        say(ended=os.waitpid(pid, 0)[1])


class Puller:
    """The process with this module, and what it says."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.said: list[dict[str, Any]] = []
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(home), **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd="/"
        )

    def begin(self, name: str, largest: int = 0) -> int:
        """Returns the id of the process that downloads."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, largest]).encode() + b"\n")
        self.process.stdin.flush()
        return int(self.until("pid"))

    def until(self, key: str) -> Any:
        """The value of the next line that has this key. Processes write lines in any order."""
        assert self.process.stdout is not None
        while not any(key in line for line in self.said):
            line = self.process.stdout.readline()
            assert line, f"it ended: {self.said}"
            self.said.append(json.loads(line))
        found = next(line for line in self.said if key in line)
        self.said.remove(found)
        return found[key]

    def pull(self, name: str, largest: int = 0) -> dict[str, Any]:
        """All that was said, as one map."""
        self.said.clear()
        self.begin(name, largest)
        self.until("ended")
        return {key: value for line in self.said for key, value in line.items()}

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


if __name__ == "__main__":
    main()
