"""The agent: the shell of the worker core, one thread with a poll loop.

It polls the sockets of its links, the pipe of its engine and a wake-up pipe for signals, turns what arrives into
events for the core, and performs the actions that the core returns. It decides nothing.

`condition` is the state for the service manager (systemd). It is read from the core, which knows nothing of managers. A
worker is ready when it is useful: welcomed by a broker, its model loaded and tested, its token plane proved. It is
healthy as long as its engine works: the core kills an engine that has sequences and is silent for `stall_ms`, and the
watchdog is not fed until that process is gone. So a worker that cannot get rid of its engine is restarted as a whole.
That the loop runs is shown by `condition` being called.

`EngineProcess` is the engine child as it is seen from here: a process and a pipe. Both may fail, neither may block.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import assert_never

import zmq

import llambo
from llambo.mesh.link import sockets
from llambo.mesh.link.link import Link
from llambo.mesh.link.link_core import CloseLink, LinkCore, OpenControl, OpenTokens, Publish, Send
from llambo.mesh.security.keys import CREDENTIALS_ENV, KEY_ENV
from llambo.mesh.service import clock
from llambo.mesh.service.host import stop_signals_wake
from llambo.mesh.service.notify_core import Condition
from llambo.mesh.service.service_manager import Notifier
from llambo.mesh.wire import codec
from llambo.mesh.wire import messages as m
from llambo.worker.agent import events as e
from llambo.worker.agent.announcement import ProcessIdentity
from llambo.worker.agent.core import WorkerCore
from llambo.worker.agent.engine_life import EngineState
from llambo.worker.config import WorkerConfig
from llambo.worker.engine import protocol as proto

log = logging.getLogger(__name__)

#: The module that the child runs.
MODULE = "llambo.worker.engine_child"
#: Bytes taken from the pipe before the sockets get a turn.
READ_BYTES = 64 * 1024
#: Signals that come from a person, a supervisor, or the kernel when memory runs out.
SIGNALS_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
#: How long a process that was killed, or closed its pipe, may take to be gone.
REAP_S = 10.0
#: Environment variables that contain a key, or the path of one.
SECRETS = (KEY_ENV, CREDENTIALS_ENV)
#: The longest sleep: zmq takes milliseconds as an int.
POLL_MS = 60_000
POLL_BOTH = int(zmq.POLLIN | zmq.POLLOUT)
#: Written to the waker: stop unless busy. All other bytes, which are numbers of signals, mean stop.
UNLESS_BUSY = 255
#: The first byte of an XPUB frame that is a subscription.
SUBSCRIBE = b"\x01"


class EngineProcess:
    """One engine child, from its start until it is reaped."""

    def __init__(self, configure: proto.Configure, worker: str = "") -> None:
        """`worker`: the name of the worker, for the log of the engine.

        The kernel kills the engine when the thread that has started it ends.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        command = [sys.executable, "-m", MODULE]
        with theirs:
            self._process = subprocess.Popen(
                [
                    *command,
                    "--fd",
                    str(theirs.fileno()),
                    "--parent",
                    str(os.getpid()),
                    "--worker",
                    worker,
                    *(["--hosted"] if configure.hosted else []),
                ],
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

    def read(self) -> list[proto.ToAgent] | None:
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


class Waker:
    """Bytes for a loop that polls, from signal handlers and other threads. After `close` they are dropped."""

    def __init__(self) -> None:
        self._reading, self._writing = socket.socketpair()
        self._reading.setblocking(False)
        self._writing.setblocking(False)
        #: Of threads that write, so that the descriptor is not closed and taken by another file meanwhile.
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """To poll."""
        return self._reading.fileno()

    @property
    def writing_fd(self) -> int:
        return self._writing.fileno()

    def send(self, byte: int) -> None:
        # If it is full, the loop is awake.
        with self._lock, suppress(BlockingIOError):
            if self._writing.fileno() >= 0:
                self._writing.send(bytes([byte]))

    def receive(self) -> bytes:
        try:
            return self._reading.recv(4096)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        with self._lock:
            self._reading.close()
            self._writing.close()


class Agent:
    """One worker. `run` returns when it has left the mesh. `stop` and `unload` may be called from any thread."""

    def __init__(
        self,
        config: WorkerConfig,
        on_ready: Callable[[], None] = lambda: None,
        notifier: Notifier | None = None,
        watch: Callable[[WorkerCore], None] | None = None,
    ) -> None:
        """`watch` is called after each turn of the loop, in the thread of the loop."""
        identity = ProcessIdentity(
            secrets.token_bytes(8), socket.gethostname(), os.getpid(), f"llambo {llambo.__version__}"
        )
        self.core = WorkerCore(config, identity)
        self.engine: EngineProcess | None = None
        self._first = True
        self._config = config
        self._on_ready = on_ready
        self._notifier = notifier or Notifier()
        self._watch = watch
        #: Of log lines, if there are other workers in this process.
        self._log_name = config.name if watch is not None else None
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
        self._waker = Waker()
        self._poller = zmq.Poller()
        self._exit = ""
        #: The exit status of the process.
        self.status = 0

    @property
    def waker_fd(self) -> int:
        """Each byte written here is a request to stop: the first after all runs have ended, the second at once."""
        return self._waker.writing_fd

    @property
    def ended(self) -> str:
        """Why it has ended."""
        return self._exit

    def stop(self) -> None:
        self._waker.send(0)

    def unload(self) -> None:
        """Stop, unless it has runs: `DrainState.refusals` then rises."""
        self._waker.send(UNLESS_BUSY)

    def run(self) -> None:
        try:
            self._handle(e.Ticked())
            while not self._exit:
                self._turn()
            if not self.status:
                log.info("%s", self._exit, extra={"worker": self._log_name})
            self._tell_manager(self._exit if self.status else "")
        finally:
            self._close()

    def _turn(self) -> None:
        self._flush()
        due_ms = min(self.core.next_wakeup_ms(), self._notifier.next_wakeup_ms())
        ready = dict(self._watched().poll(min(max(due_ms - clock.now_ms(), 0), POLL_MS)))
        if self._waker.fileno() in ready:
            for byte in self._waker.receive():
                self._handle(e.StopRequested(unless_busy=byte == UNLESS_BUSY))
            self._notifier.update_soon()
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
        if clock.now_ms() >= self._notifier.next_wakeup_ms():
            self._tell_manager()
        if self._watch is not None:
            self._watch(self.core)

    def _tell_manager(self, why: str = "") -> None:
        now = clock.now_ms()
        state = condition(self.core, self._config.brokers, now)
        self._notifier.update(replace(state, status=why) if why else state, now)

    def _watched(self) -> zmq.Poller:
        """The poller is made again only if the sockets have changed, which is rare between two tokens."""
        polled: list[tuple[zmq.Socket[bytes] | int, int]] = [(self._waker.fileno(), zmq.POLLIN)]
        for link in self._links.values():
            if link.control is not None:
                polled.append((link.control, POLL_BOTH if link.wants_to_write else zmq.POLLIN))
            if link.tokens is not None:
                polled.append((link.tokens, zmq.POLLIN))
            if link.monitor is not None:
                polled.append((link.monitor, zmq.POLLIN))
            if link.lookup is not None:
                polled.append((link.lookup.fileno(), zmq.POLLIN))
        if self.engine is not None:
            polled.append((self.engine.fileno(), POLL_BOTH if self.engine.wants_to_write else zmq.POLLIN))
        if polled != self._poller.sockets:
            self._poller = zmq.Poller()
            for target, flags in polled:
                self._poller.register(target, flags)
        return self._poller

    def _flush(self) -> None:
        # The engine first: clients are waiting for what it is about to start.
        if self.engine is not None:
            self.engine.push()
        for link in self._links.values():
            link.flush()

    def _receive_control(self, number: int, link: Link) -> None:
        for bundle in link.receive_control():
            for problem in bundle.problems:
                log.warning("from the broker: %s", problem.error.text, extra={"worker": self._log_name})
            if bundle.messages:
                self._handle(e.ControlArrived(number, bundle.session, bundle.messages))

    def _receive_engine(self, engine: EngineProcess) -> None:
        garbled = False
        try:
            messages = engine.read()
        except proto.BadFrame as error:
            log.warning("%s", error)
            messages, garbled = None, True
        if messages is None:
            text, outside = engine.reap()
            self.engine = None
            self._handle(e.EngineDied(text, outside and not garbled))
            return
        for message in messages:
            self._handle(message)

    def _handle(self, event: e.Event) -> None:
        for action in self.core.handle(event, clock.now_ms()):
            self._perform(action)

    def _perform(self, action: e.Action) -> None:
        match action:
            case Publish() | Send() | OpenControl() | OpenTokens() | CloseLink():
                self._links[action.link].perform(action)
                if isinstance(action, Send) and isinstance(action.message, m.Page):
                    # Several pages in one bundle would exceed the limit of a control message.
                    self._links[action.link].flush()
            case e.StartRun(start):
                self._send_to_engine(start)
            case e.StopRun(key):
                self._send_to_engine(proto.Stop(key))
            case e.SpawnEngine(safe):
                config = self._config
                configure = proto.Configure(
                    config.engine, config.model, fake=config.fake, llama=config.llama, safe=safe, first=self._first,
                    served_as=config.served_as, hosted=self._log_name is not None,
                )  # fmt: skip
                self._first = False
                self.engine = EngineProcess(configure, config.name)
            case e.KillEngine():
                if self.engine is not None:
                    self.engine.kill()
            case e.NotifyReady():
                self._notifier.update_soon()
                self._on_ready()
            case e.Log(text, warning, request):
                level = logging.WARNING if warning else logging.INFO
                about = {"request": request.hex() if request else "", "worker": self._log_name}
                log.log(level, "%s", text, extra=about)
            case e.Exit(text, status):
                self._exit, self.status = text, status
            case _:
                assert_never(action)

    def _send_to_engine(self, message: proto.EngineMessage) -> None:
        if self.engine is not None:
            self.engine.order(message)

    def _close(self) -> None:
        try:
            if self.engine is not None:
                self.engine.reap()
                self.engine = None
        finally:
            for link in self._links.values():
                link.close()
            self._context.term()
            self._waker.close()


def run_worker(
    config: WorkerConfig,
    on_ready: Callable[[], None] = lambda: None,
    notifier: Notifier | None = None,
    on_failure: Callable[[str], None] = log.error,
) -> int:
    """Run a worker process in the main thread. Returns the exit status, and reports why it is not 0."""
    agent = Agent(config, on_ready, notifier)
    with stop_signals_wake(agent.waker_fd):
        agent.run()
    if agent.status:
        on_failure(agent.ended)
    return agent.status


def condition(core: WorkerCore, brokers: tuple[str, ...], now_ms: int) -> Condition:
    leaving = core.exited or core.drain.stopping
    return Condition(
        _status(core, brokers, leaving),
        ready=core.ready_notified,
        well=core.engine.is_responsive(now_ms, core.runs.active > 0),
        leaving=leaving,
    )


def _status(core: WorkerCore, brokers: tuple[str, ...], leaving: bool) -> str:
    active = core.runs.active
    if leaving:
        return f"stopping, {active} still running" if active else "stopping"
    engine = core.engine
    if not engine.is_ready:
        state = "starting the engine" if engine.state is not EngineState.DOWN else "without an engine"
        return engine.note or state
    links = list(core.links.values())
    up = [link for link in links if link.up]
    if not any(link.welcomed for link in links):
        return _searching(core, brokers, links)
    if not up and not core.ready_notified:
        return f"joining {_broker(next(link for link in links if link.welcomed))}"
    slots = engine.ready.slots if engine.ready is not None else 0
    parts = [f"busy {active}/{slots}, {core.rate.last:.0f} tok/s" if active else f"idle, {slots} slots"]
    if core.drain.drained:
        parts.append("drained: no new work")
    if len(up) < len(links):
        parts.append("the token plane is being rebuilt" if len(links) == 1 else f"{len(up)} of {len(links)} brokers")
    return "; ".join(parts)


def _searching(core: WorkerCore, brokers: tuple[str, ...], links: list[LinkCore]) -> str:
    why = next((link.problem for link in links if link.problem), "")
    running = f"; {core.runs.active} requests go on without one" if core.runs.active else ""
    return f"looking for a broker at {', '.join(brokers)}{f' ({why})' if why else ''}{running}"


def _broker(link: LinkCore) -> str:
    return f"broker {link.terms.broker}" if link.terms.broker else "a broker"
