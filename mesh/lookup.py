"""Looking up the names of brokers, which may take seconds, without holding up whoever waits for it."""

from __future__ import annotations

import contextlib
import os
import threading

from llambo.mesh import sockets
from llambo.mesh.errors import LlamboError


class Lookup:
    """One question to the resolver, in a thread. Its descriptor becomes readable when the answer is there."""

    def __init__(self, addresses: str) -> None:
        self.done = False
        #: Why there is no answer.
        self.problem = ""
        self.found: list[tuple[str, int]] = []
        self._addresses = addresses
        self._reader, self._writer = os.pipe()
        threading.Thread(target=self._run, name="lookup", daemon=True).start()

    def fileno(self) -> int:
        return self._reader

    def close(self) -> None:
        """A resolver cannot be interrupted: if it is still at it, nobody will hear its answer."""
        os.close(self._reader)

    def _run(self) -> None:
        try:
            self.found = sockets.resolve_all(self._addresses)
        except LlamboError as error:
            self.problem = error.text
        self.done = True
        with contextlib.suppress(BrokenPipeError):  # nobody waits any more
            os.write(self._writer, b"\0")
        os.close(self._writer)
