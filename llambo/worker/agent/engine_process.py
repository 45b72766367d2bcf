"""The engine child as the agent's shell sees it: a process and a pipe. Both may fail, neither may block."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import Any

from llambo.mesh.security.keys import CREDENTIALS_ENV, KEY_ENV
from llambo.worker.engine import protocol as proto

#: The module that the child runs.
MODULE = "llambo.worker.engine_child"
#: Bytes taken from the pipe before the sockets get a turn.
READ_BYTES = 64 * 1024
#: Signals that come from a person, a supervisor, or the kernel when memory runs out.
SIGNALS_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
#: How long a process that was killed, or closed its pipe, may take to be gone.
REAP_S = 10.0
#: Environment variables that hold a key, or say where one is.
SECRETS = (KEY_ENV, CREDENTIALS_ENV)


class EngineProcess:
    """One engine child, from its start until it is reaped."""

    def __init__(self, configure: proto.Configure, worker: str = "") -> None:
        """`worker`: the name of the worker, for the log of the engine."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        command = [sys.executable, "-m", MODULE]
        with theirs:
            self._process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno()), "--parent", str(os.getpid()), "--worker", worker],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # A hostile model that takes over the engine must not find our key in its environment.
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
        """Write as much as the pipe takes now. That the engine has died is detected by reading, not here."""
        try:
            while self._pending:
                sent = self._pipe.send(self._pending)
                del self._pending[:sent]
        except BlockingIOError:
            return
        except OSError:
            self._pending.clear()

    def read(self) -> list[Any] | None:
        """The messages that have arrived; None: the engine is gone. Raises BadFrame."""
        try:
            data = self._pipe.recv(READ_BYTES)
        except BlockingIOError:
            return []
        except ConnectionError:
            return None
        return self._unpacker.feed(data) if data else None

    def kill(self) -> None:
        """Safe until it was reaped: until then no other process can have its id."""
        self._process.kill()

    def close_pipe(self) -> None:
        """The child exits when its pipe is closed."""
        self._pipe.close()

    def reap(self) -> tuple[str, bool]:
        """Wait until it is gone. Returns how it ended, for people, and whether it was ended from outside.

        A process that has closed its pipe is exiting already, so the signal sent here does not change its status.
        """
        self.kill()
        code = self._process.wait(timeout=REAP_S)
        self._pipe.close()
        if code >= 0:
            return f"the engine exited with status {code}", False
        return f"the engine was ended by {signal.Signals(-code).name}", -code in SIGNALS_FROM_OUTSIDE
