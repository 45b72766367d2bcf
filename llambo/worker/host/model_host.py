"""The host: the shell of the host core, one thread with a poll loop, and a thread for each loaded model.

    main thread     links to the brokers, the core, signals
    worker NAME     an `Agent` each, with its own links and its own engine child
    catalogue       looks for models, and for changes of their files
    share, fetch REF   files for other hosts, and from them (`worker/share/`)

The other threads send events over a queue; the main thread stops their agents, and reads nothing of their state.
`WorkerEnded` is sent when the engine process is reaped, so that its memory is free.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, assert_never

import zmq

import llambo
from llambo.mesh.link import sockets
from llambo.mesh.link.link import Link
from llambo.mesh.link.link_core import CloseLink, OpenControl, OpenTokens, Publish, Send
from llambo.mesh.service import clock
from llambo.mesh.service.host import stop_signals_wake
from llambo.mesh.service.notify_core import Condition
from llambo.mesh.service.service_manager import Notifier
from llambo.mesh.wire import codec
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import LlamboError
from llambo.worker.agent.agent import POLL_BOTH, POLL_MS, Agent, Waker
from llambo.worker.agent.announcement import ProcessIdentity
from llambo.worker.agent.core import WorkerCore
from llambo.worker.agent.events import ConnectionChanged, ControlArrived, Exit, Log, NotifyReady, StopRequested, Ticked
from llambo.worker.config import HostConfig, WorkerConfig
from llambo.worker.host.catalogue import BadName, Catalogue, Servable
from llambo.worker.host.file_orders import ENDED
from llambo.worker.host.host_core import HostCore
from llambo.worker.host.host_events import (
    FetchModel,
    FileChanged,
    GrantFiles,
    HostAction,
    HostEvent,
    ModelsFound,
    StartWorker,
    StopFetching,
    StopWorker,
    UnloadWorker,
    WorkerChanged,
    WorkerEnded,
)
from llambo.worker.share.model_fetch import ModelFetch
from llambo.worker.share.share_server import ShareServer, Stock

log = logging.getLogger(__name__)

#: The pause between two looks at the files of models: within these bounds, so many times as long as a look takes.
SCAN_S, SCAN_SHARE = (1.0, 5.0), 100


class ModelHost:
    """`run` returns when the last worker has ended."""

    def __init__(
        self,
        config: HostConfig,
        catalogue: Catalogue,
        on_ready: Callable[[], None] = lambda: None,
        notifier: Notifier | None = None,
    ) -> None:
        self._inbox = Inbox()
        self._library = Stock()
        self._share = None
        if config.share:
            self._share = ShareServer(
                config.share, config.key, self._library, lambda: self._inbox.post(SharingFailed())
            )
            config = replace(config, share=reachable(self._share.host, self._share.port, config.brokers[0]))
            log.info("files of models are given to other hosts at %s, if a broker grants it", config.share)
        self._fetches: dict[str, ModelFetch] = {}
        self.core = HostCore(
            config,
            ProcessIdentity(secrets.token_bytes(8), socket.gethostname(), os.getpid(), f"llambo {llambo.__version__}"),
        )
        self.workers: dict[str, HostedWorker] = {}
        self._config = config
        self._models: dict[str, Servable] = {}
        self._on_ready = on_ready
        self._notifier = notifier or Notifier()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._links = {
            number: Link(
                self._context,
                address,
                token_kind=zmq.XPUB,  # never opened
                offset=sockets.WORKER_OFFSET,
                decoder=codec.to_host,
                key=config.key,
            )
            for number, address in enumerate(config.brokers)
        }
        self._looker = Looker(catalogue, self._inbox)
        self._waker = Waker()
        self._exit = ""

    @property
    def waker_fd(self) -> int:
        """Each byte written here is a request to stop: the first after all runs have ended, the second at once."""
        return self._waker.writing_fd

    @property
    def failure(self) -> str:
        """Why it stops; empty: because it was asked to."""
        return self._share.failure if self._share is not None else ""

    def run(self) -> None:
        try:
            self._looker.start()
            self._handle(Ticked())
            while not self._exit:
                self._turn()
            log.info("%s", self._exit)
            self._tell_manager()
        finally:
            self._close()

    def _turn(self) -> None:
        for link in self._links.values():
            link.flush()
        due_ms = min(self.core.next_wakeup_ms(), self._notifier.next_wakeup_ms())
        ready = dict(self._watched().poll(min(max(due_ms - clock.now_ms(), 0), POLL_MS)))
        if self._waker.fileno() in ready:
            for _ in self._waker.receive():
                self._handle(StopRequested())
            self._notifier.update_soon()
        for event in self._inbox.take():
            self._handle_posted(event)
        for number, link in self._links.items():
            if link.lookup is not None and link.lookup.done:
                link.answered()
            if link.control in ready:
                self._receive(number, link)
            if link.monitor in ready:
                for change in link.receive_changes():
                    self._handle(ConnectionChanged(number, change))
        if clock.now_ms() >= self.core.next_wakeup_ms():
            self._handle(Ticked())
        if clock.now_ms() >= self._notifier.next_wakeup_ms():
            self._tell_manager()

    def _watched(self) -> zmq.Poller:
        poller = zmq.Poller()
        poller.register(self._waker.fileno(), zmq.POLLIN)
        poller.register(self._inbox.fileno(), zmq.POLLIN)
        for link in self._links.values():
            if link.control is not None:
                poller.register(link.control, POLL_BOTH if link.wants_to_write else zmq.POLLIN)
            if link.monitor is not None:
                poller.register(link.monitor, zmq.POLLIN)
            if link.lookup is not None:
                poller.register(link.lookup.fileno(), zmq.POLLIN)
        return poller

    def _receive(self, number: int, link: Link) -> None:
        for bundle in link.receive_control():
            for problem in bundle.problems:
                log.warning("from the broker: %s", problem.error.text)
            if bundle.messages:
                self._handle(ControlArrived(number, bundle.session, bundle.messages))

    def _handle_posted(self, event: Posted) -> None:
        if isinstance(event, SharingFailed):
            # No broker takes back what a hello said, and a new process can share again.
            log.error("%s; this host stops, and has to be started again", self.failure)
            event = Ticked() if self.core.loading.stopping else StopRequested()
        elif isinstance(event, Scanned):
            self._models |= event.models  # what is loaded may have gone from the folder
            event = ModelsFound([each.stored for each in event.models.values()], event.missing)
        elif isinstance(event, FetchReport):
            if self._fetches.get(event.file.ref) is not event.fetch:
                return  # it was stopped
            if event.file.state in ENDED:
                del self._fetches[event.file.ref]
                self._looker.look_now()
            event = FileChanged(event.file)
        elif isinstance(event, WorkerEnded):
            self._join(event.model)
        self._handle(event)

    def _start(self, model: str, worker: str) -> None:
        host = self._config
        config = replace(
            self._models[model].config, name=worker, brokers=host.brokers, key=host.key, node_class=host.node_class
        )
        try:
            self.workers[model] = HostedWorker(model, config, self._inbox)
        except (OSError, RuntimeError, zmq.ZMQError) as error:  # no descriptors, or no threads, are left
            self._inbox.post(WorkerEnded(model, f"its worker cannot be started: {error}"))

    def _fetch(self, order: m.FileOrder) -> None:
        fetch = self._fetches.get(order.ref)
        if fetch is not None:
            fetch.update(order)
            return
        try:
            self._fetches[order.ref] = ModelFetch(
                order, self._config.key, self._library, lambda *each: self._inbox.post(FetchReport(*each))
            )
        except (OSError, RuntimeError, zmq.ZMQError) as error:  # no descriptors, or no threads, are left
            note = f"it cannot be fetched: {error}"
            self._inbox.post(FileChanged(m.HostedFile(order.ref, "failed", note=note, attempt=order.attempt)))

    def _stop_fetching(self, ref: str) -> None:
        fetch = self._fetches.pop(ref, None)
        if fetch is not None:
            fetch.stop()

    def _join(self, model: str) -> None:
        worker = self.workers.pop(model, None)
        if worker is not None:
            worker.join()

    def _handle(self, event: HostEvent) -> None:
        for action in self.core.handle(event, clock.now_ms()):
            self._perform(action)

    def _perform(self, action: HostAction) -> None:
        match action:
            case Publish() | Send() | OpenControl() | OpenTokens() | CloseLink():
                self._links[action.link].perform(action)
            case StartWorker(model, worker):
                self._start(model, worker)
            case UnloadWorker(model) if model in self.workers:
                self.workers[model].unload()
            case StopWorker(model) if model in self.workers:
                self.workers[model].stop()
            case UnloadWorker() | StopWorker():
                pass  # it has not started, or has just ended
            case FetchModel(order):
                self._fetch(order)
            case StopFetching(ref):
                self._stop_fetching(ref)
            case GrantFiles(grants):
                if self._share is not None:
                    self._share.grant(grants)
            case NotifyReady():
                self._notifier.update_soon()
                self._on_ready()
            case Log(text, warning):
                log.log(logging.WARNING if warning else logging.INFO, "%s", text)
            case Exit(text):
                self._exit = text
            case _:
                assert_never(action)

    def _tell_manager(self) -> None:
        now = clock.now_ms()
        self._notifier.update(condition_of(self.core, self._config.brokers, self._exit), now)

    def _close(self) -> None:
        self._looker.stop()
        for ref in list(self._fetches):
            self._stop_fetching(ref)
        if self._share is not None:
            self._share.close()
        for worker in self.workers.values():  # only if this loop has failed: the process ends, and the engines with it
            worker.stop()
            worker.stop()
        for link in self._links.values():
            link.close()
        self._context.term()
        self._waker.close()
        self._inbox.close()


def reachable(bound_to: str, port: int, broker: str) -> str:
    """The address of a socket of this host for others. One that is bound to all addresses has that which leads to the
    broker."""
    if bound_to in ("0.0.0.0", "::", "*"):  # noqa: S104 - only compared with
        host, broker_port = sockets.split(broker)
        try:
            ip = sockets.resolve(host)[0]
            with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((ip, broker_port))  # sends nothing
                bound_to = str(probe.getsockname()[0])
        except (LlamboError, OSError):  # the name may be defined later, and the network may be up later
            return sockets.endpoint(socket.gethostname(), port)
    return sockets.endpoint(bound_to, port)


class Scanned(NamedTuple):
    """What the catalogue has: by the name in the mesh, and what is named and missing."""

    models: dict[str, Servable]
    missing: tuple[str, ...]


class FetchReport(NamedTuple):
    fetch: ModelFetch
    file: m.HostedFile


class SharingFailed(NamedTuple):
    pass


Posted = Scanned | FetchReport | SharingFailed | HostEvent


class Inbox:
    """Events of other threads for the main thread, which polls it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Posted] = queue.SimpleQueue()
        self._waker = Waker()

    def fileno(self) -> int:
        return self._waker.fileno()

    def post(self, event: Posted) -> None:
        self._queue.put(event)
        self._waker.send(0)

    def take(self) -> list[Posted]:
        events: list[Posted] = []
        if self._waker.receive():
            with suppress(queue.Empty):
                while True:
                    events.append(self._queue.get_nowait())
        return events

    def close(self) -> None:
        self._waker.close()


class HostedWorker:
    """An agent on a thread of its own."""

    def __init__(self, model: str, config: WorkerConfig, inbox: Inbox) -> None:
        self._model = model
        self._inbox = inbox
        self._last = WorkerChanged(model, ready=False)
        self._agent = Agent(config, watch=self._watch)
        self._thread = threading.Thread(target=self._run, name=f"worker {config.name}", daemon=True)
        self._thread.start()

    def unload(self) -> None:
        self._agent.unload()

    def stop(self) -> None:
        self._agent.stop()

    def join(self) -> None:
        """It has sent `WorkerEnded`."""
        self._thread.join()

    # --- in the thread of the worker ---

    def _watch(self, core: WorkerCore) -> None:
        engine = core.engine
        memory_bytes = engine.ready.memory_bytes if engine.is_ready and engine.ready is not None else 0
        now = WorkerChanged(
            self._model, engine.is_ready, core.runs.active, engine.percent, core.drain.refusals, memory_bytes
        )
        if now != self._last:
            self._last = now
            self._inbox.post(now)

    def _run(self) -> None:
        agent, problem = self._agent, ""
        try:
            agent.run()
            problem = agent.ended if agent.status else ""
        except Exception as error:
            log.exception("the worker of %s has failed", self._model)
            problem = f"its worker has failed: {error!r}"
        # A process in an uninterruptible sleep of the kernel goes on to hold its memory.
        while (engine := agent.engine) is not None:
            try:
                engine.reap()
                agent.engine = None
            except subprocess.TimeoutExpired:
                log.warning("the engine of %s, process %d, was killed and is not gone", self._model, engine.pid)
        self._inbox.post(WorkerEnded(self._model, problem, agent.core.engine.out_of_memory))


class Looker:
    """The thread that looks for models."""

    def __init__(self, catalogue: Catalogue, inbox: Inbox) -> None:
        self._catalogue = catalogue
        self._inbox = inbox
        self._stopped = False
        self._due = threading.Event()
        self._thread = threading.Thread(target=self._run, name="catalogue", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """A look that has begun is not waited for: it may read from a slow disk."""
        self._stopped = True
        self._due.set()

    def look_now(self) -> None:
        """Something has changed."""
        self._due.set()

    def _run(self) -> None:
        last: Scanned | None = None
        problem = ""
        while not self._stopped:
            self._due.clear()
            began = clock.now_ms()
            try:
                found = Scanned(self._catalogue.scan(), self._catalogue.missing_refs)
            except (BadName, OSError) as error:
                if str(error) != problem:
                    problem = str(error)
                    log.warning("models cannot be looked for: %s", problem)
            except Exception as error:  # models that appear later would not be found by a thread that is gone
                if repr(error) != problem:
                    problem = repr(error)
                    log.exception("models cannot be looked for")
            else:
                problem = ""
                if found != last:
                    last = found
                    self._inbox.post(found)
            took_s = (clock.now_ms() - began) / 1_000
            self._due.wait(min(max(took_s * SCAN_SHARE, SCAN_S[0]), SCAN_S[1]))


def run_host(
    config: HostConfig, catalogue: Catalogue, on_ready: Callable[[], None], notifier: Notifier | None = None
) -> int:
    """Run a host in the main thread. Returns the exit status of the process."""
    host = ModelHost(config, catalogue, on_ready, notifier)
    with stop_signals_wake(host.waker_fd):
        host.run()
    return 1 if host.failure else 0


def condition_of(core: HostCore, brokers: tuple[str, ...], ended: str = "") -> Condition:
    """For the service manager."""
    loading = core.loading
    loaded = loading.loaded
    if ended or loading.stopping:
        return Condition(ended or f"stopping, {len(loaded)} models are still loaded", leaving=True)
    if not any(link.welcomed for link in core.links.values()):
        why = next((link.problem for link in core.links.values() if link.problem), "")
        text = f"looking for a broker at {', '.join(brokers)}{f' ({why})' if why else ''}"
        return Condition(text, ready=core.ready_notified)
    memory = ", ".join(f"{each.used >> 20} of {each.bytes >> 20} MiB of {name}"
                       for name, each in loading.memory().items())  # fmt: skip
    text = f"{len(loaded)} of {len(loading.models)} models loaded, {memory}"
    return Condition(text, ready=core.ready_notified)
