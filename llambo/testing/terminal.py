"""A command on a terminal of its own. A test types into it, and reads its output or the screen of an emulator.

Every wait is for output or for the end of the command, and has a deadline. A missed deadline fails with the screen,
all that has scrolled off it, and the last output. To read the screen, `pyte` is required (for developers only).
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from typing import Any

from llambo.testing.commands import LLAMBO, environment
from llambo.testing.processes import TIMEOUT_S

COLUMNS, ROWS = 100, 40
CTRL_C, CTRL_D, CTRL_R, TAB, ENTER, ALT_ENTER = "\x03", "\x04", "\x12", "\t", "\r", "\x1b\r"
#: Pasted text, as a terminal sends it.
PASTE = "\x1b[200~{}\x1b[201~"
#: Control sequences: for the cursor, colours, and the title of the window.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>()][0-9A-Z]?|\x1b\][^\x07]*\x07")
#: The command gets a session of its own with this terminal, so that Ctrl-C reaches it as SIGINT.
START = (
    "import fcntl, os, runpy, sys, termios; os.setsid(); fcntl.ioctl(2, termios.TIOCSCTTY, 0); "
    "sys.argv.pop(0); runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


class Terminal:
    """A command whose stdin, stdout and stderr are a terminal; with `only_stderr` its stdout is a pipe."""

    def __init__(
        self,
        *words: str,
        module: str = LLAMBO,
        env: Mapping[str, str | None] | None = None,
        only_stderr: bool = False,
        rows: int = ROWS,
        columns: int = COLUMNS,
    ) -> None:
        """`env` is added to the environment of the command; None removes a name."""
        #: Its output to the terminal, and to the pipe once `end` has returned.
        self.raw = ""
        self.out = ""
        self._words = words
        self._seen = 0
        self._size = rows, columns
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._screen, self._feed = self._emulator()
        # COLUMNS and LINES would count more than the size of this terminal.
        wanted = {**environment(), "TERM": "xterm-256color", "COLUMNS": None, "LINES": None, **(env or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, module, *words],
            stdin=subprocess.DEVNULL if only_stderr else theirs,
            stdout=subprocess.PIPE if only_stderr else theirs,
            stderr=theirs, cwd="/", env={name: value for name, value in wanted.items() if value is not None},
        )  # fmt: skip
        os.close(theirs)

    def _emulator(self) -> tuple[Any, Callable[[bytes], object]]:
        try:
            import pyte
        except ImportError:
            return None, lambda data: None
        screen: Any = pyte.HistoryScreen(self._size[1], self._size[0], history=5_000)
        # A program may query the position of the cursor, and waits for the answer.
        screen.write_process_input = self.press
        return screen, pyte.ByteStream(screen).feed

    # --- typing ----------------------------------------------------------------------------------------

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def enter(self, line: str) -> None:
        self.press(line + ENTER)

    # --- reading ---------------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """The screen, and what has scrolled off it."""
        assert self._screen is not None, "the screen of a Terminal is emulated by pyte, which is not installed"
        above = ["".join(line[at].data for at in range(self._size[1])) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self._screen.display]).rstrip()

    def until(self, condition: str | Callable[[str], bool], after: str = "", timeout_s: float = TIMEOUT_S) -> str:
        """The text of the screen once the condition holds, from the last place where `after` is."""
        deadline = time.monotonic() + timeout_s
        while True:
            text = self.text.rpartition(after)[2] if after else self.text
            if (not after or after in self.text) and (
                condition in text if isinstance(condition, str) else condition(text)
            ):
                return text
            self._wait(condition if isinstance(condition, str) else "what was waited for", deadline)

    def ask(self, line: str, answer: str | Callable[[str], bool], after: str = "") -> str:
        """Enter a line, and wait until its answer is on the screen."""
        self.enter(line)
        return self.until(answer, after)

    def expect(self, pattern: str, timeout_s: float = TIMEOUT_S) -> re.Match[str]:
        """The next match in its output without control sequences, after the last match."""
        deadline = time.monotonic() + timeout_s
        while True:
            if found := re.compile(pattern).search(CONTROL.sub("", self.raw), self._seen):
                self._seen = found.end()
                return found
            self._wait(pattern, deadline)

    def until_raw(self, text: str) -> None:
        """Wait for these bytes, control sequences included."""
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.raw:
            self._wait(text, deadline)

    def _wait(self, what: str, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        assert left_s > 0, self.story(f"no {what!r} in time")
        assert self._read(left_s), self.story(f"it ended without {what!r}")

    def _read(self, timeout_s: float) -> bool:
        """False: the other end is closed."""
        if not select.select([self._ours], [], [], timeout_s)[0]:
            return True
        try:
            data = os.read(self._ours, 65_536)
        except OSError:  # EIO: no process has the terminal open
            return False
        self.raw += data.decode(errors="replace")
        self._feed(data)
        return bool(data)

    def end(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit status, once all of its output has been read."""
        deadline = time.monotonic() + timeout_s
        while self._read(max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, self.story(f"it still runs after {timeout_s} s")
        if self.process.stdout is not None:
            self.out = self.process.stdout.read().decode()
        return self.process.wait(timeout_s)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def story(self, what: str) -> str:
        screen = self.text if self._screen is not None else "(pyte is not installed)"
        return f"llambo {' '.join(self._words)}: {what}; the screen:\n{screen}\nwritten last: {self.raw[-500:]!r}"

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        os.close(self._ours)
