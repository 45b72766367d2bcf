"""Clients for loads: sessions that ask at fixed moments, whatever becomes of it, and count it.

They repair nothing: tokens that they miss are counted, and a real client would fetch them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil

import msgspec
import zmq

from bench.crowd import MADE_AT
from bench.figures import quantile
from bench.peers import BEAT_S, FakeClient, Socket, request_ids
from bench.processes import Node
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire import limits, reports, tokens
from llambo.mesh.wire import messages as m

SESSIONS = 8
PROMPT = b"How many are you?"
#: After the last submit.
LATE_S = 20.0


@dataclass
class Tally:
    """Times in milliseconds."""

    asked: int = 0
    without_retry_after: int = 0
    failed: int = 0
    #: Tokens that the END counts, and those that did not come on the token plane.
    tokens: int = 0
    missing: int = 0
    accepted_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    token_ms: list[float] = field(default_factory=list)
    #: How long each refusal took, and when it says to try again.
    refused_ms: list[float] = field(default_factory=list)
    retry_after_ms: list[float] = field(default_factory=list)
    done_at: list[float] = field(default_factory=list)

    @property
    def done(self) -> int:
        return len(self.done_at)

    @property
    def refused(self) -> int:
        return len(self.refused_ms)

    @property
    def unfinished(self) -> int:
        return self.asked - self.done - self.failed - self.refused

    def __str__(self) -> str:
        rows = ((name, getattr(self, f"{name}_ms")) for name in ("accepted", "first", "token"))
        times = ", ".join(f"{name} {quantile(all, 0.5):.1f} / {quantile(all, 0.99):.0f}" for name, all in rows)
        counts = f"{self.asked} asked, {self.done} done, {self.refused} refused, {self.failed} failed"
        return f"{counts}; {self.tokens} tokens, {self.missing} missed; ms p50 / p99: {times}"


@dataclass(slots=True)
class Asked:
    at: float
    tokens: int
    got: int = 0
    #: As its END counts it.
    count: int = 0


class Askers:
    """Some client sessions, and all their requests. `stamped`: each token is the moment at which it was made."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        broker: Node,
        folder: Folder | None = None,
        sessions: int = SESSIONS,
        *,
        stamped: bool = False,
    ) -> None:
        self.tally = Tally()
        self._stamped = stamped
        self.live: dict[bytes, Asked] = {}
        #: Those with an END that has overtaken tokens.
        self._short: dict[bytes, Asked] = {}
        #: The longest pause between two tokens of each stream, if it is kept.
        self.stalls: dict[bytes, float] = {}
        self._last: dict[bytes, float] = {}
        key = folder.export("client") if folder else None
        self._clients = [FakeClient(context, broker.port, key) for _ in range(sessions)]
        self._turn = 0
        self._beat_at = 0.0
        self._poller = zmq.Poller()
        self._by_socket: dict[object, FakeClient] = {}
        for client in self._clients:
            for socket in (client.control, client.tokens):
                self._poller.register(socket, zmq.POLLIN)
                self._by_socket[socket] = client

    def ask(self, count: int, tokens: int, due: float, model: str, pace: int = 0) -> None:
        """So many requests of `tokens` tokens, which a fake of `crowd` makes at `pace` a second. Their times count from
        when they were due."""
        for id in request_ids(os.urandom(16 * count)):
            self._turn += 1
            self.live[id] = Asked(due, tokens)
            self.tally.asked += 1
            request = m.InferenceRequest(id, model, tokens, seed=pace)
            self._clients[self._turn % len(self._clients)].send_all([(request, PROMPT)])

    def poll(self, wait_s: float) -> None:
        now = time.monotonic()
        if now >= self._beat_at:
            self._beat_at = now + BEAT_S
            for client in self._clients:
                client.send_all([(m.ClientHeartbeat(), None)])
        # Rounded up: a loop that never sleeps would take a core from those that are measured.
        for socket, _ in self._poller.poll(max(0, ceil(wait_s * 1_000))):
            client = self._by_socket[socket]
            if socket is client.tokens:
                self._tokens(client.receive_tokens())
            else:
                self._control(client)

    def _tokens(self, frames: list[bytes]) -> None:
        now_ns = time.monotonic_ns()
        for frame in frames:
            chunk = tokens.decode_chunk(frame[limits.TOPIC_BYTES :])
            if chunk is None:
                continue  # a beat
            id = chunk.id
            asked = self.live.get(id) or self._short.get(id)
            if asked is None:
                continue
            if not asked.got:
                self.tally.first_ms.append(now_ns / 1e6 - asked.at * 1e3)
            asked.got += len(chunk.body.ids)
            if asked.got == asked.count:
                del self._short[id]
            if self._stamped:
                self.tally.token_ms += [(now_ns - MADE_AT.unpack(piece)[0]) / 1e6 for piece in chunk.body.pieces]
            if id in self._last:
                self.stalls[id] = max(self.stalls.get(id, 0.0), now_ns / 1e9 - self._last[id])
            self._last[id] = now_ns / 1e9

    def _control(self, client: FakeClient) -> None:
        ended: list[bytes] = []
        tally = self.tally
        received = client.receive()
        now = time.monotonic()
        for message, _ in received:
            if type(message) is m.End:
                ended.append(message.id)
                asked = self.live.pop(message.id, None)
                self._last.pop(message.id, None)
                if asked is not None:
                    tally.tokens += message.count
                    asked.count = message.count
                    if asked.got < asked.count:
                        self._short[message.id] = asked
                    if message.error is None and message.count == asked.tokens:
                        tally.done_at.append(now)
                    else:
                        tally.failed += 1
            elif type(message) is m.Accepted and message.id in self.live:
                tally.accepted_ms.append((now - self.live[message.id].at) * 1e3)
            elif type(message) is m.Problem and (asked := self.live.pop(message.id, None)) is not None:
                tally.refused_ms.append((now - asked.at) * 1e3)
                tally.retry_after_ms.append(message.error.retry_after_ms)
                tally.without_retry_after += not message.error.retry_after_ms
        if ended:
            client.send_all([(m.EndAck(ended), None)])

    def rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.poll(0.05)

    def flow(
        self,
        per_s: float,
        seconds: float,
        length: int,
        model: str,
        pace: int = 0,
        each: Callable[[], None] = lambda: None,
    ) -> Tally:
        """Requests at fixed moments, whatever happens to those before."""
        self.tally = tally = Tally()
        begun = due = time.monotonic()
        while due < begun + seconds:
            now = time.monotonic()
            while due <= now:
                self.ask(1, length, due, model, pace)
                due += 1 / per_s
            self.poll(min(due - time.monotonic(), 0.05))
            each()
        return tally

    def drain(self, timeout_s: float = LATE_S) -> None:
        until = time.monotonic() + timeout_s
        while self.live and time.monotonic() < until:
            self.poll(0.05)
        self.rest(0.2)
        self.tally.missing = sum(asked.count - asked.got for asked in self._short.values())
        self._short.clear()

    def events(self) -> list[reports.EventRow]:
        client = self._clients[0]
        client.send_all([(m.Query(1, "events"), None)])
        data = b""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            client.control.poll(100)
            for message, _ in client.receive():
                if type(message) is m.Result:
                    data += message.data
                    if message.page + 1 == message.pages:
                        return msgspec.msgpack.decode(data, type=list[reports.EventRow])
        raise RuntimeError("no answer to a query")

    def close(self) -> None:
        for client in self._clients:
            client.close()
