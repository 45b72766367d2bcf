"""A whole mesh on loopback for tests and benches: a broker, worker processes with their engines, and their story.

    with Mesh(workers=3, knobs=FakeKnobs(tokens_per_s=100)) as mesh:
        mesh.run(scenario(mesh))

The broker runs in a thread, where a test can look at its state, or (`broker="process"`) as a process of its own.
Nothing sleeps: whoever waits is woken by what it waits for, or by its deadline, and then the story is printed:
the broker's events and counters, what happened to the requests that did not end, what the processes wrote.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import msgspec

from llambo import Client
from llambo.broker.config import BrokerConfig
from llambo.broker.core import BrokerCore
from llambo.broker.report.metrics_http import Window
from llambo.mesh.link import sockets
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire.identity import Identity, PeerKey, Role
from llambo.worker.config import WorkerConfig
from llambo.worker.engine import fake_model
from llambo.worker.engine.engine_options import FakeKnobs
from tests.integration.broker_thread import BrokerThread
from tests.integration.processes import children, marked, wait_until_gone

#: No wait of a test takes longer, however busy the machine is.
TIMEOUT_S = 30.0
#: In the environment of every process of one mesh, so that those who outlive it are found.
MARK = "TEST_MESH"

WORKER = """
import logging, sys
import msgspec
from llambo.worker.agent.agent import run_worker
from llambo.worker.config import WorkerConfig

logging.basicConfig(level=logging.INFO)
sys.exit(run_worker(msgspec.json.decode(sys.argv[1], type=WorkerConfig), lambda: print("ready", flush=True)))
"""
BROKER = """
import logging, sys
from pathlib import Path
import msgspec
from llambo.broker.config import BrokerConfig
from llambo.mesh.security.keyring import Folder
from llambo.broker.server import run_broker

logging.basicConfig(level=logging.INFO)
config = msgspec.json.decode(sys.argv[1], type=BrokerConfig)
host, token_hwm, port, keys = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
folder = Folder(Path(keys)) if keys else None
sys.exit(run_broker(config, host, port, lambda port: print(port, flush=True), token_hwm=token_hwm, keys=folder))
"""

T = TypeVar("T")


class Process:
    """A child process that says one line when it is ready; whatever else it writes is kept for the story."""

    def __init__(self, name: str, code: str, *arguments: str, mark: str = "") -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, MARK: mark},
        )
        self.pid = self._process.pid

    def first_line(self, timeout_s: float = TIMEOUT_S) -> str:
        """What it says when it is ready."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline().decode() if readable else ""
        assert line, f"{self.name} was not ready within {timeout_s} s:\n{self.written()}"
        return line.strip()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def children(self) -> list[int]:
        return children(self.pid) if self.running else []

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {timeout_s} s:\n{self.written()}") from None

    def rss_bytes(self) -> int:
        return rss_bytes(self.pid)

    def written(self) -> str:
        """The end of what it wrote to stderr."""
        self._log.flush()
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), 4_000, max(0, size - 4_000)).decode(errors="replace")

    def everything(self) -> str:
        """All that it wrote to stderr."""
        self._log.flush()
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")

    def close(self) -> None:
        """Gently, or else not."""
        if self.running:
            self.send(signal.SIGCONT)
            self.send(signal.SIGTERM)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait(TIMEOUT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()


class Mesh:
    """A broker and its workers. `config`, `knobs` and `worker` are what they are told."""

    def __init__(
        self,
        workers: int = 1,
        *,
        knobs: FakeKnobs | None = None,
        config: BrokerConfig | None = None,
        worker: WorkerConfig | None = None,
        broker: Literal["thread", "process"] = "thread",
        host: str = "127.0.0.1",
        token_hwm: int = sockets.TOKEN_HWM,
        check: bool = False,
        keys: Folder | None = None,
        window: Window | None = None,
    ) -> None:
        """`keys`: workers are given one of their name, and clients have to be told which is theirs.

        `window`: of a broker in a thread.
        """
        self.workers: list[Process] = []
        self.thread: BrokerThread | None = None
        self.process: Process | None = None
        self.mark = secrets.token_hex(8)
        #: What workers are started with: set it to start the next ones otherwise.
        self.worker_config = replace(worker or WorkerConfig(), fake=knobs or FakeKnobs(), drain_ms=2_000)
        self._config = config or BrokerConfig()
        self._count = workers
        self._kind = broker
        self._host = host
        self._token_hwm = token_hwm
        self._check = check
        self._keys = keys
        self._window = window
        self.port = 0

    def __enter__(self) -> Mesh:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.print_story()
        self.close()

    @property
    def address(self) -> str:
        """Where clients and workers go."""
        return sockets.endpoint(self._host, self.port)

    def client(self, **settings: Any) -> Client:
        return Client(self.address, **settings)

    # --- processes -----------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._kind == "thread":
            self.thread = BrokerThread(
                self._config,
                self._host,
                token_hwm=self._token_hwm,
                check=self._check,
                keys=self._keys,
                window=self._window,
            )
            self.port = self.thread.server.port
        else:
            self._start_broker()
        started = [self.spawn(f"w{number}") for number in range(self._count)]
        for process in started:
            process.first_line()

    def _start_broker(self) -> None:
        config = msgspec.json.encode(self._config).decode()
        told = (config, self._host, str(self._token_hwm), str(self.port), str(self._keys.path) if self._keys else "")
        self.process = Process("broker", BROKER, *told, mark=self.mark)
        self.port = int(self.process.first_line())

    def restart_broker(self, how: signal.Signals) -> None:
        """End it, and start another one at the same ports. Returns when clients can connect."""
        assert self.process is not None, "only a broker that is a process can be restarted"
        self.process.send(how)
        self.process.wait()
        self.process.close()
        self._start_broker()

    def spawn(self, name: str, *addresses: str) -> Process:
        """Start a worker, of this broker or of those that are given; `first_line` returns when it is ready."""
        key = key_of(self._keys, name, "worker") if self._keys else None
        config = replace(self.worker_config, name=name, brokers=addresses or (self.address,), key=key)
        process = Process(name, WORKER, msgspec.json.encode(config).decode(), mark=self.mark)
        self.workers.append(process)
        return process

    def broker_rss_bytes(self) -> int:
        return self.process.rss_bytes() if self.process else rss_bytes(os.getpid())

    def close(self) -> None:
        """Stop everything by its id, and see to it that nothing is left."""
        for process in self.workers:
            process.close()
        if self.process is not None:
            self.process.close()
        if self.thread is not None:
            self.thread.close()
        self.no_orphans()

    def no_orphans(self) -> None:
        """Whatever this mesh has started, and does not run under a worker or broker of ours any more, is gone."""
        own = [process.pid for process in (*self.workers, *([self.process] if self.process else []))]
        engines = [pid for process in self.workers for pid in process.children()]
        for pid in marked(MARK, self.mark):
            if pid not in own and pid not in engines:
                wait_until_gone(pid, TIMEOUT_S)

    # --- looking and waiting ---------------------------------------------------------------------------

    def run(self, scenario: Coroutine[Any, Any, T], timeout_s: float = TIMEOUT_S) -> T:
        """Run it on an event loop of its own, with a deadline."""

        async def limited() -> T:
            async with asyncio.timeout(timeout_s):
                return await scenario

        try:
            return asyncio.run(limited())
        except TimeoutError as error:
            raise AssertionError(f"the scenario was not over within {timeout_s} s") from error

    def look(self, question: Callable[[BrokerCore], T]) -> T:
        """Ask the core something, in its own thread."""
        assert self.thread is not None, "only a broker in a thread can be looked into"
        return self.thread.look(question)

    def until(self, condition: Callable[[BrokerCore], Any], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until it is true of the core; it is asked after every turn of the broker's loop."""
        assert self.thread is not None, "only a broker in a thread can be looked into"
        self.thread.until(condition, what, timeout_s)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile the broker's loop stands still."""
        held, release = threading.Event(), threading.Event()

        def hold(core: BrokerCore) -> None:
            held.set()
            release.wait(TIMEOUT_S)

        holder = threading.Thread(target=self.look, args=(hold,))
        holder.start()
        assert held.wait(TIMEOUT_S), "the broker is not to be held"
        try:
            yield
        finally:
            release.set()
            holder.join(TIMEOUT_S)

    async def aside(self, condition: Callable[[BrokerCore], Any], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """`until`, from an event loop that goes on meanwhile."""
        await asyncio.to_thread(self.until, condition, what, timeout_s)

    def counter(self, name: str) -> int:
        return int(self.look(lambda core: getattr(core.state.counters, name)))

    def print_story(self) -> None:
        print(f"--- the story of the mesh at {self.address}")
        if self.thread is not None:
            print(self.thread.story())
        for process in (*self.workers, *([self.process] if self.process else [])):
            print(f"--- {process.name} ({'runs' if process.running else 'is over'}) wrote:\n{process.written()}")


def key_of(folder: Folder, name: str, role: Role = "client") -> PeerKey:
    """The key of this name, made if there is none yet."""
    if not folder.ring().named(name):
        folder.add(Identity(name, role), int(time.time()))
    return folder.export(name)


def truth(prompt: str, seed: int, count: int) -> list[int]:
    """The ids of the only right answer of a plain fake engine."""
    base = fake_model.plain_base(seed, prompt.encode())
    return [fake_model.plain_next(base, index) for index in range(count)]


def rss_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Seconds since it began."""
    began = time.monotonic()
    yield lambda: time.monotonic() - began
