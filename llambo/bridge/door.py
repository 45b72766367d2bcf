"""The bridge's socket: made so that nobody else gets in, not even for a moment.

A Unix socket has its mode before it has its name. Where a dead bridge has left one it is replaced; where one is alive,
or where anything else is, it is left alone. Who looks and who binds holds a lock on the folder meanwhile, so that of
two bridges that begin at once one gets the place and the other one an answer.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from llambo.mesh.wire.errors import Code, LlamboError

NAME = "llambo-bridge.sock"
MODE = 0o600
BACKLOG = 1_024
#: What the kernel takes for the path of a socket, without the NUL behind it.
PATH_BYTES = 107
LOOPBACK = "127.0.0.1"


class Door:
    """A listening socket, and where it is."""

    def __init__(self, listening: socket.socket, path: Path | None = None) -> None:
        self.socket = listening
        self.path = path
        self._mark = _mark(path) if path is not None else None

    @property
    def where(self) -> str:
        if self.path is not None:
            return str(self.path)
        host, port = self.socket.getsockname()
        return f"{host} {port}"

    @property
    def hint(self) -> str:
        """How to get in."""
        return f"nc {'-U ' if self.path is not None else ''}{self.where}"

    def vanish(self) -> None:
        """Take the name away, unless it is somebody else's by now. Who has come in stays."""
        if self.path is not None and self._mark == _mark(self.path):
            with suppress(FileNotFoundError):
                self.path.unlink()

    def close(self) -> None:
        self.vanish()
        self.socket.close()


def default_path(environ: Mapping[str, str]) -> Path:
    """Where only this user can put something."""
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime, NAME)
    if os.geteuid() == 0:
        return Path("/run", NAME)
    return Path(environ.get("HOME", "/"), ".local", "state", "llambo", NAME)


def open_tcp(port: int) -> Door:
    """On loopback, where every user of this machine can come in."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((LOOPBACK, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise LlamboError(Code.BAD_SETTING, f"cannot listen at {LOOPBACK} port {port}: {error.strerror}") from error
    return Door(listening)


def open_unix(path: Path) -> Door:
    path = Path(os.path.abspath(path))  # noqa: PTH100 - it stays what it is if the folder is changed; links are kept
    if len(os.fsencode(path)) > PATH_BYTES:
        raise LlamboError(Code.BAD_SETTING, f"{path} is longer than the {PATH_BYTES} bytes that a socket's path may be")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone_in(path.parent):
            _make_way(path)
            return Door(_bound(path), path)
    except OSError as error:
        raise LlamboError(Code.BAD_SETTING, f"cannot listen at {path}: {error.strerror}") from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise LlamboError(Code.BAD_SETTING, f"something else holds the lock on {folder}; try again") from error
    finally:
        os.close(descriptor)


def _make_way(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise LlamboError(Code.BAD_SETTING, f"{path} is there already, and is no socket")
    if _answers(path):
        raise LlamboError(Code.BAD_SETTING, f"a bridge is running at {path} already")
    path.unlink()


def _answers(path: Path) -> bool:
    """Whether a process listens there. A queue that is full is a sign of life, and so is a door that is shut to us."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True


def _bound(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The file gets the mode of the descriptor, less the umask: it is never more open than this.
        os.fchmod(listening.fileno(), MODE)
        listening.bind(str(path))
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def _mark(path: Path) -> tuple[int, int, int] | None:
    """Which file it is. The number of one that is gone is given to the next one, so it takes the time as well."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns
