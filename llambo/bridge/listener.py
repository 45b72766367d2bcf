"""The listening socket of the bridge, which other users cannot open at any moment.

A Unix socket gets its mode before it gets its name. A socket file that a dead bridge has left is replaced. A socket
that accepts connections, and anything that is not a socket, is left alone and refused. Checking and binding happen
under a lock on the folder: of two bridges that start at the same time, one gets the path and the other an error.
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
#: The longest path of a socket that the kernel accepts, without the NUL after it.
PATH_BYTES = 107
LOOPBACK = "127.0.0.1"


class Listener:
    """A listening socket and its place."""

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
        """A command that connects to it."""
        return f"nc {'-U ' if self.path is not None else ''}{self.where}"

    def remove_file(self) -> None:
        """Remove the socket file, unless another bridge has replaced it. Open connections stay open."""
        if self.path is not None and self._mark == _mark(self.path):
            with suppress(FileNotFoundError):
                self.path.unlink()

    def close(self) -> None:
        self.remove_file()
        self.socket.close()


def default_path(environ: Mapping[str, str]) -> Path:
    """In a folder where only this user can create files."""
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime, NAME)
    if os.geteuid() == 0:
        return Path("/run", NAME)
    return Path(environ.get("HOME", "/"), ".local", "state", "llambo", NAME)


def open_tcp(port: int) -> Listener:
    """On loopback, where every user of this machine can connect."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((LOOPBACK, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise LlamboError(Code.BAD_SETTING, f"cannot listen at {LOOPBACK} port {port}: {error.strerror}") from error
    return Listener(listening)


def open_unix(path: Path) -> Listener:
    path = Path(os.path.abspath(path))  # noqa: PTH100 - a later chdir changes nothing; symbolic links are not resolved
    if len(os.fsencode(path)) > PATH_BYTES:
        raise LlamboError(Code.BAD_SETTING, f"{path} is longer than the {PATH_BYTES} bytes a socket path may have")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.parent):
            _remove_dead_socket(path)
            return Listener(_bind(path), path)
    except OSError as error:
        raise LlamboError(Code.BAD_SETTING, f"cannot listen at {path}: {error.strerror}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise LlamboError(Code.BAD_SETTING, f"another process holds the lock on {folder}; try again") from error
    finally:
        os.close(descriptor)


def _remove_dead_socket(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise LlamboError(Code.BAD_SETTING, f"{path} exists, and is not a socket")
    if _is_alive(path):
        raise LlamboError(Code.BAD_SETTING, f"a bridge is already running at {path}")
    path.unlink()


def _is_alive(path: Path) -> bool:
    """True if a process listens there. A full queue proves that as well, and so does a missing permission."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
        return True


def _bind(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # bind() gives the file the mode of the descriptor, less the umask, so it is never more open than this.
        os.fchmod(listening.fileno(), MODE)
        listening.bind(str(path))
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def _mark(path: Path) -> tuple[int, int, int] | None:
    """Which file it is. The inode number alone is not enough: the next file may get the number of a deleted one."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns
