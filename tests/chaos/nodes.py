"""Brokers, workers and clients as a user starts them, each in a process of its own that ends when the harness ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable
from pathlib import Path

from llambo.testing.processes import children
from tests.chaos.history import Journal

#: How long a process may take to say that it is ready.
READY_S = 60.0
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LLAMBO = [sys.executable, "-c", "from llambo.cli.main import main; main()"]


class Node:
    """One name and the processes that bear it, one after the other."""

    def __init__(
        self, name: str, command: Callable[[int], list[str]], folder: Path, journal: Journal, *, says: bool = True
    ) -> None:
        """`command` gets the number of this start. `says`: the process writes to a pipe when it is ready."""
        self.name = name
        self.process: Process | None = None
        #: Set while it runs and has reported that it is ready.
        self.ready = asyncio.Event()
        #: True until the run ends: a process that ends before that is started again.
        self.wanted = True
        #: How long it stays away the next time.
        self.pause_s = 0.0
        self.starts = 0
        self._changed = asyncio.Condition()
        self.log = folder / f"{name}.log"
        self._command = command
        self._journal = journal
        self._says = says

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None and self.process.returncode is None else 0

    def engine(self, number: int = 0) -> int:
        """The engine child of a worker, or one of those of a host; 0 if there is none now."""
        found = self.engines()
        return found[number % len(found)] if found else 0

    def engines(self) -> list[int]:
        try:
            return children(self.pid) if self.pid else []
        except OSError:
            return []

    async def start(self) -> None:
        """Returns when it is ready, or is gone before that."""
        ours, theirs = os.pipe()
        self.starts += 1
        options = ["--notify-fd", str(theirs), "--parent", str(os.getpid())] if self._says else []
        try:
            with self.log.open("ab") as log:
                self.process = await asyncio.create_subprocess_exec(
                    *self._command(self.starts), *options, stdin=DEVNULL if self._says else PIPE, stdout=log,
                    stderr=log, pass_fds=[theirs], process_group=0,
                )  # fmt: skip
        finally:
            os.close(theirs)
        self._journal.write("begun", whom=self.name, pid=self.process.pid)
        if not self._says:
            os.close(ours)
            await self._is_ready()
            return
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb")
        )
        try:
            async with asyncio.timeout(READY_S):
                if await reader.readline():
                    await self._is_ready()
        finally:
            transport.close()

    async def _is_ready(self) -> None:
        async with self._changed:
            self.ready.set()
            self._changed.notify_all()

    async def restarted(self, starts: int, within_s: float = READY_S) -> bool:
        """Whether one that was started after the first `starts` is ready, or becomes it in time."""
        try:
            async with asyncio.timeout(within_s), self._changed:
                await self._changed.wait_for(lambda: self.starts > starts and self.ready.is_set())
        except TimeoutError:
            return False
        return True

    async def keep(self) -> None:
        """As a supervisor would: whenever it ends it is started again at once, until it is not wanted any more."""
        while self.wanted:
            if self.process is None or self.process.returncode is not None:
                await asyncio.sleep(self.pause_s)
                self.pause_s = 0.0
                await self.start()
            assert self.process is not None
            code = await self.process.wait()
            self.ready.clear()
            self._journal.write("ended", whom=self.name, pid=self.process.pid, code=code)

    def send(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)

    def size(self) -> tuple[int, int] | None:
        """Resident bytes and open descriptors; None if it has just gone."""
        return size_of(self.pid) if self.pid else None


def size_of(pid: int) -> tuple[int, int] | None:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * PAGE_BYTES, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except (OSError, IndexError):
        return None


def began(pid: int) -> int:
    """When this process began, in clock ticks since boot: with its number it says which one is meant. 0: it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0


def module(name: str) -> list[str]:
    return [sys.executable, "-m", f"llambo.cli.services.{name}"]


def broker_command(name: str, host: str, port: int, flags: dict[str, object]) -> list[str]:
    return [*module("broker"), "--name", name, "--bind", host, "--port", str(port), *_words(flags)]


def worker_command(name: str, address: str, flags: dict[str, object]) -> list[str]:
    return [*module("worker"), "--name", name, "--broker", address, *_words(flags)]


def client_command(options: dict[str, object]) -> list[str]:
    return [sys.executable, "-m", "tests.chaos.load", json.dumps(options)]


def reader_command(options: dict[str, object]) -> list[str]:
    return [sys.executable, "-m", "tests.chaos.http_load", json.dumps(options)]


def gateway_command(address: str, port: int, flags: dict[str, object]) -> list[str]:
    return [*_LLAMBO, "--broker", address, "gateway", "-v", "--http-port", str(port), *_words(flags)]


def drain_command(address: str, worker: str, *flags: str) -> list[str]:
    return [*_LLAMBO, "--broker", address, "drain", worker, *flags]


def _words(flags: dict[str, object]) -> list[str]:
    return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
