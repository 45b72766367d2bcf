"""The agent's end of the engine child: a process and a pipe, both of which may fail, neither of which may block."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import Any

from llambo.mesh.security.keys import CREDENTIALS_ENV, KEY_ENV
from llambo.worker.engine import protocol as proto

#: What the child runs.
MODULE = "llambo.worker.engine_child"
#: Bytes taken from the pipe before the sockets get a turn.
READ_BYTES = 64 * 1024
#: A process does not do this to itself: a person, a supervisor, or the kernel for want of memory.
FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
#: How long a process that was killed, or closed its pipe, may take to be gone.
REAP_S = 10.0


#: Variables that hold a key, or say where one is.
SECRETS = (KEY_ENV, CREDENTIALS_ENV)


class EngineProcess:
    """One engine child, from its start until it is reaped."""

    def __init__(self, configure: proto.Configure, worker: str = "") -> None:
        """`worker`: whose engine it is, for its lines in the log."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        command = [sys.executable, "-m", MODULE]
        with theirs:
            self._process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno()), "--parent", str(os.getpid()), "--worker", worker],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # What a hostile model might make of the engine is not to find our key in its environment.
                env={name: value for name, value in os.environ.items() if name not in SECRETS},
            )
        self._pipe = ours
        self._unpacker = proto.from_engine()
        self._pending = bytearray()
        self.pid = self._process.pid
        self.order(configure)

    def fileno(self) -> int:
        return self._pipe.fileno()

    @property
    def wants_to_write(self) -> bool:
        return bool(self._pending)

    def order(self, message: proto.EngineMessage) -> None:
        self._pending += proto.pack(message)

    def push(self) -> None:
        """Hand over what the pipe takes now. A dead engine is noticed by reading, not here."""
        try:
            while self._pending:
                sent = self._pipe.send(self._pending)
                del self._pending[:sent]
        except BlockingIOError:
            return
        except OSError:
            self._pending.clear()

    def read(self) -> list[Any] | None:
        """What it said; None: it is gone. Raises BadFrame."""
        try:
            data = self._pipe.recv(READ_BYTES)
        except BlockingIOError:
            return []
        except ConnectionError:
            return None
        return self._unpacker.feed(data) if data else None

    def kill(self) -> None:
        """By its own process id, which cannot be another's until it was reaped."""
        self._process.kill()

    def close_pipe(self) -> None:
        """The gentle way to end it: the child leaves when its pipe is closed."""
        self._pipe.close()

    def reap(self) -> tuple[str, bool]:
        """Make sure that it is gone; how it went, for people, and whether it was ended from outside.

        One that has closed its pipe is past being killed: the signal that is sent here does not show.
        """
        self.kill()
        code = self._process.wait(timeout=REAP_S)
        self._pipe.close()
        if code >= 0:
            return f"the engine exited with status {code}", False
        return f"the engine was ended by {signal.Signals(-code).name}", -code in FROM_OUTSIDE
