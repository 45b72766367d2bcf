"""The sockets and the clock of an asyncio client: translate, handle, perform. Belongs to one event loop.

ZeroMQ signals its descriptors on edges only, and a send can consume the edge of an arrival. So after every send and
receive the sockets are read once more, until nothing is found; then the next arrival causes an edge.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

import zmq

from llambo.mesh.client import client_events as e
from llambo.mesh.client.client_core import ClientCore
from llambo.mesh.link.link import Link
from llambo.mesh.link.link_core import CloseLink, OpenControl, OpenTokens, Publish, Send
from llambo.mesh.service import clock
from llambo.mesh.wire import codec, limits
from llambo.mesh.wire.identity import PeerKey
from llambo.mesh.wire.timers import NEVER_MS

log = logging.getLogger(__name__)


class ClientShell:
    def __init__(
        self,
        core: ClientCore,
        address: str,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        token_hwm: int,
        first: str,
        key: PeerKey | None,
        deliver: Callable[[e.Delivery | e.ReportLink], None],
        broken: Callable[[Exception], None],
    ) -> None:
        self._core = core
        self._link = Link(
            context,
            address,
            token_kind=zmq.SUB,
            offset=0,
            decoder=codec.to_client,
            token_hwm=token_hwm,
            spread=True,
            first=first,
            key=key,
        )
        self._deliver = deliver
        self._broken = broken
        self._loop = asyncio.get_running_loop()
        self._events: deque[e.Event] = deque()
        self._working = False
        self._watched: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = NEVER_MS
        self._pump_due = False
        self.closed = False

    def handle(self, event: e.Event) -> None:
        """Pass an event to the core. Its messages are sent by the next pump, as one bundle for each round.

        A delivery may cause another event, which is handled after this one.
        """
        if self.closed:
            return
        self._events.append(event)
        if self._working:
            return
        self._working = True
        try:
            while self._events:
                for action in self._core.handle(self._events.popleft(), clock.now_ms()):
                    self._perform(action)
        finally:
            self._working = False
        self._pump_soon()

    def begin(self, found: list[tuple[str, int]]) -> None:
        """Connect to one of these."""
        self._link.brokers.take(found)
        self.handle(e.BrokersFound(len(found)))

    @property
    def broker(self) -> tuple[str, int] | None:
        """The host and port of the broker that the link is for."""
        return self._link.brokers.current if self._link.brokers.found else None

    def close(self) -> None:
        """After `LeaveAsked`: close the sockets. Nothing is delivered from then on."""
        self.closed = True
        self._unwatch()
        self._link.flush()
        self._link.close()
        if self._timer is not None:
            self._timer.cancel()

    # --- actions ------------------------------------------------------------------------------------------------

    def _perform(self, action: e.Action) -> None:
        match action:
            case Send() | Publish():
                self._link.perform(action)
            case OpenControl() | OpenTokens() | CloseLink():
                # A descriptor must not be watched when another socket may get its number.
                self._unwatch()
                self._link.perform(action)
                self._watch()
            case _:
                self._deliver(action)

    def _watch(self) -> None:
        link = self._link
        watched = [socket for socket in (link.control, link.tokens, link.monitor) if socket is not None]
        descriptors = [int(socket.getsockopt(zmq.FD)) for socket in watched]
        if link.lookup is not None:
            descriptors.append(link.lookup.fileno())
        for descriptor in descriptors:
            self._loop.add_reader(descriptor, self._on_edge)
            self._watched.append(descriptor)

    def _unwatch(self) -> None:
        for descriptor in self._watched:
            self._loop.remove_reader(descriptor)
        self._watched.clear()

    # --- arrivals and time ---------------------------------------------------------------------------------------

    def _on_edge(self) -> None:
        if not self._pump_due:
            self._pump()

    def _pump_soon(self) -> None:
        if not self._pump_due and not self.closed:
            self._pump_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Read all sockets once. If something was received or sent, another pump follows; tasks run in between."""
        self._pump_due = False
        if self.closed:
            return
        try:
            self._turn()
            self._set_timer()
        except Exception as error:
            # A bug of the client. Callers must get an error, or they would wait without end.
            log.exception("the client is broken")
            self.close()
            self._broken(error)

    def _turn(self) -> None:
        if self._link.lookup is not None and self._link.lookup.done:
            self._unwatch()
            self._link.answered()
            self._watch()
            self.handle(e.BrokersFound(len(self._link.brokers.found)))
        self._link.flush()
        # Tokens first: then the last token is in place when its END is handled.
        frames = self._link.receive_tokens()
        if frames:
            self.handle(e.TokensArrived([frame[limits.TOPIC_BYTES :] for frame in frames]))
        for bundle in self._link.receive_control():
            self.handle(e.ControlArrived(bundle.session, bundle.messages, bundle.problems))
        # After the messages: the goodbye of a broker arrives before its connection breaks.
        for change in self._link.receive_changes():
            self.handle(e.ConnectionChanged(change))
        held_back = self._link.wants_to_write
        if held_back:
            # A send without a connection fails at once without looking for commands of the I/O thread; a receive looks.
            # So the socket may have learned only now that it is connected, and the edge of that is consumed.
            self._link.push()
            if not self._link.wants_to_write:
                self._pump_soon()

    def _set_timer(self) -> None:
        """A timer that fires too early does no harm: the core finds nothing to do."""
        wakeup = self._core.next_wakeup_ms()
        if self._timer is not None:
            if self._timer_at <= wakeup:
                return
            self._timer.cancel()
        self._timer_at = wakeup
        delay_ms = max(0, wakeup - clock.now_ms())
        self._timer = self._loop.call_later(delay_ms / 1_000, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.handle(e.Tick())
