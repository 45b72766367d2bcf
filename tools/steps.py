"""One line for each step, with a bar while it runs if the output is a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType

BAR, EVERY_S = 24, 0.1


class Step:
    """The line of one step. On a terminal it is drawn again while the step runs; in a log it is written once."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._live = sys.stdout.isatty()
        self._begun = time.monotonic()
        self._drawn = 0.0

    def __enter__(self) -> Step:
        self._write(f"{self._text} ..." if self._live else f"{self._text} ... ")
        return self

    def at(self, doing: str, share: float | None = None) -> None:
        """What it does now, and which share of that is done."""
        now = time.monotonic()
        if not self._live or now - self._drawn < EVERY_S:
            return
        self._drawn = now
        if share is None:
            progress = f"{now - self._begun:3.0f} s "
        else:
            full = round(BAR * share)
            progress = f"[{'#' * full}{'-' * (BAR - full)}] {100 * share:3.0f} % "
        self._write(f"{self._text}: {progress} {doing}")

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        result = "failed" if kind else f"{time.monotonic() - self._begun:.0f} s"
        if self._live:
            self._write(f"{self._text}: {result}")
        print("" if self._live else result, flush=True)

    def _write(self, line: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            line = f"\r\033[K{line[:width]}"
        print(line, end="", flush=True)
