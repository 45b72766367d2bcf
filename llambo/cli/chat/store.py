"""The saved chats: one JSON file each, in a folder that only its owner can read.

A file is written whole and put in place by a rename, so a crash leaves either the old one or the new one. A file that
cannot be read is reported and left unchanged. An open chat is locked, so that two terminals do not overwrite each
other's turns.
"""

from __future__ import annotations

import fcntl
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError

#: Files of another format are left unchanged.
FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
NAME_RULE = "letters, digits, `_`, `-` and `.`, at most 64 of them, and neither `.` nor `-` first"
SUFFIX = ".json"
LOCK = ".lock"
#: A file that is larger is not read.
FILE_BYTES = 64 * 1024 * 1024
#: Characters that a search shows on either side of a match.
CONTEXT_CHARS = 30

#: What helps where nothing can be saved.
PRIVATE = "`llambo chat --private` saves nothing"

#: Why an answer ended. `stopped`: by the user of this chat; `cancelled`: by another client.
Ending = Literal["stop", "length", "stopped", "cancelled", "deadline", "failed"]
MARKS = {"stop": "", "length": "cut", "deadline": "out of time"}
Seconds = Annotated[int, Meta(ge=0, le=2**53)]


class Turn(msgspec.Struct, frozen=True, omit_defaults=True):
    """A question and its answer. A turn without an answer is saved, but never sent to a model."""

    question: str
    answer: str = ""
    ending: Ending = "stop"
    #: When it was asked, in seconds since 1970.
    at: Seconds = 0
    model: str = ""
    tokens: int = 0

    @property
    def mark(self) -> str:
        """Shown after an answer that is not complete."""
        return MARKS.get(self.ending, self.ending)


class SavedChat(msgspec.Struct, frozen=True):
    name: str = ""
    format: int = FORMAT
    created: Seconds = 0
    used: Seconds = 0
    #: The model to ask; empty: the only one that is served.
    model: Annotated[str, Meta(max_length=limits.NAME_CHARS)] = ""
    system: Annotated[str, Meta(max_length=limits.SYSTEM_CHARS)] = ""
    #: The name was generated, not chosen.
    unnamed: bool = False
    #: Turns before this one are in the file, but are no longer sent to the model.
    context_from: Annotated[int, Meta(ge=0)] = 0
    turns: list[Turn] = []

    @property
    def current(self) -> list[Turn]:
        return self.turns[self.context_from :]


def is_name(text: str) -> bool:
    return NAME.fullmatch(text) is not None


def matches(turns: list[Turn], text: str) -> Iterator[tuple[int, str]]:
    """The number of each turn that contains the text, in any case, and an excerpt around it."""
    wanted = re.compile(re.escape(text), re.IGNORECASE)
    for number, turn in enumerate(turns, 1):
        for role, content in (("you", turn.question), ("model", turn.answer)):
            if found := wanted.search(content):
                first, last = max(0, found.start() - CONTEXT_CHARS), min(len(content), found.end() + CONTEXT_CHARS)
                before, after = "…" if first else "", "…" if last < len(content) else ""
                yield number, f"{role}: {before}{one_line(content[first:last])}{after}"


def one_line(text: str, most: int = 0) -> str:
    line = " ".join(text.split())
    return f"{line[: most - 1]}…" if most and len(line) > most else line


@dataclass(frozen=True, slots=True)
class ChatFile:
    """A file of the folder. If it has a `problem` there is no chat."""

    name: str
    chat: SavedChat | None = None
    problem: str = ""


class Store:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock_file = -1

    def path(self, name: str) -> Path:
        if not is_name(name):
            raise LlamboError(Code.BAD_REQUEST, f"{name!r} is not a valid name of a session: {NAME_RULE}")
        return self.folder / f"{name}{SUFFIX}"

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def names(self) -> list[str]:
        try:
            files = [path for path in self.folder.iterdir() if path.suffix == SUFFIX]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LlamboError(Code.BAD_SETTING, f"{self.folder} cannot be read: {error.strerror}") from error
        return sorted(path.stem for path in files if is_name(path.stem))

    def all(self) -> Iterator[ChatFile]:
        for name in self.names():
            try:
                chat = self.load(name)
            except LlamboError as error:
                yield ChatFile(name, problem=error.text)
            else:
                if chat is not None:
                    yield ChatFile(name, chat)

    def load(self, name: str) -> SavedChat | None:
        """None: there is no chat of this name."""
        path = self.path(name)
        try:
            with path.open("rb") as file:
                data = file.read(FILE_BYTES + 1)
            chat = msgspec.json.decode(data, type=SavedChat) if len(data) <= FILE_BYTES else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(path, error.strerror or str(error)) from error
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise _unreadable(path, f"it is not a saved chat: {error}") from error
        if chat is None:
            raise _unreadable(path, f"it has more than {FILE_BYTES} bytes")
        if chat.format != FORMAT:
            raise _unreadable(path, f"it has format {chat.format}, and this release reads format {FORMAT}")
        if not 0 <= chat.context_from <= len(chat.turns):
            raise _unreadable(path, f"it has {len(chat.turns)} turns and begins at {chat.context_from}")
        # The file may have been renamed: its name counts, not the one in it.
        return msgspec.structs.replace(chat, name=name)

    def save(self, chat: SavedChat) -> Path:
        path = self.path(chat.name)
        part = self.folder / f".{chat.name}.{os.getpid()}.part"
        try:
            self._make_folder()
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(chat), indent=1))
                file.flush()
                os.fsync(descriptor)
            part.rename(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise LlamboError(Code.BAD_SETTING, f"{path} cannot be written: {error.strerror}", hint=PRIVATE) from error
        return path

    def delete(self, name: str) -> bool:
        try:
            self.path(name).unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise LlamboError(Code.BAD_SETTING, f"{self.path(name)} cannot be removed: {error.strerror}") from error
        return True

    def open(self, name: str, now_s: int) -> SavedChat:
        """The chat of this name, locked; a new one if there is none yet."""
        self.lock(name)
        try:
            return self.load(name) or SavedChat(name=name, created=now_s, used=now_s)
        except LlamboError:
            self.unlock(name)
            raise

    def save_as(self, chat: SavedChat, name: str) -> tuple[SavedChat, Path]:
        """A chat with a generated name is renamed, any other is copied."""
        saved = msgspec.structs.replace(chat, name=name, unnamed=False)
        if name == chat.name:
            return saved, self.save(saved)
        self.lock(name)
        try:
            if self.exists(name):
                raise LlamboError(Code.BAD_REQUEST, f"there is a session called {name} already; use another name")
            path = self.save(saved)
        except LlamboError:
            self.unlock(name)
            raise
        if chat.unnamed:
            self.delete(chat.name)
        self.unlock(chat.name)
        return saved, path

    def lock(self, name: str) -> None:
        """Until `unlock`, or the end of this process, no other process can open this chat."""
        self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, name)

    def unlock(self, name: str) -> None:
        self._lock(fcntl.LOCK_UN, name)

    def close(self) -> None:
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1

    def _lock(self, kind: int, name: str) -> None:
        # One lock file for all chats, with a byte for each name: no lock file is ever left over.
        try:
            if self._lock_file < 0:
                self._make_folder()
                self._lock_file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            fcntl.lockf(self._lock_file, kind, 1, zlib.crc32(name.encode()))
        except OSError as error:
            if self._lock_file >= 0 and isinstance(error, (BlockingIOError, PermissionError)):
                raise LlamboError(Code.BAD_SETTING, f"the session {name} is open in another `llambo chat`") from error
            raise LlamboError(
                Code.BAD_SETTING, f"{self.folder} cannot be used: {error.strerror}", hint=PRIVATE
            ) from error  # fmt: skip

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_mode & 0o077:
            self.folder.chmod(0o700)


def _unreadable(path: Path, problem: str) -> LlamboError:
    return LlamboError(Code.BAD_SETTING, f"{path} cannot be read: {problem}; it is left as it is, use another name")
