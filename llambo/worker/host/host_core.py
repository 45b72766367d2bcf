"""The host core: all decisions of a host, which runs workers on demand.

A host has a session with each broker, on the control plane of workers, and none of it is about requests: it reports
which models it has, which of them are loaded and how much memory they take, and brokers send what they want to be
loaded (`PlaceModels`) and who holds what (`Hold`). Requests go to its workers, which have sessions of their own. What
is done about it is decided in `loading_core`.

    the report  is sent with heartbeats until the broker has echoed its revision
    a wish      of a broker counts until the next one, until it was not repeated for `WISH_BEATS`, or until the broker
                is lost. So it does not matter which message is lost, or that brokers disagree
    a hold      counts until it is given back or its time is over, also if the broker is gone
    files       that it is to get from its source or other hosts, or to give to others: `file_orders`

Events come in through `handle`, which returns actions. There is no clock, socket or randomness in here.
"""

from __future__ import annotations

from typing import assert_never

from llambo.mesh.link.link_core import LinkCore, LinkState
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.timers import NEVER_MS
from llambo.worker.agent.announcement import ProcessIdentity
from llambo.worker.agent.core import LinkLog
from llambo.worker.agent.events import (
    ConnectionChanged,
    ControlArrived,
    Exit,
    Log,
    NotifyReady,
    StopRequested,
    Ticked,
)
from llambo.worker.config import HostConfig
from llambo.worker.host.file_orders import FileOrders
from llambo.worker.host.host_events import FileChanged, HostAction, HostEvent, ModelsFound, WorkerChanged, WorkerEnded
from llambo.worker.host.loading_core import Loading, check_loading

#: A wish counts for so many heartbeats of its broker.
WISH_BEATS = 10


class HostCore:
    """`identity` is what the shell has drawn at random or read from the machine."""

    def __init__(self, config: HostConfig, identity: ProcessIdentity) -> None:
        self.exited = False
        self.ready_notified = False
        #: Rises with each change of what is reported.
        self.revision = 0
        self._out: list[HostAction] = []
        self.loading = Loading(config, self._out)
        self._hello = m.HostHello(
            name=config.name,
            incarnation=identity.incarnation,
            software=identity.software[: limits.NAME_CHARS],
            node_class=config.node_class,
            host=identity.host[: limits.NAME_CHARS],
            pid=identity.pid,
            share=config.share,
            fetches=True,
        )
        self.files = FileOrders(self._out)
        several = len(config.brokers) > 1
        self.links = {
            number: LinkCore(number, lambda: self._hello, self._out.append, redundant=several, streams=False)
            for number in range(len(config.brokers))
        }
        self._link_log = LinkLog(config.brokers, self._out.append)
        #: Of each broker: the highest control sequence number, and the last revision that it has.
        self._received = dict.fromkeys(self.links, 0)
        self._echoed = dict.fromkeys(self.links, 0)
        self._catalogued = False

    def handle(self, event: HostEvent, now_ms: int) -> list[HostAction]:
        if self.exited:
            return []
        match event:
            case ControlArrived():
                self._on_control(event, now_ms)
            case ConnectionChanged(link, change):
                self.links[link].on_connection(change, now_ms)
            case ModelsFound(models, missing):
                self._catalogued = True
                self.loading.on_found(models)
                self.files.on_wanted(missing)
            case FileChanged(file):
                self.files.on_file(file)
            case WorkerChanged():
                self.loading.on_worker(event, now_ms)
            case WorkerEnded():
                self.loading.on_ended(event, now_ms)
            case StopRequested():
                self._stop(now_ms)
            case Ticked():
                pass
            case _:
                assert_never(event)
        self.loading.settle(now_ms)
        self.files.settle(now_ms)
        self._tick(now_ms)
        actions = self._out[:]
        self._out.clear()
        return actions

    def next_wakeup_ms(self) -> int:
        if self.exited:
            return NEVER_MS
        links = (link.next_wakeup_ms() for link in self.links.values())
        return min(self.loading.next_wakeup_ms, self.files.next_wakeup_ms, *links)

    # Brokers.

    def _on_control(self, event: ControlArrived, now_ms: int) -> None:
        number, link = event.link, self.links[event.link]
        for message, _ in event.messages:
            if isinstance(message, m.Welcome):
                if link.on_welcome(message, now_ms):
                    self._received[number] = self._echoed[number] = 0
            elif link.on_control(event.session, now_ms):
                self._on_message(number, message, now_ms)

    def _on_message(self, number: int, message: m.Message, now_ms: int) -> None:
        match message:
            case m.BrokerHeartbeat():
                self._on_sequence(number, message.seq)
                self._echoed[number] = message.echo
            case m.PlaceModels():
                self._on_sequence(number, message.seq)
                lasts_ms = WISH_BEATS * self.links[number].terms.heartbeat_ms
                self.loading.on_place(number, message, now_ms + lasts_ms)
            case m.Hold():
                self._on_sequence(number, message.seq)
                self.loading.on_hold(message, now_ms)
            case m.FetchFiles():
                self._on_sequence(number, message.seq)
                lasts_ms = WISH_BEATS * self.links[number].terms.heartbeat_ms
                self.files.on_orders(number, message, now_ms + lasts_ms)
            case m.Problem():
                self._on_problem(number, message, now_ms)
            case m.Goodbye():
                self._on_link_refused(number, f"the broker left: {message.reason or 'goodbye'}", now_ms)
            case _:
                self._out.append(Log(f"a {type(message).__name__} is not a message for a host", warning=True))

    def _on_sequence(self, number: int, seq: int) -> None:
        self._received[number] = max(self._received[number], seq)

    def _on_problem(self, number: int, problem: m.Problem, now_ms: int) -> None:
        link, error = self.links[number], problem.error
        if link.state is LinkState.GREETING or error.code in (Code.UNKNOWN_SESSION, Code.UNAUTHORIZED):
            self._on_link_refused(number, error.text, now_ms)
        else:
            self._out.append(Log(f"the broker reports a problem: {error.code}: {error.text}", warning=True))

    def _on_link_refused(self, number: int, text: str, now_ms: int) -> None:
        link = self.links[number]
        if link.welcomed or link.state is LinkState.GREETING:
            link.on_refused(text, now_ms)

    # Stopping, and time.

    def _stop(self, now_ms: int) -> None:
        """The sessions of this host end at once, so that no broker counts on it; those of its workers when they are
        done."""
        if not self.loading.stopping:
            self._out.append(Log("stopping: no model is loaded any more"))
            for link in self.links.values():
                link.leave("stopped", now_ms)
        self.loading.stop()
        self.files.stop()

    def _tick(self, now_ms: int) -> None:
        if self.loading.stopping:
            if not self.loading.loaded:
                self.exited = True
                self._out.append(Exit("stopped, no model is loaded"))
            return
        if self.loading.changed or self.files.changed:
            self.revision += 1
            self.files.changed = False
            for link in self.links.values() if self.loading.changed_now else ():
                link.beats.now()
            self.loading.changed = self.loading.changed_now = False
        for number, link in self.links.items():
            if now_ms >= link.next_wakeup_ms() and link.tick(now_ms):
                self._beat(number, now_ms)
            if self._link_log.changed(link):
                self._link_log.write(link, now_ms)
                if not link.welcomed:
                    self.loading.on_broker_lost(number)
        if not self.ready_notified and self._catalogued and any(link.up for link in self.links.values()):
            self.ready_notified = True
            self._out.append(NotifyReady())

    def _beat(self, number: int, now_ms: int) -> None:
        known = self._echoed[number] >= self.revision
        self.links[number].send(
            m.HostHeartbeat(
                seq=self._received[number],
                revision=self.revision,
                models=[] if known else self.loading.hosted(now_ms),
                memory={} if known else self.loading.memory(),
                files=[] if known else self.files.hosted(),
            )
        )


def check_host(core: HostCore) -> None:
    """What is true between any two events. Tests and the simulator check it after each."""
    check_loading(core.loading)
