"""The engine child: `python -m llambo.worker.engine_child --fd N --parent PID --worker NAME [--hosted]`.

Only the agent starts it. One thread decodes, one reads the pipe. When the agent is gone the pipe closes, and the reader
ends the process at once, also in the middle of a decode. The kernel is asked to do the same. So a killed agent leaves
no engine behind.
"""

from __future__ import annotations

import logging
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from llambo.mesh.service import clock, journal
from llambo.mesh.service.host import end_with_parent
from llambo.worker.engine import protocol as proto
from llambo.worker.engine.fake import FakeEngine

log = logging.getLogger("llambo.engine")

READ_BYTES = 64 * 1024
#: Our end of the pipe. It is closed by the end of the process and not before: an agent that sees it closed kills what
#: is left of the process, and would report that instead of its exit status.
_PIPES: list[socket.socket] = []
#: How often a thread of llama.cpp checks whether the others have arrived before it sleeps. The default of libgomp is
#: 300 times that. On idle cores an engine is as fast either way (166 tokens/s for 8 streams on two cores, 206 for 16).
#: With the default, when another process uses a core, each step waits for the scheduler (27 tokens/s instead of 79 for
#: one stream). A value that is set in the environment is respected.
SPIN_COUNT = 1000
#: Steps in which a fake engine that loads reports progress.
FAKE_LOAD_PERCENT = 1
#: From -1000 to 1000. The kernel prefers to kill processes with a high score when memory runs out.
OOM_SCORE = 500


class Engine(Protocol):
    """What the loop below drives. Both engines have this interface, and the simulator calls the fake one through it."""

    fault: proto.Fault | None

    def ready(self) -> proto.Ready: ...
    def start(self, start: proto.Start, now_ms: int) -> proto.Refused | None: ...
    def stop(self, key: bytes) -> None: ...
    def step(self, now_ms: int) -> list[proto.Output]: ...
    def next_wakeup_ms(self) -> int: ...


def make_engine(configure: proto.Configure, send: Callable[[proto.EngineMessage], None]) -> Engine:
    if configure.engine == "fake":
        memory = load_fake(configure, send)
        return FakeEngine(configure.fake, configure.model_name, memory)
    if configure.engine == "llama":
        # libgomp reads it when it is loaded, so it has to be set before.
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
        from llambo.worker.llama.loading import load  # noqa: PLC0415  # a fake engine does not need llama.cpp

        return load(configure, send, alive=lambda: send(proto.Step()))
    raise SystemExit(f"there is no engine {configure.engine!r}; there are fake and llama")


def load_fake(configure: proto.Configure, send: Callable[[proto.Progress], None]) -> bytes:
    """Take as long as a real model would, with the same progress reports. Returns the memory that it takes."""
    options, faults, name = configure.fake, configure.fake.faults, configure.model_name
    for percent in range(0, 100, FAKE_LOAD_PERCENT) if options.load_ms else ():
        send(proto.Progress(f"loading {name}: {percent} %", percent=percent))
        time.sleep(options.load_ms * FAKE_LOAD_PERCENT / 100 / 1000)
    needed = faults.load_file.replace("{model}", name)
    if needed and not Path(needed).exists():
        send(proto.Progress(problem=f"there is no file {needed}"))
        sys.exit(proto.CANNOT_LOAD)
    try:
        memory = b"\1" * options.memory_bytes
    except MemoryError:
        text = f"there is no memory of {options.memory_bytes} bytes"
        send(proto.Progress(problem=text, out_of_memory=True))
        sys.exit(proto.CANNOT_LOAD)
    if faults.load_crash == "always" or (faults.load_crash == "careless" and not configure.safe):
        inject_fault("crash")
    return memory


def start_log(worker: str, *, hosted: bool) -> None:
    """Lines on stderr, or entries of the journal if stderr leads there. `worker`: the worker of this engine.

    `hosted`: there are engines of other workers beside it.
    """
    handler: logging.Handler = logging.StreamHandler()
    prefix = f"llambo engine of {worker}" if hosted else "llambo engine"
    if journal.is_journal(os.environ, sys.stderr.fileno()):
        handler = journal.JournalHandler("llambo-worker", sys.stderr, {"worker": worker})
        prefix = "engine"
    handler.setFormatter(journal.HumanFormatter(f"{prefix}: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    # An error may quote a prompt or a model file: a terminal gets it without control characters, as it gets the log.
    sys.excepthook = lambda *error: log.critical("the engine has failed", exc_info=error)


class Child:
    """The loop: read orders, decode one step, send one message."""

    def __init__(self, pipe: socket.socket) -> None:
        self._pipe = pipe
        self._orders: queue.SimpleQueue[proto.EngineMessage] = queue.SimpleQueue()

    def run(self) -> None:
        threading.Thread(target=self._read, name="watcher", daemon=True).start()
        configure = self._orders.get()
        if not isinstance(configure, proto.Configure):
            raise SystemExit(f"the first message of the agent is {configure!r}")
        engine = make_engine(configure, self._send)
        self._send(engine.ready())
        while True:
            self._follow_orders(engine)
            if engine.next_wakeup_ms() <= clock.now_ms():
                self._send(proto.Step(engine.step(clock.now_ms())))
                if engine.fault:
                    inject_fault(engine.fault)

    def _follow_orders(self, engine: Engine) -> None:
        """All orders that have arrived, then those that arrive until a step is due."""
        orders = self._orders
        while True:
            wait_ms = engine.next_wakeup_ms() - clock.now_ms()
            if wait_ms <= 0 and orders.empty():
                return
            try:
                # Some platforms limit how long one may wait; a day is long enough.
                order = orders.get(timeout=min(max(wait_ms, 0) / 1000, 86_400.0))
            except queue.Empty:
                return
            self._follow(engine, order)

    def _follow(self, engine: Engine, order: proto.EngineMessage) -> None:
        match order:
            case proto.Start():
                refused = engine.start(order, clock.now_ms())
                if refused is not None:
                    self._send(refused)
            case proto.Stop(key):
                engine.stop(key)
            case proto.Shutdown():
                os._exit(0)
            case _:
                raise SystemExit(f"not an order for an engine: {order!r}")

    def _send(self, message: proto.EngineMessage) -> None:
        """Blocks while the agent is behind: an engine that runs ahead of it would only fill memory."""
        self._pipe.sendall(proto.pack(message))

    def _read(self) -> None:
        unpacker = proto.from_agent()
        try:
            while data := self._pipe.recv(READ_BYTES):
                for order in unpacker.feed(data):
                    self._orders.put(order)
        except proto.BadFrame as error:
            log.error("%s", error)
        finally:
            # Also after a reset of the pipe, which a killed agent can cause. Not sys.exit: that would wait for the
            # decoding thread, which may never return.
            os._exit(1)


def inject_fault(fault: str) -> None:
    """Crash or hang, as the options of the fake engine ask."""
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    while True:  # hang: alive, without reading or writing
        signal.pause()


def prefer_to_be_killed() -> None:
    """If memory runs out, the kernel has to kill the engine, which uses it. The agent survives and starts another."""
    path = Path("/proc/self/oom_score_adj")
    try:
        if int(path.read_text(encoding="ascii")) < OOM_SCORE:
            path.write_text(str(OOM_SCORE), encoding="ascii")
    except OSError as error:
        log.warning("%s: %s; if memory runs out the kernel may kill the agent instead", path, error.strerror)


def main(arguments: list[str]) -> None:
    fd, parent = int(arguments[arguments.index("--fd") + 1]), int(arguments[arguments.index("--parent") + 1])
    end_with_parent(parent)
    worker = arguments[arguments.index("--worker") + 1] if "--worker" in arguments else ""
    start_log(worker, hosted="--hosted" in arguments)
    # Ctrl-C and SIGTERM reach the whole process group; the agent decides how long to go on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A core file would contain prompts.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prefer_to_be_killed()
    _PIPES.append(socket.socket(fileno=fd))
    Child(_PIPES[0]).run()


if __name__ == "__main__":
    main(sys.argv[1:])
