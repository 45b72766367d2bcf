"""The three standard streams, which a process may be started without; what may be written to them; where its log goes.

A descriptor that is closed is given to whatever is opened next: a socket that became number 2 would be written to
as if it were stderr. So /dev/null takes each empty place before anything else can.

A terminal obeys control characters, and most of what a command prints was chosen by others: names of clients, workers
and models, texts of errors, answers. So stdout and stderr replace every control character that is written to them. The
few places that draw (colours, a line that changes) use `paint`, for which they filter what others chose themselves.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

import click

from llambo.mesh.wire.errors import CONTROLS, printable

#: What a write fails with when there is no room for it.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
#: Receive the lines of `print_notice` in place of stderr: the journal, if that is where stderr leads.
NOTICE_SINKS: list[Callable[[str], None]] = []


def fill_closed_streams() -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
    # For one that was closed when Python started, it has None.
    for name, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


class FilteredText:
    """A text stream that replaces control characters. Whatever else it is asked, the stream itself answers."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._stream.write(printable(text))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def paint(self, drawn: str) -> int:
        return self._stream.write(drawn)


def filter_streams() -> None:
    """From now on nothing is written to stdout and stderr that a terminal would obey, also not by a traceback."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, FilteredText):
            continue
        if codecs.lookup(stream.encoding or "ascii").name == "ascii" and hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8")  # otherwise click does it, with a stream of its own over the bytes
        setattr(sys, name, cast(TextIO, FilteredText(stream)))
    # From Python 3.13 on its own hook writes colours, which would be replaced, too; this function does not.
    sys.excepthook = traceback.print_exception


def paint(drawn: str, *, err: bool = False) -> None:
    """Write text with control sequences of our own, which only a terminal gets."""
    stream = sys.stderr if err else sys.stdout
    text = drawn if stream.isatty() else click.unstyle(drawn)
    (stream.paint if isinstance(stream, FilteredText) else stream.write)(text)
    stream.flush()


def drawing() -> TextIO:
    """stderr for what draws itself, and filters what others chose itself."""
    stream = sys.stderr
    return stream._stream if isinstance(stream, FilteredText) else stream


def print_output(text: str) -> None:
    """Write a line that a model wrote. A file or a pipe gets it as it is."""
    stream = sys.stdout
    if isinstance(stream, FilteredText) and not stream.isatty():
        stream.paint(f"{text}\n")
        stream.flush()
    else:
        click.echo(text)


_ESCAPES = {code: f"\\u{code:04x}" for code in CONTROLS}


def json_text(value: object, indent: int | None = None) -> str:
    """JSON in which control characters are escapes: a terminal obeys none, and a parser reads the same text."""
    return json.dumps(value, indent=indent, ensure_ascii=False).translate(_ESCAPES)


def print_notice(text: str, *, err: bool = True) -> None:
    """Write a line for the operator of a process whose work goes on whether or not it is read.

    The disk may be full, the terminal or the reader of a pipe gone; then the line is lost, and the work goes on.
    """
    for sink in NOTICE_SINKS:
        sink(text)
    if not NOTICE_SINKS:
        with contextlib.suppress(OSError):
            click.echo(text, err=err)


def flush_or_silence() -> None:
    """At the end: what could not be written is tried once more, and then dropped."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            silence(stream.fileno())


def silence(descriptor: int) -> None:
    """Send it to /dev/null. Otherwise the flush at the exit of Python fails again, and prints a traceback."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def cannot_write(error: OSError, program: str) -> None:
    """One line about a full disk, if stderr can still be written."""
    with contextlib.suppress(OSError, ValueError):
        silence(sys.stdout.fileno())
    try:
        click.echo(f"{program}: cannot write: {error.strerror}", err=True)
    except OSError:
        silence(sys.stderr.fileno())


# --- the log -------------------------------------------------------------------------------------------

#: Fields of each entry in the journal: the name of the worker, once it is known.
ABOUT: dict[str, str] = {}


def set_up_log(level: str, environ: Mapping[str, str] = os.environ) -> None:
    """For people to stderr; for the journal into its socket, with fields."""
    from llambo.mesh.service import journal

    root = logging.getLogger()
    if root.handlers:
        return  # set up already, as by a test
    if journal.is_journal(environ, sys.stderr.fileno()):
        handler: logging.Handler = (entries := journal.JournalHandler(_program(), sys.stderr, ABOUT))
        NOTICE_SINKS.append(entries.show)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(journal.HumanFormatter())
    root.addHandler(handler)
    root.setLevel(level)


def _program() -> str:
    context = click.get_current_context(silent=True)
    name = context.find_root().info_name if context is not None else None
    return Path(name or "llambo").name
