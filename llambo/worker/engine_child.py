"""The engine child: `python -m llambo.worker.engine_child --fd N --parent PID --worker NAME`.

Started by the agent alone. One thread decodes, one reads the pipe. The reader is also the watcher: when the agent is
gone the pipe closes, and the process ends there and then, also in the middle of a decode. The kernel is asked to do
the same. A killed agent leaves nothing behind."""

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
from typing import Any, Protocol

from llambo.mesh.service import clock
from llambo.mesh.service.host import end_with_parent
from llambo.worker.engine import engine_log
from llambo.worker.engine import protocol as proto
from llambo.worker.engine.fake import FakeEngine

READ_BYTES = 64 * 1024
#: How often a thread of llama.cpp looks whether the others are there before it sleeps. libgomp's own choice is 300
#: times that. With the cores to itself an engine is as fast either way (166 tokens/s for 8 streams on two cores, 206
#: for 16); where another process wants one, too, each step then waits for the scheduler (27 tokens/s instead of 79
#: for one stream). Whoever sets the variable decides.
SPIN_COUNT = 1000
#: How often a fake engine that loads says so.
FAKE_LOAD_PERCENT = 1
#: Of -1000 to 1000: how gladly the kernel ends this process when there is no memory left.
OOM_SCORE = 500


class Engine(Protocol):
    """What the loop below drives. The fake engine and the simulator have the same shape."""

    fault: Any

    def ready(self) -> proto.Ready: ...
    def start(self, start: proto.Start, now_ms: int) -> proto.Refused | None: ...
    def stop(self, key: bytes) -> None: ...
    def step(self, now_ms: int) -> list[proto.Output]: ...
    def next_wakeup_ms(self) -> int: ...


def make_engine(configure: proto.Configure, say: Callable[[proto.Progress], None]) -> Engine:
    if configure.engine == "fake":
        load_fake(configure, say)
        return FakeEngine(configure.fake, configure.model)
    if configure.engine == "llama":
        # Read when the library is loaded, so before that.
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
        from llambo.worker.llama.llama_load import load  # noqa: PLC0415  # only here is llama.cpp needed

        return load(configure, say)
    raise SystemExit(f"there is no engine {configure.engine!r}; this release has: fake, llama")


def load_fake(configure: proto.Configure, say: Callable[[proto.Progress], None]) -> None:
    """The time that a real model would take, told as that would tell it."""
    knobs = configure.fake
    for percent in range(0, 100, FAKE_LOAD_PERCENT) if knobs.load_ms else ():
        say(proto.Progress(f"loading {configure.model}: {percent} %", percent=percent))
        time.sleep(knobs.load_ms * FAKE_LOAD_PERCENT / 100 / 1000)
    if knobs.load_file and not Path(knobs.load_file).exists():
        say(proto.Progress(problem=f"there is no file {knobs.load_file}"))
        sys.exit(proto.CANNOT_LOAD)
    if knobs.load_crash == "always" or (knobs.load_crash == "careless" and not configure.safe):
        suffer("crash")


class Child:
    """The loop: orders in, one step, one message out."""

    def __init__(self, pipe: socket.socket) -> None:
        self._pipe = pipe
        self._orders: queue.SimpleQueue[proto.EngineMessage] = queue.SimpleQueue()

    def run(self) -> None:
        threading.Thread(target=self._read, name="watcher", daemon=True).start()
        configure = self._orders.get()
        if not isinstance(configure, proto.Configure):
            raise SystemExit(f"the agent began with {configure!r}")
        engine = make_engine(configure, self._say)
        self._say(engine.ready())
        while True:
            self._obey(engine)
            if engine.next_wakeup_ms() <= clock.now_ms():
                self._say(proto.Step(engine.step(clock.now_ms())))
                if engine.fault:
                    suffer(engine.fault)

    def _obey(self, engine: Engine) -> None:
        """All orders that are here, and until a step is due whatever comes."""
        orders = self._orders
        while True:
            wait_ms = engine.next_wakeup_ms() - clock.now_ms()
            if wait_ms <= 0 and orders.empty():
                return
            try:
                # A wait has an upper limit on some platforms; a day is as good as for ever.
                order = orders.get(timeout=min(max(wait_ms, 0) / 1000, 86_400.0))
            except queue.Empty:
                return
            self._obey_one(engine, order)

    def _obey_one(self, engine: Engine, order: proto.EngineMessage) -> None:
        match order:
            case proto.Start():
                refused = engine.start(order, clock.now_ms())
                if refused is not None:
                    self._say(refused)
            case proto.Stop(key):
                engine.stop(key)
            case proto.Shutdown():
                os._exit(0)
            case _:
                raise SystemExit(f"an order that makes no sense here: {order!r}")

    def _say(self, message: proto.EngineMessage) -> None:
        """Waits while the agent is behind: an engine that runs ahead of it would only fill memory."""
        self._pipe.sendall(proto.pack(message))

    def _read(self) -> None:
        unpacker = proto.from_agent()
        try:
            while data := self._pipe.recv(READ_BYTES):
                for order in unpacker.feed(data):
                    self._orders.put(order)
        except proto.BadFrame as error:
            engine_log.tell(str(error), logging.ERROR)
        finally:
            # Also after a reset of the pipe, which is what a killed agent can look like. Not sys.exit: that would
            # wait for the decoding thread, which may never come back.
            os._exit(1)


def suffer(fault: str) -> None:
    """Do what the fake engine was told to fall ill with."""
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    while True:  # hang: alive, deaf and dumb
        signal.pause()


def be_first_to_go() -> None:
    """If memory runs out: this is what takes it, and the agent that survives has another one made."""
    path = Path("/proc/self/oom_score_adj")
    try:
        if int(path.read_text(encoding="ascii")) < OOM_SCORE:
            path.write_text(str(OOM_SCORE), encoding="ascii")
    except OSError as error:
        engine_log.tell(
            f"{path}: {error.strerror}; if memory runs out the kernel may choose the agent", logging.WARNING
        )


def main(arguments: list[str]) -> None:
    fd, parent = int(arguments[arguments.index("--fd") + 1]), int(arguments[arguments.index("--parent") + 1])
    end_with_parent(parent)
    engine_log.begin(arguments[arguments.index("--worker") + 1] if "--worker" in arguments else "")
    # Ctrl-C and a supervisor's SIGTERM reach the whole group; the agent decides how long to go on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A core file would hold people's prompts.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    be_first_to_go()
    with socket.socket(fileno=fd) as pipe:
        Child(pipe).run()


if __name__ == "__main__":
    main(sys.argv[1:])
