"""Listening sockets that somebody else has opened for us, and keeps open while we are restarted.

systemd calls it socket activation: it hands over descriptors from 3 on, their number in LISTEN_FDS, for whom they are
in LISTEN_PID, and their names in LISTEN_FDNAMES. A broker needs four, at four ports in a row. What each is for is told
by its name (`FileDescriptorName=clients`, `workers`, `tokens-in`, `tokens-out`), or, if they have no such names since
they are all of one unit, by the order of their ports.

Connections that are made while no broker is there wait in the kernel: nobody is refused.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

from llambo.mesh.link import sockets
from llambo.mesh.wire.errors import Code, LlamboError

FIRST_FD = 3
#: Names of the four sockets, in the order of their ports.
NAMES = ("clients", "workers", "tokens-in", "tokens-out")


@dataclass(frozen=True, slots=True)
class Inherited:
    """Where they listen, and the descriptors, by their distance from the first port."""

    host: str
    port: int
    descriptors: tuple[int, int, int, int]


def inherited(environ: MutableMapping[str, str], pid: int, first_fd: int = FIRST_FD) -> Inherited | None:
    """The sockets that are meant for this process, if there are any. The variables are used up by that."""
    told = [environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")]
    if told[0] != str(pid) or not told[1].isdigit() or told[1] == "0":
        return None
    descriptors = range(first_fd, first_fd + int(told[1]))
    names = told[2].split(":") if told[2] else []
    places = [(_place(descriptor), descriptor) for descriptor in descriptors]
    if set(names) & set(NAMES):
        if sorted(names) != sorted(NAMES):
            raise _wrong(f"are called {', '.join(names)}, and not {', '.join(NAMES)}")
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
        with socket.socket(fileno=os.dup(descriptor)) as there:
            listens = there.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listens and there.family in (socket.AF_INET, socket.AF_INET6):
                name = there.getsockname()
                return str(name[0]), int(name[1])
    except OSError as error:
        raise _wrong(f"are not there: descriptor {descriptor}: {error.strerror}") from error
    raise _wrong("are not all TCP sockets that listen")


def _wrong(what: str) -> LlamboError:
    return LlamboError(Code.BAD_SETTING, f"the sockets handed over in LISTEN_FDS {what}")
