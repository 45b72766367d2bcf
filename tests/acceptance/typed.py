"""A command at a terminal of its own: what is typed there, and what is to be read."""

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
from types import TracebackType

from tests.acceptance.commands import LLAMBO, PATIENCE_S, environment

#: What moves a cursor or chooses a colour; also the letters that tell a window its title.
ORDERS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>()][0-9A-Z]?|\x1b\][^\x07]*\x07")
CTRL_C, CTRL_D, TAB, ENTER = "\x03", "\x04", "\t", "\r"


class Typed:
    """`llambo` with stdin, stdout and stderr at a terminal that it can be interrupted from."""

    def __init__(self, *words: str, **more: str) -> None:
        self._keyboard, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
        self._words = words
        self._said = ""
        self._seen = 0
        self.process = subprocess.Popen(
            # A session of its own whose terminal this is: else no Ctrl-C would reach it.
            ["setsid", "--ctty", sys.executable, "-m", LLAMBO, *words],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd="/",
            env={**environment(), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **more},
        )  # fmt: skip
        os.close(theirs)

    def press(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def line(self, text: str) -> None:
        self.press(text + ENTER)

    def until(self, pattern: str) -> re.Match[str]:
        """Read on until this was said, after what was waited for before."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            text = ORDERS.sub("", self._said)
            if found := re.compile(pattern).search(text, self._seen):
                self._seen = found.end()
                return found
            left_s = max(0.0, deadline - time.monotonic())
            assert select.select([self._keyboard], [], [], left_s)[0], self._story(f"it did not say {pattern!r}")
            self._read(f"it ended without saying {pattern!r}")

    def end(self) -> int:
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(self._story("it still runs")) from None

    def _read(self, otherwise: str) -> None:
        try:
            data = os.read(self._keyboard, 65_536)
        except OSError:  # the other end is closed
            data = b""
        assert data, self._story(otherwise)
        self._said += data.decode(errors="replace")

    def _story(self, what: str) -> str:
        return f"llambo {' '.join(self._words)}: {what}; after what was waited for: {self._said[-3_000:]!r}"

    def __enter__(self) -> Typed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)
        os.close(self._keyboard)
