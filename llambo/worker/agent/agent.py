"""The agent: a thread, a poll loop, and the hands of the worker core.

It polls the sockets of its links, the pipe of its engine and a wake-up pipe for signals; turns what arrives into
events, gives them to the core, and carries out its orders. It decides nothing.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from typing import Any, assert_never

import zmq

from llambo.mesh.link import sockets
from llambo.mesh.link.link import Link
from llambo.mesh.link.link_core import CloseLink, LinkCore, OpenControl, OpenTokens, Publish, Send
from llambo.mesh.service import clock
from llambo.mesh.service.notify import Herald
from llambo.mesh.service.notify_core import Condition
from llambo.mesh.wire import codec
from llambo.mesh.wire import messages as m
from llambo.worker.agent import actions as a
from llambo.worker.agent import events as e
from llambo.worker.agent.core import WorkerCore
from llambo.worker.agent.engine_life import EngineState
from llambo.worker.agent.engine_process import EngineProcess
from llambo.worker.agent.introduction import Identity
from llambo.worker.agent.signals import signals_wake
from llambo.worker.config import WorkerConfig
from llambo.worker.engine import protocol as proto

# --- How a worker is, in the words of its service manager: read from the core, which knows nothing of managers. ---
#
# It is ready when it can be of use: welcomed by a broker, its model loaded and tried, its token plane proved. It is
# healthy as long as what it should be doing goes on: an engine that has sequences and is silent for `stall_ms` is
# killed by the core, and until that has worked the watchdog is not fed. So a worker that cannot get rid of its engine
# is ended as a whole. That the loop turns is shown by its asking at all.


def condition(core: WorkerCore, brokers: tuple[str, ...], now_ms: int) -> Condition:
    leaving = core.exited or core.leaving.leaves
    return Condition(
        _status(core, brokers, leaving),
        ready=core.ready_said,
        well=core.engine.goes_on(now_ms, core.runs.active > 0),
        leaving=leaving,
    )


def _status(core: WorkerCore, brokers: tuple[str, ...], leaving: bool) -> str:
    active = core.runs.active
    if leaving:
        return f"stopping, {active} still running" if active else "stopping"
    engine = core.engine
    if not engine.is_ready:
        doing = "starting the engine" if engine.state is not EngineState.DOWN else "without an engine"
        return engine.note or doing
    links = list(core.links.values())
    up = [link for link in links if link.up]
    if not any(link.welcomed for link in links):
        return _searching(core, brokers, links)
    if not up and not core.ready_said:
        return f"joining {_broker(next(link for link in links if link.welcomed))}"
    slots = engine.ready.slots if engine.ready is not None else 0
    parts = [f"busy {active}/{slots}, {core.rate.last:.0f} tok/s" if active else f"idle, {slots} slots"]
    if core.leaving.drained:
        parts.append("drained: no new work")
    if len(up) < len(links):
        parts.append("the token plane is being mended" if len(links) == 1 else f"{len(up)} of {len(links)} brokers")
    return "; ".join(parts)


def _searching(core: WorkerCore, brokers: tuple[str, ...], links: list[LinkCore]) -> str:
    why = next((link.problem for link in links if link.problem), "")
    kept = f"; {core.runs.active} requests go on without one" if core.runs.active else ""
    return f"looking for a broker at {', '.join(brokers)}{f' ({why})' if why else ''}{kept}"


def _broker(link: LinkCore) -> str:
    return f"broker {link.terms.broker}" if link.terms.broker else "a broker"


log = logging.getLogger(__name__)

#: The longest sleep, whatever the core says: zmq takes milliseconds as an int.
POLL_MS = 60_000
POLL_BOTH = int(zmq.POLLIN | zmq.POLLOUT)
#: An XPUB frame that begins like this is a subscription.
SUBSCRIBE = b"\x01"


class Agent:
    """One worker. `run` returns when it has left the mesh; `stop` may be called from any thread, or by a signal."""

    def __init__(
        self, config: WorkerConfig, on_ready: Callable[[], None] = lambda: None, herald: Herald | None = None
    ) -> None:
        identity = Identity(secrets.token_bytes(8), socket.gethostname(), os.getpid(), _software())
        self.core = WorkerCore(config, identity)
        self.engine: EngineProcess | None = None
        self._config = config
        self._on_ready = on_ready
        self._herald = herald or Herald()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._links = {
            number: Link(
                self._context,
                address,
                token_kind=zmq.XPUB,
                offset=sockets.WORKER_OFFSET,
                decoder=codec.to_worker,
                token_hwm=config.token_hwm,
                key=config.key,
            )
            for number, address in enumerate(config.brokers)
        }
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)
        self._poller = zmq.Poller()
        self._exit = ""
        #: What `run_worker` returns.
        self.status = 0

    @property
    def waker_fd(self) -> int:
        """Each byte written here is a request to stop: the first to finish first, the next to stop at once."""
        return self._waker.fileno()

    def stop(self) -> None:
        self._waker.send(b"\0")

    def run(self) -> None:
        try:
            self._handle(e.Ticked())
            while not self._exit:
                self._turn()
            log.log(logging.ERROR if self.status else logging.INFO, "%s", self._exit)
            self._tell_manager(self._exit if self.status else "")
        finally:
            self._close()

    # --- the loop ------------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._flush()
        due_ms = min(self.core.next_wakeup_ms(), self._herald.due_ms)
        ready = dict(self._watched().poll(min(max(due_ms - clock.now_ms(), 0), POLL_MS)))
        if self._wake.fileno() in ready:
            for _ in self._wake.recv(64):
                self._handle(e.StopRequested())
            self._herald.hurry()
        for number, link in self._links.items():
            if link.lookup is not None and link.lookup.done:
                link.answered()
            if link.control in ready:
                self._receive_control(number, link)
            if link.monitor in ready:
                for change in link.receive_changes():
                    self._handle(e.ConnectionChanged(number, change))
            if link.tokens in ready and any(frame[:1] == SUBSCRIBE for frame in link.receive_tokens()):
                self._handle(e.Subscribed(number))
        if self.engine is not None and self.engine.fileno() in ready:
            self._receive_engine(self.engine)
        if clock.now_ms() >= self.core.next_wakeup_ms():
            self._handle(e.Ticked())
        if clock.now_ms() >= self._herald.due_ms:
            self._tell_manager()

    def _tell_manager(self, why: str = "") -> None:
        now = clock.now_ms()
        how = condition(self.core, self._config.brokers, now)
        self._herald.tell(replace(how, status=why) if why else how, now)

    def _watched(self) -> zmq.Poller:
        """Sockets come and go. Between two tokens they mostly stay, and then so does the poller."""
        watched: list[tuple[Any, int]] = [(self._wake.fileno(), zmq.POLLIN)]
        for link in self._links.values():
            if link.control is not None:
                watched.append((link.control, POLL_BOTH if link.wants_to_write else zmq.POLLIN))
            if link.tokens is not None:
                watched.append((link.tokens, zmq.POLLIN))
            if link.monitor is not None:
                watched.append((link.monitor, zmq.POLLIN))
            if link.lookup is not None:
                watched.append((link.lookup.fileno(), zmq.POLLIN))
        if self.engine is not None:
            watched.append((self.engine.fileno(), POLL_BOTH if self.engine.wants_to_write else zmq.POLLIN))
        if watched != self._poller.sockets:
            self._poller = zmq.Poller()
            for there, flags in watched:
                self._poller.register(there, flags)
        return self._poller

    def _flush(self) -> None:
        # The engine first: what it is told to start, somebody waits for.
        if self.engine is not None:
            self.engine.push()
        for link in self._links.values():
            link.flush()

    # --- what arrives --------------------------------------------------------------------------------

    def _receive_control(self, number: int, link: Link) -> None:
        for bundle in link.receive_control():
            for problem in bundle.problems:
                log.warning("from the broker: %s", problem.error.text)
            if bundle.messages:
                self._handle(e.ControlArrived(number, bundle.session, bundle.messages))

    def _receive_engine(self, engine: EngineProcess) -> None:
        garbled = False
        try:
            said = engine.read()
        except proto.BadFrame as error:
            log.warning("%s", error)
            said, garbled = None, True
        if said is None:
            self.engine = None
            text, outside = engine.reap()
            self._handle(e.EngineDied(text, outside and not garbled))
            return
        for message in said:
            self._handle(_engine_event(message))

    # --- what is to be done --------------------------------------------------------------------------

    def _handle(self, event: e.Event) -> None:
        for action in self.core.handle(event, clock.now_ms()):
            self._perform(action)

    def _perform(self, action: a.Action) -> None:
        match action:
            case Publish() | Send() | OpenControl() | OpenTokens() | CloseLink():
                self._links[action.link].perform(action)
                if isinstance(action, Send) and isinstance(action.message, m.Page):
                    # A bundle of pages would be longer than a control message may be.
                    self._links[action.link].flush()
            case a.StartRun(start):
                self._order(start)
            case a.StopRun(key):
                self._order(proto.Stop(key))
            case a.SpawnEngine(safe):
                config = self._config
                configure = proto.Configure(config.engine, config.model, config.fake, config.llama, safe)
                self.engine = EngineProcess(configure, config.name)
            case a.KillEngine():
                if self.engine is not None:
                    self.engine.kill()
            case a.NotifyReady():
                self._herald.hurry()
                self._on_ready()
            case a.Log(text, warning, request):
                level = logging.WARNING if warning else logging.INFO
                log.log(level, "%s", text, extra={"request": request.hex()} if request else None)
            case a.Exit(text, status):
                self._exit, self.status = text, status
            case _:
                assert_never(action)

    def _order(self, message: proto.EngineMessage) -> None:
        if self.engine is not None:
            self.engine.order(message)

    def _close(self) -> None:
        if self.engine is not None:
            self.engine.reap()
            self.engine = None
        for link in self._links.values():
            link.close()
        self._context.term()
        self._wake.close()
        self._waker.close()


def _engine_event(message: proto.ToAgent) -> e.EngineEvent:
    match message:
        case proto.Step(outputs):
            return e.EngineStep(outputs)
        case proto.Refused(key, error, final):
            return e.EngineRefused(key, error, final)
        case proto.Ready(models, slots, note):
            return e.EngineReady(models, slots, note)
        case proto.Progress(note, problem, percent):
            return e.EngineProgressed(note, problem, percent)
        case _:
            assert_never(message)


def _software() -> str:
    try:
        return f"llambo {metadata.version('llambo')}"
    except metadata.PackageNotFoundError:
        return "llambo"  # run from a checkout that was not installed


def run_worker(config: WorkerConfig, on_ready: Callable[[], None] = lambda: None, herald: Herald | None = None) -> int:
    """A whole worker process, in the main thread. The exit status."""
    agent = Agent(config, on_ready, herald)
    with signals_wake(agent.waker_fd):
        agent.run()
    return agent.status
