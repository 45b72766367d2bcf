"""The commands as real processes: started, listened to, and gone at the end of a test.

Every wait is for a line or for an exit and has a deadline; a missed one fails with all that was said so far.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tests.integration.processes import children

ROOT = Path(__file__).resolve().parents[2]
#: The machine may be busy with other tests; a healthy command needs a small part of this.
PATIENCE_S = 20.0

LLAMBO, BROKER, WORKER = "llambo.cli", "llambo.cli.services.broker", "llambo.cli.services.worker"


def environment() -> dict[str, str]:
    """Ours without any setting of llambo, so that a test sees the defaults; but the engine needs no model."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMBO_")}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "XDG_CONFIG_HOME": "/nonexistent",
        "HOME": "/nonexistent",
        "LLAMBO_ENGINE": "fake",
    }


class Running:
    """A command that runs. Its lines are kept as they come, from stdout and stderr apart and together."""

    def __init__(self, module: str, *words: str, stdin: str | None = None) -> None:
        self.said: list[str] = []
        self.out: list[str] = []
        self.err: list[str] = []
        self._words = [module, *words]
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd="/",
        )
        self._readers = [
            threading.Thread(target=self._read, args=(pipe, lines), daemon=True)
            for pipe, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()
        if self.process.stdin is not None and stdin is not None:
            self.process.stdin.write(stdin)
            self.process.stdin.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self, pattern: str, timeout_s: float = PATIENCE_S, *, nth: int = 1) -> re.Match[str]:
        """The first line (or the nth), on stdout or stderr, that has this in it."""
        deadline = time.monotonic() + timeout_s
        seen = count = 0
        with self._news:
            while True:
                for text in self.said[seen:]:
                    if found := re.search(pattern, text):
                        count += 1
                        if count == nth:
                            return found
                seen = len(self.said)
                over = self.process.poll() is not None and not any(reader.is_alive() for reader in self._readers)
                if over or not self._news.wait(min(1.0, max(0.0, deadline - time.monotonic()))):
                    assert not over, self.story(f"it ended without saying {pattern!r}")
                    assert time.monotonic() < deadline, self.story(f"it did not say {pattern!r} in {timeout_s} s")

    def end(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit status."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.story(f"it still runs after {timeout_s} s")) from None
        for reader in self._readers:
            reader.join(timeout_s)
            assert not reader.is_alive(), self.story("somebody still holds its output open")
        return code

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out]

    def story(self, what: str) -> str:
        return "\n".join([f"{' '.join(self._words)}: {what}; it said:", *[f"    {line}" for line in self.said]])

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def _read(self, pipe: IO[str], lines: list[str]) -> None:
        for line in pipe:
            with self._news:
                lines.append(line.rstrip("\n"))
                self.said.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()


class Terminal:
    """A command whose stderr is a terminal; its stdout is a pipe."""

    def __init__(self, module: str, *words: str) -> None:
        self.said = ""
        self.out = ""
        self._screen, theirs = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
            env=environment(),
        )
        os.close(theirs)

    def until(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.said:
            left_s = max(0.0, deadline - time.monotonic())
            assert select.select([self._screen], [], [], left_s)[0], f"no {text!r} on the screen, only {self.said!r}"
            self.said += os.read(self._screen, 4096).decode()

    def end(self) -> int:
        self.out = self.process.communicate(timeout=PATIENCE_S)[0]
        return self.process.returncode

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)
        os.close(self._screen)


class Done:
    """A command that has ended."""

    def __init__(self, words: Sequence[str], finished: subprocess.CompletedProcess[str]) -> None:
        self.code = finished.returncode
        self.out = finished.stdout
        self.err = finished.stderr
        self.story = f"llambo {' '.join(words)}: exit {self.code}\nstdout: {self.out}\nstderr: {self.err}"

    def json(self) -> Any:
        return json.loads(self.out)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


class Mesh:
    """An address, and the commands that are run against it."""

    def __init__(self, address: str) -> None:
        self.address = address

    def llambo(self, *words: str, stdin: str | None = None, timeout_s: float = PATIENCE_S) -> Done:
        finished = subprocess.run(
            [sys.executable, "-m", LLAMBO, "--broker", self.address, *words],
            stdin=subprocess.DEVNULL if stdin is None else None,
            input=stdin,
            capture_output=True,
            text=True,
            env=environment(),
            cwd="/",
            timeout=timeout_s,
            check=False,
        )
        return Done(words, finished)

    def start(self, *words: str) -> Running:
        return Running(LLAMBO, "--broker", self.address, *words)

    def ok(self, *words: str, stdin: str | None = None) -> Done:
        done = self.llambo(*words, stdin=stdin)
        assert done.code == 0, done.story
        return done


@contextmanager
def up(*words: str) -> Iterator[tuple[Mesh, Running]]:
    """`llambo up` on free ports, with all of its workers ready."""
    http = () if "--http-port" in words else ("--no-http",)
    with Running(LLAMBO, "up", "--port", "0", *http, *words) as running:
        address = running.line(r"broker at (tcp://\S+),")[1]
        running.line("Ctrl-C stops everything")
        try:
            yield Mesh(address), running
        finally:
            if running.process.poll() is None:
                running.signal(signal.SIGINT)
                running.end()


@contextmanager
def by_hand(*workers: Sequence[str]) -> Iterator[tuple[Mesh, Running, list[Running]]]:
    """`llambo-broker` and one `llambo-worker` for each list of flags."""
    with Running(BROKER, "--port", "0") as broker:
        address = broker.line(r"listening at (tcp://\S+)")[1]
        started = [Running(WORKER, "--broker", address, *flags) for flags in workers]
        try:
            for worker in started:
                worker.line("is ready")
            yield Mesh(address), broker, started
        finally:
            for worker in started:
                worker.__exit__(None, None, None)


def family(pid: int) -> list[int]:
    """All that this process has started, and what those have."""
    found = children(pid)
    return found + [one for child in found for one in family(child)]
