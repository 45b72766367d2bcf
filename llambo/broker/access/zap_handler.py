"""Whether a connection is let in: the answer to ZeroMQ's question (ZAP), which it asks before it reads anything else.

A key has to be in the keyring, valid, and of a role that may use this socket. Every other answer is no.

The handler is part of the broker's shell and of its one loop. There is no thread that could die, and without an answer
no connection is let in: the sockets insist on one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import zmq

from llambo.mesh.link import sockets
from llambo.mesh.security import zap
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.identity import CLIENT_DOMAIN, WORKER_DOMAIN, Identity

log = logging.getLogger(__name__)

#: How often the keyring is looked at, and how often an unreadable one is logged.
LOOK_MS = 250
LOG_AGAIN_S = 60.0
#: Questions answered before others get a turn.
DRAIN = 256


def reply_to(question: Sequence[bytes], public: str, identities: Mapping[str, Identity]) -> tuple[list[bytes], str]:
    """The frames of the reply, and why not, for the log. `public`: the key of the credentials, as text."""
    why = _objection(question, identities.get(public))
    return zap.reply(question, public, why), why


def _objection(question: Sequence[bytes], who: Identity | None) -> str:
    if not zap.is_curve(question):
        return "not a ZAP request with a CURVE key"
    if who is None:
        return "this key is not known"
    if question[2] == CLIENT_DOMAIN.encode():
        return "" if who.may_ask else f"the key of {who.name} is for a worker"
    if question[2] == WORKER_DOMAIN.encode():
        return "" if who.may_serve else f"the key of {who.name} is not for a worker"
    return "no such domain"


class ZapHandler:
    def __init__(self, folder: Folder, context: zmq.Context[Any]) -> None:
        self.pair = folder.broker()
        self.refused = 0
        self._folder = folder
        self._stamp = folder.stamp()
        self._ring = folder.ring()
        self.identities: Mapping[str, Identity] = {}
        #: When `identities` was made, and the next time at which a key of it expires, in seconds since 1970.
        self._made_at = self._expires_at = 0.0
        self._choose_valid()
        self._reported: Mapping[str, Identity] = self.identities
        self._look_at, self._log_again_at = 0, 0.0
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(sockets.ZAP_ENDPOINT)

    def door(self, domain: str) -> sockets.CurveServer:
        return sockets.CurveServer(self.pair, domain)

    def answer(self) -> None:
        """All connections that wait for it."""
        for _ in range(DRAIN):
            try:
                question = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            public = zap.public_key(question)
            if public not in self.identities:
                self._read()  # it may have been added a moment ago
            reply, why = reply_to(question, public, self.identities)
            if why:
                self.refused += 1
                log.info("refused %s: %s", question[3].decode("ascii", "replace") if len(question) > 3 else "?", why)
            self.socket.send_multipart(reply, zmq.DONTWAIT)

    def look(self, now_ms: int) -> Mapping[str, Identity] | None:
        """What is valid from now on, if that has changed.

        A keyring that cannot be read changes nothing and is logged: what was revoked before stays revoked, and what
        expires expires.
        """
        if now_ms >= self._look_at:
            self._look_at = now_ms + LOOK_MS
            self._read()
        if self.identities is self._reported:
            return None
        self._reported = self.identities
        return self.identities

    def _read(self) -> None:
        try:
            stamp = self._folder.stamp()
            if stamp != self._stamp:
                self._ring, self._stamp = self._folder.ring(), stamp
                self._choose_valid()
                log.info("the keyring was changed: %d keys", len(self._ring.entries))
        except (OSError, LlamboError) as error:
            if time.monotonic() >= self._log_again_at:
                self._log_again_at = time.monotonic() + LOG_AGAIN_S
                log.error("the keyring cannot be read, the last one stays in force: %s", error)
        # Not at each look: that would cost some milliseconds with thousands of keys, also for each key that is unknown.
        if not self._made_at <= time.time() < self._expires_at:  # (the clock may have been set back)
            self._choose_valid()

    def _choose_valid(self) -> None:
        self._made_at = now = time.time()
        self._expires_at = min((e.expires for e in self._ring.entries if e.expires > now), default=math.inf)
        valid = self._ring.identities(now)
        if valid != self.identities:
            self.identities = valid

    def next_wakeup_ms(self) -> int:
        return self._look_at

    def close(self) -> None:
        self.socket.close(linger=0)


def key_of(frame: zmq.Frame) -> str:
    """The public key that the sender's connection has proved."""
    return str(frame.get("User-Id"))
