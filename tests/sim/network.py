"""Virtual sockets between peers and brokers, with the faults of `faults.py`.

A connection is what one DEALER has with the broker's ROUTER: it keeps order, has a route, and a new route
after every cut. The token plane is frames without any promise. No bytes travel on control: the codec has
tests of its own, and messages are immutable.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from llambo.mesh.link.link_core import ConnectionChange
from tests.sim.clock import Clock
from tests.sim.faults import Plan

#: Milliseconds a message travels.
DELAY_MS = (1, 3)
#: A late token frame is so much later.
LATE_MS = 30
#: A cut connection is back after so long, under another route.
RECONNECT_MS = (20, 90)

Bundle = tuple[bytes, list[tuple[Any, bytes]]]


class Hub:
    """One broker as the network sees it: who is connected, who has subscribed."""

    def __init__(self) -> None:
        self.down = False
        self.routes: dict[bytes, Wire] = {}
        self.topics: dict[bytes, Wire] = {}
        self.wires: list[Wire] = []
        self.to_broker: Callable[[Wire, bytes, Bundle], None] = lambda wire, route, bundle: None
        self.tokens_to_broker: Callable[[bytes], None] = lambda frame: None
        #: The connection of a worker has ended in a way that the broker's socket notices.
        self.disconnected: Callable[[], None] = lambda: None


class Wire:
    """Everything one peer has to one broker: its connection, its token socket, and what is wrong with them."""

    def __init__(self, network: Network, name: str, to_worker: bool, hub: Hub) -> None:
        self.network = network
        self.hub = hub
        self.name = name
        self.to_worker = to_worker
        self.route = b""
        self.open = False
        self.tokens_open = False
        self.tokens_dead = False
        self.topic = b""
        self.partitioned = False
        self.epoch = 0  # a cut raises it: what was sent before is lost
        self.token_epoch = 0
        self.from_broker: Callable[[Bundle], None] = lambda bundle: None
        self.tokens_from_broker: Callable[[bytes], None] = lambda frame: None
        self.on_subscribed: Callable[[], None] = lambda: None
        self.on_sign: Callable[[ConnectionChange], None] = lambda sign: None
        self._ready_up = 0
        self._ready_down = 0
        self._held: list[Bundle] = []
        hub.wires.append(self)

    # --- the peer's orders ---------------------------------------------------------------------------

    def connect(self) -> None:
        self.close()
        self.open = True
        self._new_route()

    def open_tokens(self, topic: bytes) -> None:
        self.token_epoch += 1
        self.tokens_open, self.tokens_dead, self.topic = True, False, topic
        epoch = self.token_epoch
        self.network.clock.after(self.network.delay(), lambda: self._subscribe(epoch))

    def close(self) -> None:
        self.epoch += 1
        self._held = []
        self.token_epoch += 1
        self.open = self.tokens_open = False
        self._leave_route()

    def say(self, bundle: Bundle) -> None:
        """Peer to broker on control, in order."""
        if self._held or self.route not in self.hub.routes:
            # The socket holds it back until it is connected again, and what comes after it as well.
            if self.open:
                self._held.append(bundle)
                if len(self._held) == 1:
                    epoch = self.epoch
                    self.network.clock.after(RECONNECT_MS[1] + 10, lambda: self._say_held(epoch))
            return
        self._ready_up = max(self._ready_up, self.network.clock.now_ms + self.network.delay())
        epoch, route = self.epoch, self.route
        if not self.network.loses_control(self):
            self.network.clock.at(self._ready_up, lambda: self._arrive_up(bundle, epoch, route))

    def publish(self, frames: list[bytes]) -> None:
        for frame in frames:
            if self.tokens_open and not self.tokens_dead:
                self.network.token(self, frame, up=True)

    # --- the broker's orders -------------------------------------------------------------------------

    def deliver(self, bundle: Bundle) -> None:
        """Broker to peer on control, in order."""
        self._ready_down = max(self._ready_down, self.network.clock.now_ms + self.network.delay())
        epoch = self.epoch
        if not self.network.loses_control(self):
            self.network.clock.at(self._ready_down, lambda: self._arrive_down(bundle, epoch))

    # --- faults --------------------------------------------------------------------------------------

    def cut(self, *, comes_back: bool = True) -> None:
        """The connection breaks, and both ends see it. What was in flight is lost."""
        self.epoch += 1
        self._held = []
        self._leave_route()
        if comes_back:
            epoch = self.epoch
            self._see(ConnectionChange.LOST)
            delay = self.network.random.randint(*RECONNECT_MS)
            self.network.clock.after(delay, lambda: self._reconnect(epoch))

    def partition(self, length_ms: int) -> None:
        """Nothing gets through, and neither end is notified. Afterwards the connection is found dead and made anew."""
        self.partitioned = True

        def heal() -> None:
            self.partitioned = False
            if self.open:
                self.cut()

        self.network.clock.after(length_ms, heal)

    # --- inside --------------------------------------------------------------------------------------

    def _see(self, sign: ConnectionChange) -> None:
        """The peer's socket reports it. Not always: a cable that is cut reports nothing."""
        epoch = self.epoch
        if self.open and not self.partitioned and self.network.random.random() < 0.9:
            self.network.clock.after(1, lambda: self.on_sign(sign) if self.open and self.epoch == epoch else None)

    def _leave_route(self) -> None:
        if self.hub.routes.pop(self.route, None) is not None and self.to_worker and not self.partitioned:
            self.hub.disconnected()

    def _new_route(self) -> None:
        if self.hub.down:
            epoch = self.epoch
            self._see(ConnectionChange.REFUSED)
            self.network.clock.after(RECONNECT_MS[1], lambda: self._reconnect(epoch))
            return
        self.network.route_count += 1
        self.route = self.network.route_count.to_bytes(5, "big")
        self.hub.routes[self.route] = self
        self._see(ConnectionChange.CONNECTED)

    def _reconnect(self, epoch: int) -> None:
        if self.open and self.epoch == epoch and self.route not in self.hub.routes:
            self._new_route()
            if self.tokens_open and not self.hub.down:
                self._subscribe(self.token_epoch)

    def _subscribe(self, epoch: int) -> None:
        if self.tokens_open and self.token_epoch == epoch and not self.partitioned and not self.hub.down:
            self.on_subscribed()

    def _say_held(self, epoch: int) -> None:
        if self.open and self.epoch == epoch:
            held, self._held = self._held, []
            for bundle in held:
                self.say(bundle)

    def _arrive_up(self, bundle: Bundle, epoch: int, route: bytes) -> None:
        if self.epoch == epoch and not self.partitioned:
            self.hub.to_broker(self, route, bundle)

    def _arrive_down(self, bundle: Bundle, epoch: int) -> None:
        if self.epoch == epoch and not self.partitioned:
            self.from_broker(bundle)


class Network:
    def __init__(self, clock: Clock, random: Random, plan: Plan) -> None:
        self.clock = clock
        self.random = random
        self.plan = plan
        self.healed = False
        self.route_count = 0
        self.repeated = 0

    def delay(self) -> int:
        low, high = DELAY_MS
        return low + int(self.random.random() * (high - low + 1))

    def loses_control(self, wire: Wire) -> bool:
        if wire.partitioned:
            return True
        return not self.healed and self.random.random() < self.plan.control_loss

    def token(self, wire: Wire, frame: bytes, *, up: bool) -> None:
        """One frame on the token plane, with whatever happens to it on the way."""
        copies = 1
        late = 0
        if not self.healed and self.plan.token_loss:
            draw = self.random.random()
            if draw < self.plan.token_loss:
                return
            if draw < self.plan.token_loss + self.plan.token_repeat:
                copies = 2
                self.repeated += 1
            elif draw < self.plan.token_loss + self.plan.token_repeat + self.plan.token_late:
                late = self.random.randint(1, LATE_MS)
        epoch = wire.token_epoch
        if wire.hub.down:
            return
        for _ in range(copies):
            self.clock.after(self.delay() + late, lambda: self._arrive(wire, frame, epoch, up))

    def _arrive(self, wire: Wire, frame: bytes, epoch: int, up: bool) -> None:
        if wire.token_epoch != epoch or wire.partitioned or wire.tokens_dead:
            return
        if up:
            wire.hub.tokens_to_broker(frame)
        else:
            wire.tokens_from_broker(frame)
