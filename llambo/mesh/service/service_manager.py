"""What systemd, or another service manager, hands to a service and is sent by it.

**sd_notify**: lines over the socket that NOTIFY_SOCKET names. There may be no manager, and it may be slow. The loop of
the service never waits for it: lines that the socket does not take now are stored, the latest of each name, and are
sent with the next ones.

**Socket activation**: listening sockets that the manager has opened, and keeps open while the service restarts. It
passes descriptors from 3 on, their number in LISTEN_FDS, the process they are for in LISTEN_PID, and their names in
LISTEN_FDNAMES. A broker needs four, at four ports in a row. Their names (`FileDescriptorName=clients`, `workers`,
`tokens-in`, `tokens-out`) show which is which, or, if one unit has all of them and they have no such names, the order
of their ports. Connections that are made while no broker runs wait in the kernel: none is refused.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass

from llambo.mesh.link import sockets
from llambo.mesh.service.notify_core import Condition, NotifyCore
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.timers import NEVER_MS

log = logging.getLogger(__name__)

# --- sd_notify -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Manager:
    """Its address, as `socket.sendto` takes it, and the watchdog period; 0: there is no watchdog."""

    address: str
    watchdog_ms: int = 0


def manager(environ: MutableMapping[str, str], pid: int) -> Manager | None:
    """The service manager that wants notifications. Removes the variables, so that child processes do not notify it."""
    path, period, watched_pid = [environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")]
    if not path:
        return None
    if path[0] not in "/@" or len(path) < 2:
        log.warning("NOTIFY_SOCKET is %r, which is not a Unix socket: the service manager gets no notifications", path)
        return None
    address = "\0" + path[1:] if path[0] == "@" else path
    # Without WATCHDOG_PID the watchdog is for every process that reads the variable.
    watched = period.isdecimal() and watched_pid in ("", str(pid))
    return Manager(address, int(period) // 1_000 if watched else 0)


def message(lines: Iterable[str]) -> bytes:
    return "\n".join(lines).encode("utf-8", "replace")


class Notifier:
    """A NotifyCore and the socket its lines are sent to. Without a manager it does nothing."""

    def __init__(self, manager: Manager | None = None) -> None:
        self.manager = manager
        self._core = NotifyCore(manager.watchdog_ms if manager is not None else 0)
        #: The latest line of each name.
        self._unsent: dict[str, str] = {}
        self._warned = False
        self._socket: socket.socket | None = None
        if manager is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    def next_wakeup_ms(self) -> int:
        return NEVER_MS if self._socket is None else self._core.next_wakeup_ms()

    def update_soon(self) -> None:
        self._core.update_soon()

    def update(self, condition: Condition, now_ms: int) -> None:
        if self._socket is None or self.manager is None:
            return
        for line in self._core.update(condition, now_ms):
            self._unsent[line.partition("=")[0]] = line
        if not self._unsent:
            return
        try:
            self._socket.sendto(message(self._unsent.values()), self.manager.address)
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning("cannot notify the service manager: %s", error.strerror)
            return
        self._unsent.clear()
        self._warned = False

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


# --- socket activation ---------------------------------------------------------------------------------

FIRST_FD = 3
#: Names of the four sockets, in the order of their ports.
NAMES = ("clients", "workers", "tokens-in", "tokens-out")


@dataclass(frozen=True, slots=True)
class Inherited:
    """The address of the sockets, and their descriptors in the order of the ports."""

    host: str
    port: int
    descriptors: tuple[int, int, int, int]


def inherited(environ: MutableMapping[str, str], pid: int, first_fd: int = FIRST_FD) -> Inherited | None:
    """The sockets that are passed to this process, if there are any. Removes the variables."""
    for_pid, count, fd_names = [environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")]
    if for_pid != str(pid) or not count.isdigit() or count == "0":
        return None
    descriptors = range(first_fd, first_fd + int(count))
    names = fd_names.split(":") if fd_names else []
    places = [(_place(descriptor), descriptor) for descriptor in descriptors]
    if set(names) & set(NAMES):
        if sorted(names) != sorted(NAMES):
            raise _wrong(f"have the names {', '.join(names)}, and not {', '.join(NAMES)}")
        places = [places[names.index(name)] for name in NAMES]
    else:
        places.sort(key=lambda entry: entry[0][1])
    host, port = places[0][0]
    if len(places) != len(NAMES) or [place for place, _ in places] != [(host, port + n) for n in range(len(NAMES))]:
        where = ", ".join(sockets.endpoint(*place) for place, _ in places)
        raise _wrong(f"are {where}; four ports in a row of one address are needed")
    for _, descriptor in places:
        os.set_inheritable(descriptor, False)
    first, second, third, fourth = (descriptor for _, descriptor in places)
    return Inherited(host, port, (first, second, third, fourth))


def _place(descriptor: int) -> tuple[str, int]:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as found:
            listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listens and found.family in (socket.AF_INET, socket.AF_INET6):
                name = found.getsockname()
                return str(name[0]), int(name[1])
    except OSError as error:
        raise _wrong(f"are not there: descriptor {descriptor}: {error.strerror}") from error
    raise _wrong("are not all listening TCP sockets")


def _wrong(what: str) -> LlamboError:
    return LlamboError(Code.BAD_SETTING, f"the sockets passed in LISTEN_FDS {what}")
