"""The prompt of a chat: editing, history, completion, several lines at once. The shell uses the history, too."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth, Output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.styles import Style

from llambo.mesh.wire.errors import printable

Names = Callable[[], Iterable[str]]

#: A history that grows beyond this loses its older half.
HISTORY_BYTES = 1024 * 1024


class _LineHistory(FileHistory):
    """The lines that were typed, in a file. A full disk costs only the memory of a line."""

    def __init__(self, path: Path, report: Callable[[OSError], None]) -> None:
        super().__init__(str(path))
        self._report: Callable[[OSError], None] | None = report

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string.encode(errors="replace").decode())
        except OSError as error:
            if self._report is not None:
                self._report(error)
            self._report = None  # once is enough


def open_history(path: Path | None, report: Callable[[OSError], None]) -> History:
    """None: in memory only. `report` is called if the file cannot be used."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600))
        _shorten(path)
    except OSError as error:
        report(error)
        return InMemoryHistory()
    return _LineHistory(path, report)


def _shorten(path: Path) -> None:
    data = path.read_bytes()
    if len(data) > HISTORY_BYTES:
        newer = data[-HISTORY_BYTES // 2 :]
        part = path.with_name(f".{path.name}.{os.getpid()}")
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
            # Each entry begins with a comment that has its time.
            file.write(newer[max(0, newer.find(b"\n# ")) :])
        part.rename(path)


class ChatCompleter(Completer):
    """Completes commands and the names behind them; nothing in a question."""

    def __init__(self, commands: Mapping[str, str], names: Mapping[str, Names]) -> None:
        """`commands`: their help by their names. `names`: what can stand behind a command."""
        self._commands = commands
        self._names = names

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        command, space, argument = text[1:].partition(" ")
        if not space:
            for name, help in self._commands.items():
                if name.startswith(command):
                    yield Completion(name, -len(command), display=f"/{name}", display_meta=help)
        elif (names := self._names.get(command)) is not None:
            for name in names():
                if name.startswith(argument):
                    yield Completion(name, -len(argument))


def _keys() -> KeyBindings:
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # and not the search field of Ctrl-R

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _FilteredOutput(Vt100_Output):
    """Texts have no control characters in them; the library writes its own with `write_raw`, and carriage returns."""

    def write(self, data: str) -> None:
        super().write("\r".join(map(printable, data.split("\r"))))


def terminal_output() -> Output | None:
    """Of a prompt: stdout, or stderr if that is the terminal. None: there is no terminal, and the library decides."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            return _FilteredOutput.from_pty(stream, term=os.environ.get("TERM"))
    return None


class ChatPrompt:
    def __init__(self, history: History, completer: Completer, aside: Callable[[], str], *, colours: bool) -> None:
        """`aside`: a notice at the right of the line."""
        self._session: PromptSession[str] = PromptSession(
            history=history,
            completer=completer,
            output=terminal_output(),
            complete_while_typing=True,
            key_bindings=_keys(),
            multiline=True,
            reserve_space_for_menu=5,
            prompt_continuation=lambda width, number, wrapped: ". ".rjust(width),
            rprompt=lambda: FormattedText([("class:aside", aside())]),
            color_depth=None if colours else ColorDepth.DEPTH_1_BIT,
            style=Style.from_dict({"prompt": "bold ansigreen", "aside": "ansiyellow"}),
        )

    async def line(self) -> str | None:
        """What was typed. None: Ctrl-C; EOFError: Ctrl-D."""
        try:
            return await self._session.prompt_async(FormattedText([("class:prompt", "> ")]), handle_sigint=False)
        except KeyboardInterrupt:
            return None

    def refresh(self) -> None:
        """The notice has changed."""
        self._session.app.invalidate()
