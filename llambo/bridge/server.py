"""The bridge: accepts connections, counts them, and shuts down in good order. One mesh client serves them all.

At the end of the file: the listening socket, which other users cannot open at any moment.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llambo.bridge import protocol
from llambo.bridge.connection import Connection, ConnectionLimits
from llambo.bridge.holds import Holds
from llambo.mesh.client.client import Client
from llambo.mesh.wire.errors import Code, ErrorInfo, LlamboError

#: At the end of a shutdown, how long a peer has to read the last replies.
LAST_READ_S = 1.0


@dataclass(frozen=True, slots=True)
class BridgeLimits:
    connections: int = 256
    #: How long answers under way have to finish when the bridge stops.
    leave_ms: int = 10_000


class Bridge:
    def __init__(
        self, client: Client, listener: Listener, connection_limits: ConnectionLimits, limits: BridgeLimits
    ) -> None:
        self.client = client
        self.connection_limits = connection_limits
        self.holds = Holds(client)
        self._listener = listener
        self._limits = limits
        self._connections: dict[int, Connection] = {}
        self._empty, self._stopped, self._hurried = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._empty.set()
        # Connections are registered for no events: epoll then still reports, once, that a peer has closed its socket,
        # which reading does not show while nothing is read. On TCP it reports only a reset; there a closed peer looks
        # like one that has ended its output, until something is written.
        self._hang_ups = select.epoll()

    async def run(self, on_listening: Callable[[], None]) -> None:
        """Serve until `stop`. Answers under way may then finish, for a time; a second `stop` ends that time."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._hang_ups.fileno(), self._find_hang_ups)
        server = await loop.create_server(lambda: _Arrival(self._protocol), sock=self._listener.socket, backlog=BACKLOG)
        try:
            on_listening()
            await self._stopped.wait()
        finally:
            # First the file: while this process listens, another bridge refuses to take the path.
            self._listener.remove_file()
            server.close()
            await self._close_connections()
            await self.holds.close()
            loop.remove_reader(self._hang_ups.fileno())
            self._hang_ups.close()

    def stop(self) -> None:
        if self._stopped.is_set():
            self._hurried.set()
        self._stopped.set()

    def numbers(self) -> dict[str, int]:
        answers = sum(connection.answers for connection in self._connections.values())
        return {"connections": len(self._connections), "answers": answers}

    # --- called by connections -----------------------------------------------------------------------------

    def joined(self, connection: Connection, descriptor: int) -> None:
        self._connections[descriptor] = connection
        self._empty.clear()
        self._hang_ups.register(descriptor, select.EPOLLONESHOT)
        if self._stopped.is_set():
            connection.stop()

    def left(self, descriptor: int) -> None:
        del self._connections[descriptor]
        self._hang_ups.unregister(descriptor)
        if not self._connections:
            self._empty.set()

    # --- connections ---------------------------------------------------------------------------------------

    def _protocol(self) -> asyncio.Protocol:
        if len(self._connections) >= self._limits.connections:
            return _Refusal(self._limits.connections)
        return Connection(self)

    def _find_hang_ups(self) -> None:
        for descriptor, _ in self._hang_ups.poll(0):
            self._connections[descriptor].hang_up()

    async def _close_connections(self) -> None:
        for connection in list(self._connections.values()):
            connection.stop()
        await self._until_empty(self._limits.leave_ms / 1_000)
        for connection in list(self._connections.values()):
            connection.cut_short()
        await self._until_empty(LAST_READ_S)
        for connection in list(self._connections.values()):
            connection.abort()
        await self._empty.wait()

    async def _until_empty(self, timeout_s: float) -> None:
        waiting = [asyncio.ensure_future(event.wait()) for event in (self._empty, self._hurried)]
        await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for each in waiting:
            each.cancel()


class _Arrival(asyncio.Protocol):
    """A connection that was accepted. Its protocol is chosen when it is made, which is when it is counted.

    asyncio creates the protocols of all connections that wait in the backlog before it makes the first of them.
    """

    def __init__(self, choose: Callable[[], asyncio.Protocol]) -> None:
        self._choose = choose

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        protocol = self._choose()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


class _Refusal(asyncio.Protocol):
    """Of a connection above the limit."""

    def __init__(self, connections: int) -> None:
        self._connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        text = f"{self._connections} connections are open, which is the limit"
        transport.write(protocol.encode_line(protocol.error_reply(ErrorInfo(Code.OVER_LIMIT, text))))
        transport.close()


# --- The listening socket, which other users cannot open at any moment. ---
#
# A Unix socket gets its mode before it gets its name. A socket file that a dead bridge has left is replaced. A socket
# that accepts connections, and anything that is not a socket, is left alone and refused. Checking and binding happen
# under a lock on the folder: of two bridges that start at the same time, one gets the path and the other an error.

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
