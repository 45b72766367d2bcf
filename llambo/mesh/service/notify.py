"""sd_notify: words for the service manager that has started us, over the socket that NOTIFY_SOCKET names.

The manager need not be there, and may be slow. A word is never worth waiting for: what the socket does not take now
is kept, the last of each kind, and goes along with the next.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass

from llambo.mesh.service.notify_core import Condition, NotifyCore
from llambo.mesh.wire.timers import NEVER_MS

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Manager:
    """Where it listens, as `socket.sendto` takes it, and how long it waits for a word; 0: it does not watch."""

    address: str
    watchdog_ms: int = 0


def manager(environ: MutableMapping[str, str], pid: int) -> Manager | None:
    """Whoever wants to hear from this process. The variables are used up: our children are not to speak for us."""
    said, period, meant = [environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")]
    if not said:
        return None
    if said[0] not in "/@" or len(said) < 2:
        log.warning("NOTIFY_SOCKET is %r, which is no Unix socket: nobody is told how this service is", said)
        return None
    address = "\0" + said[1:] if said[0] == "@" else said
    # Without WATCHDOG_PID it is meant for whoever reads it.
    watched = period.isdecimal() and meant in ("", str(pid))
    return Manager(address, int(period) // 1_000 if watched else 0)


def message(words: Iterable[str]) -> bytes:
    return "\n".join(words).encode("utf-8", "replace")


class Notifier:
    """A NotifyCore and the socket its words go to. Without a manager it costs nothing and says nothing."""

    def __init__(self, manager: Manager | None = None) -> None:
        self.manager = manager
        self._core = NotifyCore(manager.watchdog_ms if manager is not None else 0)
        #: By its name, the last of each.
        self._unsent: dict[str, str] = {}
        self._complained = False
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
        for word in self._core.update(condition, now_ms):
            self._unsent[word.partition("=")[0]] = word
        if not self._unsent:
            return
        try:
            self._socket.sendto(message(self._unsent.values()), self.manager.address)
        except OSError as error:
            if not self._complained:
                self._complained = True
                log.warning("the service manager cannot be told how this service is: %s", error.strerror)
            return
        self._unsent.clear()
        self._complained = False

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
