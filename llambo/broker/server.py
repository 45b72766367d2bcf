"""The broker's shell: one thread, four sockets, one poll loop.

Each turn drains what is readable, tokens first so that an END meets its last token already in place, hands
it to the core, and performs the core's actions. Messages to the same peer leave as one bundle.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import zmq

from llambo.broker import ports
from llambo.broker.access.zap_handler import ZapHandler, key_of
from llambo.broker.config import BrokerConfig
from llambo.broker.core import BrokerCore
from llambo.broker.events import (
    Action,
    ClientSaid,
    Counted,
    KeysChanged,
    PeersDisconnected,
    RouteGone,
    StopAsked,
    Subscribed,
    Tick,
    ToClient,
    TokensArrived,
    ToWorker,
    WorkerSaid,
)
from llambo.broker.ports import Headroom, SubscriptionGrants
from llambo.broker.records import seals
from llambo.broker.records.journal import LogLine
from llambo.broker.records.state import State
from llambo.broker.report import metrics_page
from llambo.mesh.link import sockets
from llambo.mesh.security.keyring import Folder
from llambo.mesh.service import clock
from llambo.mesh.service.host import process_metrics_page
from llambo.mesh.service.notify_core import Condition
from llambo.mesh.service.service_manager import Inherited, Notifier
from llambo.mesh.wire import codec
from llambo.mesh.wire import messages as m

if TYPE_CHECKING:
    from llambo.broker.report.metrics_http import MetricsServer  # http.server takes 3 MiB

log = logging.getLogger(__name__)

#: Random bytes fetched at a time.
RANDOM_BYTES = 4_096
#: Messages taken from one socket before the others get a turn.
DRAIN_MESSAGES = 512
#: The same in time: one bundle may take as long as hundreds of plain messages.
DRAIN_MS = 20
DRAIN_TOKENS = 4_096
#: Flags of a frame that others follow. A ROUTER refuses a message at its first frame or takes all of it.
MORE = int(zmq.DONTWAIT | zmq.SNDMORE)
#: For how long goodbyes are sent to peers that are still connected, and how often.
GOODBYE_MS = 500
GOODBYE_PAUSE_MS = 20
#: The longest the loop sleeps, so that a signal is noticed in any case.
SLEEP_MS = 1_000

Socket = zmq.Socket[bytes]
Outbox = dict[tuple[bytes, bytes], list[tuple[m.Message, bytes | None]]]


def random_bytes() -> Callable[[int], bytes]:
    """The system's, fetched by the page: a system call for each dispatch is a tenth of its cost."""
    page, at = b"", 0

    def draw(count: int) -> bytes:
        nonlocal page, at
        if at + count > len(page):
            page, at = os.urandom(RANDOM_BYTES), 0
        at += count
        return page[at - count : at]

    return draw


def condition(state: State, *, leaving: bool) -> Condition:
    """For the service manager. A broker listens when it can be asked this, so it is ready."""
    workers, running, waiting = len(state.registry.workers), len(state.running), state.queue.count
    if leaving:
        status = f"stopping, {running} running go on without it" if running else "stopping"
    else:
        status = f"{workers or 'no'} worker{'s' * (workers != 1)}, {running} running, {waiting} waiting"
    return Condition(status, ready=True, leaving=leaving)


class _Turns:
    """The longest turn of the loop since the last tick; since when each control plane has something unread."""

    def __init__(self) -> None:
        self.longest_ms = 0
        self.unread_at: dict[Socket, int] = {}


class BrokerServer:
    def __init__(
        self,
        config: BrokerConfig,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token_hwm: int = sockets.TOKEN_HWM,
        context: zmq.Context[Socket] | None = None,
        inherited: Inherited | None = None,
        notifier: Notifier | None = None,
        keys: Folder | None = None,
        metrics: MetricsServer | None = None,
    ) -> None:
        """`inherited`: sockets that listen already, in place of host and port. `keys`: who may connect; None: all.

        Only one broker with keys fits into a context.
        """
        self._context: zmq.Context[Any] = context or zmq.Context()
        self._owns_context = context is None
        self._stopping = False
        self._notifier = notifier or Notifier()
        self._zap: ZapHandler | None = None
        self._metrics = metrics
        if inherited is not None:
            host, port = inherited.host, inherited.port
        try:
            self._zap = ZapHandler(keys, self._context) if keys else None
            self._sockets, self.port = ports.bind(self._context, host, port, token_hwm, self._zap, inherited)
        except BaseException:
            if self._zap:
                self._zap.close()
            if self._owns_context:
                self._context.term()
            raise
        self._disconnected = ports.watch_disconnections(self._sockets.workers, self._context)
        tokens_in, tokens_out = self.port + sockets.TOKENS_IN_OFFSET, self.port + sockets.TOKENS_OUT_OFFSET
        marks_key = seals.key_from(self._zap.pair.secret) if self._zap else b""
        config = replace(config, tokens_in_port=tokens_in, tokens_out_port=tokens_out, marks_key=marks_key)
        self.core = BrokerCore(config, random_bytes())
        if self._zap:
            self.core.handle(KeysChanged(self._zap.identities), clock.now_ms())
        self._grants = SubscriptionGrants(self.core.state.registry.topics)
        self.dropped = 0
        self._headroom = Headroom()
        self._turns = _Turns()

    # --- the loop ------------------------------------------------------------------------------------

    def run(self) -> None:
        poller = zmq.Poller()
        for socket in (*self._sockets, self._disconnected):
            poller.register(socket, zmq.POLLIN)
        if self._zap:
            poller.register(self._zap.socket, zmq.POLLIN)
        if self._metrics:
            self._metrics.start()
        # What is there now stays until the end, so the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        while not self._stopping:
            wait = min(self._next_wakeup_ms(), self._notifier.next_wakeup_ms()) - clock.now_ms()
            readable = dict(poller.poll(max(0, min(wait, SLEEP_MS))))
            begun = clock.now_ms()
            self.turn(readable)
            self._turns.longest_ms = max(self._turns.longest_ms, clock.now_ms() - begun)
            if clock.now_ms() >= self._notifier.next_wakeup_ms():
                self._notify_manager()
        self._notify_manager()
        self._leave()

    def _notify_manager(self) -> None:
        self._notifier.update(condition(self.core.state, leaving=self._stopping), clock.now_ms())

    def _leave(self) -> None:
        """Until each peer has disconnected, which it does when it reads the goodbye.

        A peer's socket drops what it has not read yet when its connection breaks (libzmq does so with IMMEDIATE). If
        we closed at once, most of these messages would be lost.
        """
        goodbyes = self.core.handle(StopAsked("it was stopped"), clock.now_ms())
        until = clock.now_ms() + GOODBYE_MS
        while goodbyes and clock.now_ms() < until:
            gone = {event.route for event in self._deliver(goodbyes)}
            goodbyes = [
                action for action in goodbyes if isinstance(action, ToClient | ToWorker) and action.route not in gone
            ]
            time.sleep(GOODBYE_PAUSE_MS / 1_000)  # only the next send shows that a peer has disconnected

    def turn(self, readable: dict[Any, int]) -> None:
        now = clock.now_ms()
        handle = self.core.handle
        if self._zap:
            self._check_keys(self._zap, readable, now)
        if self._sockets.tokens_in in readable:
            frames = self._drain_tokens()
            if frames:
                self._perform(handle(TokensArrived(frames), now))
        actions: list[Action] = []
        for socket in self._turns.unread_at.keys() - readable.keys():
            del self._turns.unread_at[socket]
        if self._sockets.workers in readable:
            for route, user, bundle in self._drain_control(self._sockets.workers, codec.from_worker):
                actions += handle(WorkerSaid(route, bundle.session, bundle.messages, bundle.problems, user), now)
        if self._sockets.clients in readable:
            for route, user, bundle in self._drain_control(self._sockets.clients, codec.from_client):
                actions += handle(ClientSaid(route, bundle.session, bundle.messages, bundle.problems, user), now)
        if self._sockets.tokens_out in readable:
            actions += self._drain_subscriptions(now)
        if self._disconnected in readable:
            _discard(self._disconnected)
            actions += handle(PeersDisconnected(), now)
        if now >= self.core.next_wakeup_ms():
            self._headroom.look(now)
            self._count(now)
            # (What lies unread is older than `now` only if the turn before this one has left it.)
            unread_ms = now - min(self._turns.unread_at.values(), default=now)
            actions += handle(Tick(self._turns.longest_ms, unread_ms, self._headroom.crowded), now)
            self._turns.longest_ms = 0
        self._perform(actions)
        while self.core.state.journal.log:
            self._log(self.core.state.journal.log.popleft())
        if self._metrics:
            self._metrics.snapshot.turned(self._page)

    def _page(self) -> str:
        return metrics_page.page(self.core.state, clock.now_ms()) + process_metrics_page()

    def _count(self, now: int) -> None:
        """What the shell has counted, for the metrics."""
        counted = Counted(self.dropped, self._zap.refused if self._zap else 0, self._grants.refused)
        if counted != self.core.state.measured.shell:
            self._perform(self.core.handle(counted, now))

    def _log(self, line: LogLine) -> None:
        about = {"worker": line.worker, "request": line.request.hex()}
        log.log(logging.WARNING if line.warning else logging.INFO, "%s", line.text, extra=about)

    def _check_keys(self, zap: ZapHandler, readable: dict[Any, int], now: int) -> None:
        if zap.socket in readable:
            zap.answer()
        valid = zap.look(now)
        if valid is not None:
            self._perform(self.core.handle(KeysChanged(valid), now))

    def _next_wakeup_ms(self) -> int:
        at = self.core.next_wakeup_ms()
        return min(at, self._zap.next_wakeup_ms()) if self._zap else at

    def stop(self) -> None:
        """Leave the loop at its next turn. May be called from a signal handler."""
        self._stopping = True

    def close(self) -> None:
        self._sockets.workers.disable_monitor()
        for socket in (*self._sockets, self._disconnected):
            socket.close(linger=sockets.LINGER_MS)
        if self._zap:
            self._zap.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._owns_context:
            self._context.term()

    # --- arrivals ------------------------------------------------------------------------------------

    def _drain_tokens(self) -> list[bytes]:
        frames: list[bytes] = []
        receive, keep = self._sockets.tokens_in.recv, frames.append
        try:
            for _ in range(DRAIN_TOKENS):
                keep(receive(zmq.DONTWAIT))
        except zmq.Again:
            pass
        return frames

    def _drain_control(
        self, socket: Socket, decoder: codec.Codec[Any]
    ) -> Iterable[tuple[bytes, str, codec.Bundle[Any]]]:
        """Route, public key and content of each."""
        receive, decode, user, proved = sockets.receive, decoder.decode, "", self._zap is not None
        until = clock.now_ms() + DRAIN_MS
        for _ in range(DRAIN_MESSAGES):
            if clock.now_ms() > until:
                break
            try:
                parts = receive(socket)
            except zmq.Again:
                self._turns.unread_at.pop(socket, None)
                return
            if proved:
                user = key_of(parts[0])
            yield parts[0].bytes, user, decode([part.bytes for part in parts[1:]])
        self._turns.unread_at.setdefault(socket, clock.now_ms())

    def _drain_subscriptions(self, now: int) -> list[Action]:
        """A grant goes to the sender of the event read last, so it is given before the next one is read."""
        actions: list[Action] = []
        socket = self._sockets.tokens_out
        for _ in range(DRAIN_MESSAGES):
            try:
                part = socket.recv(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                self._grants.drained()
                break
            frame = part.bytes
            topic = self._grants.admit(frame, key_of(part) if self._zap and frame[:1] == b"\x01" else "")
            if topic is not None:
                socket.setsockopt(zmq.SUBSCRIBE, topic)
                actions += self.core.handle(Subscribed(topic), now)
            elif frame[:1] == b"\x00":
                socket.setsockopt(zmq.UNSUBSCRIBE, frame[1:])
        return actions

    # --- actions --------------------------------------------------------------------------------------

    def _perform(self, actions: list[Action]) -> None:
        for event in self._deliver(actions):
            self._perform(self.core.handle(event, clock.now_ms()))

    def _deliver(self, actions: list[Action]) -> list[RouteGone]:
        """Returns the routes without a peer: it has disconnected.

        Tokens are published before control messages are sent, whatever the order of the actions. So they are mostly at
        the client before the END; a client relies on the END's count and not on that.
        """
        clients: Outbox = {}
        workers: Outbox = {}
        for action in actions:
            kind = type(action)
            if kind is ToClient:
                clients.setdefault((action.route, action.session), []).append((action.message, None))  # type: ignore[union-attr]
            elif kind is ToWorker:
                workers.setdefault((action.route, action.session), []).append((action.message, action.blob))  # type: ignore[union-attr]
            else:
                self._publish(action.frames)  # type: ignore[union-attr]
        gone = [RouteGone(route, True) for route in self._send(self._sockets.workers, workers)]
        return gone + [RouteGone(route, False) for route in self._send(self._sockets.clients, clients)]

    def _publish(self, frames: list[bytes]) -> None:
        send = self._sockets.tokens_out.send
        for frame in frames:
            try:
                send(frame, zmq.DONTWAIT)
            except zmq.Again:
                self.dropped += 1

    def _send(self, socket: Socket, outbox: Outbox) -> list[bytes]:
        gone: list[bytes] = []
        send = socket.send
        for (route, session), messages in outbox.items():
            for frames in codec.encode_all(session, messages):
                try:
                    # What send_multipart does, without its checks: a bundle of dispatches has many frames.
                    send(route, MORE)
                    for frame in frames[:-1]:
                        send(frame, MORE)
                    send(frames[-1], zmq.DONTWAIT)
                except zmq.Again:
                    self.dropped += 1  # a peer that does not read; what matters is sent again
                except zmq.ZMQError as error:
                    if error.errno != zmq.EHOSTUNREACH:
                        raise
                    gone.append(route)
        return gone


def _discard(socket: Socket) -> None:
    """All that is there. Each event has two frames."""
    with suppress(zmq.Again):
        while True:
            socket.recv(zmq.DONTWAIT)


def run_broker(
    config: BrokerConfig,
    host: str,
    port: int,
    announce: Callable[[int], None],
    *,
    token_hwm: int = sockets.TOKEN_HWM,
    inherited: Inherited | None = None,
    notifier: Notifier | None = None,
    keys: Folder | None = None,
    metrics: MetricsServer | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT. `announce` is called with the port once clients can connect."""
    server = BrokerServer(
        config, host, port, token_hwm=token_hwm, inherited=inherited, notifier=notifier, keys=keys, metrics=metrics
    )
    if inherited is not None:
        host = inherited.host

    def on_signal(number: int, frame: FrameType | None) -> None:
        server.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    log.info("broker %s listens on %s", config.name, sockets.endpoint(host, server.port))
    announce(server.port)
    try:
        server.run()
    finally:
        server.close()
    log.info("broker stopped")
    return 0
