"""The provider `process`: nodes are processes of this machine, and outlive whoever began them.

    FOLDER/nodes/tiny-0001/node.json   what it was begun with; written before it is begun
    FOLDER/nodes/tiny-0001/lock        the node itself holds it locked as long as it lives
    FOLDER/logs/tiny-0001.log          what it says

So whoever comes next knows what runs, without a pid that may be somebody else's by now: a lock goes with its process,
however that ends. And a node that finds its lock taken ends at once (`cli/services/child.py`), so there are never two
of a name.
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

from llambo.mesh.wire.errors import Code, LlamboError

#: A log is begun anew, beside the one before it, when it is longer.
LOG_BYTES = 8 * 1024 * 1024
#: Of the end of a log, so much is looked at.
WORDS_BYTES = 4 * 1024
#: After SIGKILL a process is gone in no time, unless the kernel holds it.
KILL_S = 10.0
RECORD, LOCK = "node.json", "lock"
#: `struct flock` of Linux with 64 bits: kind, from where, start, length, holder.
_FLOCK = struct.Struct("hhqqi")


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a node was begun with."""

    name: str
    node_class: str
    host: str
    fingerprint: str
    memory_bytes: int
    cores: float
    slots: int
    #: By the clock on the wall.
    begun_ms: int
    #: It was, once.
    ready: bool = False
    #: Of a broker: where it is.
    address: str = ""


class Failed(Exception):
    """A node ended before it was ready, or was not ready in time."""

    def __init__(self, name: str, how: str, words: str) -> None:
        super().__init__(f"{name} {how}")
        self.name, self.how, self.words = name, how, words


class Processes:
    def __init__(self, folder: Path) -> None:
        self._nodes, self._logs = folder / "nodes", folder / "logs"
        for path in (self._nodes, self._logs):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        #: Those that we have begun ourselves, and have to reap.
        self._ours: dict[str, int] = {}

    def records(self) -> list[Record]:
        """Of all that were begun and not ended by us, whether they live or not."""
        found = []
        for path in sorted(self._nodes.iterdir()):
            try:
                found.append(msgspec.json.decode((path / RECORD).read_bytes(), type=Record))
            except FileNotFoundError:
                continue  # somebody was about to begin it, and did not come to that
            except msgspec.MsgspecError as error:
                raise LlamboError(Code.INTERNAL, f"{path / RECORD} cannot be read: {error}") from error
        return found

    def pid(self, name: str) -> int | None:
        """None: it does not live."""
        try:
            lock = os.open(self._nodes / name / LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            # The kernel is asked who holds it. To try for it would be in the way of a node that is just beginning.
            asked = fcntl.fcntl(lock, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        finally:
            os.close(lock)
        kind, _, _, _, pid = _FLOCK.unpack(asked)
        return None if kind == fcntl.F_UNLCK else pid

    def ours(self, name: str) -> bool:
        """We have begun it ourselves, and would know if it had ended."""
        return name in self._ours

    async def spawn(self, record: Record, command: Sequence[str], within_s: float) -> str:
        """What it says when it is ready. Whoever gives up waiting leaves it as it is."""
        folder = self._nodes / record.name
        folder.mkdir(mode=0o700, exist_ok=True)
        self.remember(record)
        ours, theirs = os.pipe()
        try:
            os.set_inheritable(theirs, True)
            pid = self._begin(record.name, [*command, "--notify-fd", str(theirs), "--hold", str(folder / LOCK)])
        except OSError as error:
            os.close(ours)
            self.forget(record.name)
            raise Failed(record.name, f"cannot be begun: {error.strerror}", "") from error
        finally:
            os.close(theirs)
        self._ours[record.name] = pid
        try:
            async with asyncio.timeout(within_s):
                line = await _line(ours)
        except TimeoutError:
            raise Failed(record.name, f"was not ready within {within_s:g} s", self.words(record.name)) from None
        if not line:
            failed = Failed(record.name, await self._how_it_ended(record.name), self.words(record.name))
            self.forget(record.name)
            raise failed
        return line

    async def end(self, name: str, within_s: float) -> None:
        """SIGTERM, which lets it finish; SIGKILL after that time. Then nothing is left of it but its log."""
        for number, patience_s in ((signal.SIGTERM, within_s), (signal.SIGKILL, KILL_S)):
            with self._handle(name) as handle:
                if handle is None:
                    break
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, number)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience_s):
                        await _readable(handle)
                        break
        else:
            raise LlamboError(Code.TIMEOUT, f"{name} is still there {KILL_S:g} s after SIGKILL")
        self.forget(name)

    def remember(self, record: Record) -> None:
        path = self._nodes / record.name / RECORD
        draft = path.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(record))
        draft.replace(path)

    def forget(self, name: str) -> None:
        """One that does not live. One that does is not forgotten."""
        self._reap(name)
        if self.pid(name) is not None:
            return
        shutil.rmtree(self._nodes / name, ignore_errors=True)

    def words(self, name: str) -> str:
        """The end of its log."""
        try:
            with self.log(name).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - WORDS_BYTES))
                return log.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    # --- inside ----------------------------------------------------------------------------------------

    def _begin(self, name: str, command: Sequence[str]) -> int:
        """In a session of its own: no terminal's Ctrl-C reaches it."""
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
    def _handle(self, name: str) -> Iterator[int | None]:
        """Of its process and of no other, even if its pid is somebody else's a moment later. None: it does not live."""
        pid = self._ours.get(name) or self.pid(name)
        try:
            handle = os.pidfd_open(pid) if pid else None
        except ProcessLookupError:
            handle = None
        if handle is not None and name not in self._ours and self.pid(name) != pid:
            os.close(handle)
            handle = None
        try:
            yield handle
        finally:
            if handle is not None:
                os.close(handle)

    async def _how_it_ended(self, name: str) -> str:
        """Its pipe is closed, so its process is about to be over."""
        with self._handle(name) as handle:
            if handle is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(KILL_S):
                        await _readable(handle)
        return self._reap(name) or "is not there any more"

    def _reap(self, name: str) -> str:
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
        code = os.waitstatus_to_exitcode(status)
        return f"ended with status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"

    def how_it_ended(self, name: str) -> str:
        """Of one that does not live any more."""
        return self._reap(name) or "ended"


async def _line(descriptor: int) -> str:
    """The one line that a node says when it is ready; nothing if it ends before."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb")
    )
    try:
        return (await reader.readline()).decode().strip()
    finally:
        transport.close()


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    there: asyncio.Event = asyncio.Event()
    loop.add_reader(descriptor, there.set)
    try:
        await there.wait()
    finally:
        loop.remove_reader(descriptor)
