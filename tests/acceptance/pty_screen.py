"""A command on a terminal of its own: typed into, and read from the screen of an emulator.

Every wait is for something on the screen or for the end of the command, and has a deadline; a missed one fails with
the screen and all that scrolled off it.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from types import TracebackType

import pyte

from tests.acceptance.commands import LLAMBO, PATIENCE_S, environment

COLUMNS, ROWS = 100, 40
CTRL_C, CTRL_D, CTRL_R, TAB, ENTER, ALT_ENTER = "\x03", "\x04", "\x12", "\t", "\r", "\x1b\r"
#: What a terminal puts around text that is pasted.
PASTE = "\x1b[200~{}\x1b[201~"
#: The command becomes a session of its own, whose terminal this is: Ctrl-C reaches it as SIGINT.
START = (
    "import fcntl, os, runpy, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "sys.argv.pop(0); runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


class _Emulator(pyte.HistoryScreen):
    """It answers where the cursor is: a program may ask."""

    def __init__(self, answer: Callable[[bytes], int]) -> None:
        super().__init__(COLUMNS, ROWS, history=5_000)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data.encode())


class PtyScreen:
    def __init__(self, *words: str, module: str = LLAMBO, env: Mapping[str, str | None] | None = None) -> None:
        """`env` is added to what a command finds there; None takes a name away."""
        self.raw = ""
        self._words = words
        ours, theirs = os.openpty()
        self._ours = ours
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self._screen = _Emulator(lambda data: os.write(ours, data))
        self._stream = pyte.ByteStream(self._screen)
        wanted = {**environment(), "TERM": "xterm-256color", **(env or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, module, *words],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd="/",
            env={name: value for name, value in wanted.items() if value is not None},
        )  # fmt: skip
        os.close(theirs)

    # --- typing ----------------------------------------------------------------------------------------

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def enter(self, line: str) -> None:
        self.press(line + ENTER)

    # --- reading ---------------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """The screen, and what has scrolled off it."""
        above = ["".join(line[at].data for at in range(COLUMNS)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self._screen.display]).rstrip()

    def until(self, condition: str | Callable[[str], bool], after: str = "", timeout_s: float = PATIENCE_S) -> str:
        """The text once this is in it, behind the last place where `after` stands."""
        deadline = time.monotonic() + timeout_s
        while True:
            text = self.text.rpartition(after)[2] if after else self.text
            if (not after or after in self.text) and (
                condition in text if isinstance(condition, str) else condition(text)
            ):
                return text
            what = condition if isinstance(condition, str) else "what was waited for"
            left_s = deadline - time.monotonic()
            assert left_s > 0, self.story(f"no {what!r} within {timeout_s} s")
            assert self._read(left_s), self.story(f"it ended without {what!r}")

    def _read(self, timeout_s: float) -> bool:
        """False: the other end is closed."""
        if not select.select([self._ours], [], [], timeout_s)[0]:
            return True
        try:
            data = os.read(self._ours, 65_536)
        except OSError:  # so a terminal says that nobody is at its other end
            return False
        self.raw += data.decode(errors="replace")
        self._stream.feed(data)
        return bool(data)

    def end(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit status, with all that it still had to say read."""
        deadline = time.monotonic() + timeout_s
        while self._read(max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, self.story(f"it still runs after {timeout_s} s")
        return self.process.wait(timeout_s)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def story(self, what: str) -> str:
        return f"llambo {' '.join(self._words)}: {what}; the screen:\n{self.text}\nwritten last: {self.raw[-500:]!r}"

    def __enter__(self) -> PtyScreen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)
        os.close(self._ours)
