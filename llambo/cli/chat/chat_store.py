"""Chats as files: one JSON file each, in a folder of the person's own, readable by nobody else.

A file is written whole and put in place by a rename, so that a crash leaves the old one or the new one. One that
cannot be read is said and left alone. Whoever has a chat open holds a lock on it, so that two terminals do not
overwrite each other's turns.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llambo.cli.chat.chat_session import FORMAT, NAME_RULE, Session, is_name
from llambo.mesh.wire.errors import Code, LlamboError

ENDING = ".json"
LOCK = ".lock"
#: Nobody has typed this much.
FILE_BYTES = 64 * 1024 * 1024

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Session).decode


class Damaged(Exception):
    """A file that is there and cannot be read; the text says why."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file of the folder. With a `problem` there is no session."""

    name: str
    session: Session | None = None
    problem: str = ""


def state_folder(environ: Mapping[str, str]) -> Path:
    home = environ.get("XDG_STATE_HOME") or os.path.join(environ.get("HOME", "/"), ".local", "state")
    return Path(home, "llambo")


class Store:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock_file = -1

    def path(self, name: str) -> Path:
        if not is_name(name):
            raise LlamboError(Code.BAD_REQUEST, f"{name!r} is no name of a session: {NAME_RULE}")
        return self.folder / f"{name}{ENDING}"

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def names(self) -> list[str]:
        try:
            files = [path for path in self.folder.iterdir() if path.suffix == ENDING]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LlamboError(Code.BAD_SETTING, f"{self.folder} cannot be read: {error.strerror}") from error
        return sorted(path.stem for path in files if is_name(path.stem))

    def all(self) -> Iterator[Found]:
        for name in self.names():
            try:
                session = self._read(name)
            except Damaged as error:
                yield Found(name, problem=str(error))
            else:
                if session is not None:
                    yield Found(name, session)

    def load(self, name: str) -> Session | None:
        """None: there is none of this name."""
        try:
            return self._read(name)
        except Damaged as error:
            text = f"{self.path(name)} cannot be read: {error}; it is left as it is, take another name"
            raise LlamboError(Code.BAD_SETTING, text) from error

    def save(self, session: Session) -> Path:
        path = self.path(session.name)
        part = self.folder / f".{session.name}.{os.getpid()}.part"
        try:
            self._make_folder()
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.format(_encode(session), indent=1))
                file.flush()
                os.fsync(descriptor)
            part.rename(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise LlamboError(Code.BAD_SETTING, f"{path} cannot be written: {error.strerror}") from error
        return path

    def delete(self, name: str) -> bool:
        try:
            self.path(name).unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise LlamboError(Code.BAD_SETTING, f"{self.path(name)} cannot be removed: {error.strerror}") from error
        return True

    # --- going on elsewhere ----------------------------------------------------------------------------

    def open(self, name: str, now_s: int) -> Session:
        """The session of this name, which is ours now; a new one, if there is none yet."""
        self.take(name)
        try:
            return self.load(name) or Session(name=name, created=now_s, used=now_s)
        except LlamboError:
            self.give_back(name)
            raise

    def change(self, before: str, name: str, now_s: int) -> Session:
        session = self.open(name, now_s)
        self.give_back(before)
        return session

    def keep_as(self, session: Session, name: str) -> tuple[Session, Path]:
        """What had a name that was made up is renamed, anything else is copied."""
        before = session.name
        if name == before:
            kept = msgspec.structs.replace(session, unnamed=False)
            return kept, self.save(kept)
        self.take(name)
        try:
            if self.exists(name):
                raise LlamboError(Code.BAD_REQUEST, f"there is a session called {name} already; take another name")
            kept = msgspec.structs.replace(session, name=name, unnamed=False)
            path = self.save(kept)
        except LlamboError:
            self.give_back(name)
            raise
        if session.unnamed:
            self.delete(before)
        self.give_back(before)
        return kept, path

    # --- one at a time ---------------------------------------------------------------------------------

    def take(self, name: str) -> None:
        """Until this process ends or gives it back, nobody else has this session open."""
        self._at(fcntl.LOCK_EX | fcntl.LOCK_NB, name)

    def give_back(self, name: str) -> None:
        self._at(fcntl.LOCK_UN, name)

    def close(self) -> None:
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1

    def _at(self, kind: int, name: str) -> None:
        # One file for all of them, and in it a byte for each name: no lock file is ever left over.
        try:
            if self._lock_file < 0:
                self._make_folder()
                self._lock_file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            fcntl.lockf(self._lock_file, kind, 1, zlib.crc32(name.encode()))
        except (BlockingIOError, PermissionError) as error:
            if self._lock_file < 0:
                raise self._no_folder(error) from error
            raise LlamboError(Code.BAD_SETTING, f"the session {name} is open in another `llambo chat`") from error
        except OSError as error:
            raise self._no_folder(error) from error

    # --- inside ----------------------------------------------------------------------------------------

    def _no_folder(self, error: OSError) -> LlamboError:
        return LlamboError(Code.BAD_SETTING, f"{self.folder} cannot be used: {error.strerror}")

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_mode & 0o077:
            self.folder.chmod(0o700)

    def _read(self, name: str) -> Session | None:
        path = self.path(name)
        try:
            with path.open("rb") as file:
                data = file.read(FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Damaged(error.strerror or str(error)) from error
        if len(data) > FILE_BYTES:
            raise Damaged(f"it has more than {FILE_BYTES} bytes")
        try:
            session = _decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Damaged(f"it is no saved chat: {error}") from error
        if session.format != FORMAT:
            raise Damaged(f"it is of format {session.format}, and this release reads format {FORMAT}")
        if not 0 <= session.context_from <= len(session.turns):
            raise Damaged(f"it has {len(session.turns)} turns and begins at {session.context_from}")
        # The name is that of the file, whoever has renamed it.
        return msgspec.structs.replace(session, name=name)
