"""Child processes that are kept alive until they are told to stop.

What a child prints is passed on with its name before it. One that dies is started again, after a pause that doubles
while it keeps dying. Each has a process group of its own: a Ctrl-C on the terminal reaches the parent alone, which
then stops its children in order.
"""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Callable, Sequence

#: The pause before a child that died is started again: from the first to the last. It is short again after it has
#: lived for the last one.
BACKOFF_S = (0.5, 8.0)
#: How long a child gets after SIGTERM, before it is told again, and then before SIGKILL.
STOP_S = (5.0, 2.0)
#: The longest line that is passed on in one piece.
LINE_BYTES = 64 * 1024


class Child:
    """One child and its successors. `started` is what it said when it was ready for the first time."""

    def __init__(self, name: str, command: Sequence[str], say: Callable[[str], None], show: Callable[[str], None]):
        self.name = name
        self.process: Process | None = None
        self.started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.stopping = asyncio.Event()
        self._command = list(command)
        self._say = say
        self._show = show

    def add(self, *words: str) -> None:
        """To the command of its successors: what this one has found out."""
        self._command += words

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    async def keep(self) -> int:
        """Run it, again and again until `stop`. The exit status of one that died before it was ever ready."""
        loop, pause_s = asyncio.get_running_loop(), BACKOFF_S[0]
        while True:
            began = loop.time()
            code = await self._live()
            if self.stopping.is_set() or not self.started.done():
                return code
            if loop.time() - began > BACKOFF_S[1]:
                pause_s = BACKOFF_S[0]
            self._say(f"{self.name} {how_it_ended(code)}; it starts again in {pause_s:g} s")
            if await self._told_to_stop(pause_s):
                return code
            pause_s = min(2 * pause_s, BACKOFF_S[1])

    async def stop(self) -> None:
        """Ask, ask again, insist."""
        self.stopping.set()
        if self.process is None or self.process.returncode is not None:
            return
        for number, patience_s in ((signal.SIGTERM, STOP_S[0]), (signal.SIGTERM, STOP_S[1]), (signal.SIGKILL, None)):
            try:
                self.process.send_signal(number)
                async with asyncio.timeout(patience_s):
                    await self.process.wait()
                    return
            except TimeoutError:
                self._say(f"{self.name} is still there; it is told again")
            except ProcessLookupError:
                return

    # --- inside --------------------------------------------------------------------------------------

    async def _live(self) -> int:
        ours, theirs = os.pipe()
        try:
            self.process = await asyncio.create_subprocess_exec(
                *self._command, "--notify-fd", str(theirs), "--parent", str(os.getpid()),
                stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, pass_fds=[theirs], process_group=0, limit=LINE_BYTES,
            )  # fmt: skip
        finally:
            os.close(theirs)
        if self.stopping.is_set():  # since before it was there to be told
            self.process.kill()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._hear(ours))
            tasks.create_task(self._pass_on(self.process))
            return await self.process.wait()

    async def _hear(self, descriptor: int) -> None:
        """The one line it says when it is ready; the end of the pipe if it never is."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb")
        )
        line = (await reader.readline()).decode().strip()
        transport.close()
        if not line:
            return
        if self.started.done():
            self._say(f"{self.name} is ready again, pid {self.pid}")
        else:
            self.started.set_result(line)

    async def _pass_on(self, process: Process) -> None:
        assert process.stdout is not None, "it was started with a pipe"
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # longer than the limit: what there was of it is gone
                continue
            if not line:
                return
            self._show(f"{self.name:<8} | {line.decode('utf-8', 'replace').rstrip()}")

    async def _told_to_stop(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                return await self.stopping.wait()
        except TimeoutError:
            return False


def how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
