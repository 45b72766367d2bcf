"""A shell from its start to its end: where its lines come from, and the signals it hears."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from types import TracebackType

from llambo.cli.kit.common import Common
from llambo.cli.kit.exits import Exit
from llambo.cli.kit.following import end_signals
from llambo.cli.kit.shell_session import Session
from llambo.cli.shell.shell_run import Shell
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError

#: The longest line: a prompt, and what stands before it.
LINE_BYTES = limits.PROMPT_BYTES + 4_096
READ_BYTES = 64 * 1024


async def run(common: Common, text: str | None, keep_going: bool, as_json: bool) -> int:
    """Its exit code."""
    session = Session(common)
    interactive = text is None and sys.stdin.isatty()
    shell = Shell(common, session, as_json=as_json, keep_going=keep_going or interactive)
    with _Signals(session, interactive) as signals:
        try:
            if interactive:
                from llambo.cli.shell.shell_prompt import converse

                await converse(shell)
                return Exit.OK
            code = await shell.lines(text.splitlines() if text is not None else stdin_lines())
        except asyncio.CancelledError:
            if not signals.last:
                raise
            return 128 + signals.last
        finally:
            await session.close()
    return code


class _Signals:
    """Ctrl-C stops the command that runs, and a script with it. SIGTERM and a closed terminal end the shell."""

    def __init__(self, session: Session, interactive: bool) -> None:
        self.last = 0
        self._session = session
        self._interactive = interactive
        self._loop = asyncio.get_running_loop()
        self._main = asyncio.current_task()

    def __enter__(self) -> _Signals:
        for number in end_signals():
            self._loop.add_signal_handler(number, self._on_signal, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in end_signals():
            self._loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        self.last = number
        self._session.interrupt(number)
        ends = number != signal.SIGINT or not (self._interactive or self._session.busy)
        if ends and self._main is not None:
            self._main.cancel()


async def stdin_lines() -> AsyncIterator[str]:
    """Each line as soon as it is there: who writes may wait for what the last one did."""
    descriptor, rest = sys.stdin.fileno(), b""
    while data := await _read(descriptor):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield _text(line)
        if len(rest) > LINE_BYTES:
            raise LlamboError(Code.TOO_LONG, f"a line on stdin is longer than {LINE_BYTES} bytes")
    if rest:
        yield _text(rest)


def _text(line: bytes) -> str:
    try:
        return line.decode().rstrip("\r")
    except UnicodeDecodeError as error:
        raise LlamboError(Code.BAD_REQUEST, f"a line on stdin is not UTF-8 text: {error}") from error


async def _read(descriptor: int) -> bytes:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    try:
        loop.add_reader(descriptor, readable.set)
    except PermissionError:
        return os.read(descriptor, READ_BYTES)  # a file: it has always something to read, or its end
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)
    return os.read(descriptor, READ_BYTES)
