"""The porter: answers who may come in, and keeps an eye on the keyring. Part of the broker's shell and of its one loop.

There is no thread that could die, and nothing is let in while nobody answers: the sockets insist on an answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import zmq
from zmq.utils import z85

from llambo.broker.access import zap
from llambo.mesh.link import sockets
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.identity import Identity

log = logging.getLogger(__name__)

#: How often the keyring is looked at, and how often it is complained of.
LOOK_MS = 250
COMPLAIN_S = 60.0
#: Questions answered before others get a turn.
DRAIN = 256
_CURVE_BYTES = 32


class Porter:
    def __init__(self, folder: Folder, context: zmq.Context[Any]) -> None:
        self.pair = folder.broker()
        self.refused = 0
        self._folder = folder
        self._stamp = folder.stamp()
        self._ring = folder.ring()
        self.identities: Mapping[str, Identity] = self._ring.identities(time.time())
        self._told: Mapping[str, Identity] = self.identities
        self._look_at, self._complain_at = 0, 0.0
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(sockets.ASK_AT)

    def door(self, domain: str) -> sockets.CurveServer:
        return sockets.CurveServer(self.pair, domain)

    def answer(self) -> None:
        """Everybody who waits at a door."""
        for _ in range(DRAIN):
            try:
                question = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            credentials = question[-1]
            public = z85.encode(credentials).decode() if len(credentials) == _CURVE_BYTES else ""
            if public not in self.identities:
                self._read()  # it may have been added a moment ago
            reply, why = zap.answer(question, public, self.identities)
            if why:
                self.refused += 1
                log.info("refused %s: %s", question[3].decode("ascii", "replace") if len(question) > 3 else "?", why)
            self.socket.send_multipart(reply, zmq.DONTWAIT)

    def look(self, now_ms: int) -> Mapping[str, Identity] | None:
        """What is valid from now on, if that is something else than before.

        A keyring that cannot be read changes nothing but is complained of: what was revoked before stays revoked, and
        what expires expires.
        """
        if now_ms >= self._look_at:
            self._look_at = now_ms + LOOK_MS
            self._read()
        if self.identities == self._told:
            return None
        self._told = self.identities
        return self.identities

    def _read(self) -> None:
        try:
            stamp = self._folder.stamp()
            if stamp != self._stamp:
                self._ring, self._stamp = self._folder.ring(), stamp
                log.info("the keyring was changed: %d keys", len(self._ring.entries))
        except (OSError, LlamboError) as error:
            if time.monotonic() >= self._complain_at:
                self._complain_at = time.monotonic() + COMPLAIN_S
                log.error("the keyring cannot be read, the last one holds: %s", error)
        self.identities = self._ring.identities(time.time())

    def next_look_ms(self) -> int:
        return self._look_at

    def close(self) -> None:
        self.socket.close(linger=0)


def key_of(frame: zmq.Frame) -> str:
    """The public key that the sender's connection has proved."""
    return str(frame.get("User-Id"))
