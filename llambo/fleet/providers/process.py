"""The provider `process`: nodes are processes of this machine. They outlive the process that started them.

    FOLDER/nodes/tiny-0001/node.json   what it was started with; written before it is started
    FOLDER/nodes/tiny-0001/lock        locked by the node itself as long as it runs
    FOLDER/logs/tiny-0001.log          its output

So the next command finds out what runs, without a pid file, whose pid may belong to another process by now: the kernel
releases a lock when its process ends, however it ends. A node that finds its lock taken ends at once
(`cli/services/service.py`), so there are never two of one name.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from llambo.fleet.model import NodeFailed, NodeRecord
from llambo.mesh.service.host import exit_text, ready_line
from llambo.mesh.wire.errors import Code, LlamboError

#: A log that is longer is renamed when its node is started, and a new one begins.
LOG_BYTES = 8 * 1024 * 1024
#: How much of the end of a log is read.
TAIL_BYTES = 4 * 1024
#: After SIGKILL a process is gone at once, unless the kernel is busy with it.
KILL_S = 10.0
RECORD, LOCK = "node.json", "lock"
#: `struct flock` on 64-bit Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi")


class Processes:
    def __init__(self, folder: Path) -> None:
        self._nodes, self._logs = folder / "nodes", folder / "logs"
        for path in (self._nodes, self._logs):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        #: Pids of our own children, which we have to reap.
        self._ours: dict[str, int] = {}

    def records(self) -> list[NodeRecord]:
        """Of all nodes that were started and not forgotten, whether they still run or not."""
        found = []
        for path in sorted(self._nodes.iterdir()):
            try:
                found.append(msgspec.json.decode((path / RECORD).read_bytes(), type=NodeRecord))
            except FileNotFoundError:
                continue  # a process made the folder and ended before it wrote the record
            except msgspec.MsgspecError as error:
                raise LlamboError(Code.INTERNAL, f"{path / RECORD} cannot be read: {error}") from error
        return found

    def pid(self, name: str) -> int | None:
        """None: it does not run."""
        try:
            lock = os.open(self._nodes / name / LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            # Ask who holds the lock. Taking it would disturb a node that is just starting.
            asked = fcntl.fcntl(lock, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        finally:
            os.close(lock)
        kind, _, _, _, pid = _FLOCK.unpack(asked)
        return None if kind == fcntl.F_UNLCK else pid

    def ours(self, name: str) -> bool:
        """It is a child of ours, so we know if it has ended."""
        return name in self._ours

    async def spawn(self, record: NodeRecord, command: Sequence[str], within_s: float) -> str:
        """Returns its readiness line. A node that is not ready in time is left running."""
        folder = self._nodes / record.name
        folder.mkdir(mode=0o700, exist_ok=True)
        self.remember(record)
        ours, theirs = os.pipe()
        try:
            os.set_inheritable(theirs, True)
            pid = self._start(record.name, [*command, "--notify-fd", str(theirs), "--hold", str(folder / LOCK)])
        except OSError as error:
            os.close(ours)
            self.forget(record.name)
            raise NodeFailed(record.name, f"cannot be started: {error.strerror}", "") from error
        finally:
            os.close(theirs)
        self._ours[record.name] = pid
        try:
            async with asyncio.timeout(within_s):
                line = await ready_line(ours)
        except TimeoutError:
            raise NodeFailed(record.name, f"was not ready within {within_s:g} s", self.log_tail(record.name)) from None
        if not line:
            failed = NodeFailed(record.name, await self._how_it_ended(record.name), self.log_tail(record.name))
            self.forget(record.name)
            raise failed
        return line

    async def end(self, name: str, within_s: float) -> None:
        """SIGTERM, on which it finishes; SIGKILL after `within_s`. Only its log remains."""
        for number, wait_s in ((signal.SIGTERM, within_s), (signal.SIGKILL, KILL_S)):
            with self._pidfd(name) as pidfd:
                if pidfd is None:
                    break
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, number)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await _readable(pidfd)
                        break
        else:
            raise LlamboError(Code.TIMEOUT, f"{name} still runs {KILL_S:g} s after SIGKILL")
        self.forget(name)

    def remember(self, record: NodeRecord) -> None:
        path = self._nodes / record.name / RECORD
        draft = path.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(record))
        draft.replace(path)

    def forget(self, name: str) -> None:
        """Remove the record of a node that has ended. One that still runs is not forgotten."""
        self._reap(name)
        if self.pid(name) is not None:
            return
        shutil.rmtree(self._nodes / name, ignore_errors=True)

    def log_tail(self, name: str) -> str:
        """The end of its log."""
        try:
            with self.log(name).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
                return log.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    # --- inside ----------------------------------------------------------------------------------------

    def _start(self, name: str, command: Sequence[str]) -> int:
        """In a session of its own, so that no Ctrl-C of a terminal reaches it."""
        log = self.log(name)
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        return os.posix_spawn(command[0], list(command), os.environ, file_actions=actions, setsid=True)

    @contextlib.contextmanager
    def _pidfd(self, name: str) -> Iterator[int | None]:
        """Of this process and no other, even if its pid is reused a moment later. None: it does not run."""
        pid = self._ours.get(name) or self.pid(name)
        try:
            pidfd = os.pidfd_open(pid) if pid else None
        except ProcessLookupError:
            pidfd = None
        if pidfd is not None and name not in self._ours and self.pid(name) != pid:
            os.close(pidfd)
            pidfd = None
        try:
            yield pidfd
        finally:
            if pidfd is not None:
                os.close(pidfd)

    async def _how_it_ended(self, name: str) -> str:
        """Its pipe is closed, so it is about to end."""
        with self._pidfd(name) as pidfd:
            if pidfd is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(KILL_S):
                        await _readable(pidfd)
        return self._reap(name) or "is gone"

    def _reap(self, name: str) -> str:
        """How it ended; empty if it still runs, or is no child of ours."""
        pid = self._ours.get(name)
        if pid is None:
            return ""
        try:
            found, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            found, status = pid, 0
        if not found:
            return ""
        del self._ours[name]
        return exit_text(os.waitstatus_to_exitcode(status))

    def how_it_ended(self, name: str) -> str:
        """Of one that no longer runs. Only the parent of a process learns its exit status."""
        return self._reap(name) or "ended"


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)
