"""The commands of llambo as real processes. They do not inherit the settings of the test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llambo.testing.processes import TIMEOUT_S, Process

ROOT = Path(__file__).resolve().parents[2]
LLAMBO, BROKER, WORKER = "llambo.cli", "llambo.cli.services.broker", "llambo.cli.services.worker"


def environment() -> dict[str, str]:
    """The environment of this process without settings of llambo. The engine is the fake one, which needs no model."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("LLAMBO_")}
    return {
        **others,
        "PYTHONPATH": str(ROOT),
        "XDG_CONFIG_HOME": "/nonexistent",
        "HOME": "/nonexistent",
        "LLAMBO_ENGINE": "fake",
    }


def command(module: str, *words: str, stdin: str | None = None) -> Process:
    """Start a command of llambo."""
    return Process("-m", module, *words, env=environment(), cwd="/", stdin=stdin)


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


class Commands:
    """The commands of llambo for the mesh at one address."""

    def __init__(self, address: str) -> None:
        self.address = address

    def llambo(self, *words: str, stdin: str | None = None, timeout_s: float = TIMEOUT_S) -> Done:
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

    def start(self, *words: str) -> Process:
        return command(LLAMBO, "--broker", self.address, *words)

    def ok(self, *words: str, stdin: str | None = None) -> Done:
        done = self.llambo(*words, stdin=stdin)
        assert done.code == 0, done.story
        return done


@contextmanager
def up(*words: str) -> Iterator[tuple[Commands, Process]]:
    """`llambo up` on free ports, with all of its workers ready."""
    http = () if "--http-port" in words else ("--no-http",)
    with command(LLAMBO, "up", "--port", "0", *http, *words) as running:
        address = running.line(r"broker at (tcp://\S+),")[1]
        running.line("Ctrl-C stops everything")
        try:
            yield Commands(address), running
        finally:
            if running.running:
                running.send(signal.SIGINT)
                running.end()


@contextmanager
def by_hand(*workers: Sequence[str]) -> Iterator[tuple[Commands, Process, list[Process]]]:
    """`llambo-broker` and one `llambo-worker` for each list of flags."""
    with command(BROKER, "--port", "0") as broker:
        address = broker.line(r"listening at (tcp://\S+)")[1]
        started = [command(WORKER, "--broker", address, *flags) for flags in workers]
        try:
            for worker in started:
                worker.line("is ready")
            yield Commands(address), broker, started
        finally:
            for worker in started:
                worker.kill()
