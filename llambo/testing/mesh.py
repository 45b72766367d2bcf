"""A whole mesh on loopback: a broker, and worker processes with their engines.

    with Mesh(workers=3, fake=FakeOptions(tokens_per_s=100)) as mesh:
        mesh.run(scenario(mesh))

The broker runs in a thread, where a test can look at its state, or (`broker="process"`) as a process of its own.
Nothing sleeps: each wait is for an event and has a deadline. After a missed deadline the story is printed: the events
and counters of the broker, the stories of the requests that did not end, and the output of the processes.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import msgspec

from llambo import Client
from llambo.broker import invariants
from llambo.broker.config import BrokerConfig
from llambo.broker.core import BrokerCore
from llambo.broker.report import queries
from llambo.broker.report.metrics_http import MetricsServer
from llambo.broker.server import BrokerServer
from llambo.mesh.client.request_options import Messages, chat_prompt
from llambo.mesh.link import sockets
from llambo.mesh.security.keyring import ISSUED, Folder
from llambo.mesh.wire.identity import Identity, PeerKey, Role
from llambo.testing.commands import Commands
from llambo.testing.processes import TIMEOUT_S, Process, marked, rss_bytes, wait_until_gone
from llambo.worker.config import FakeOptions, WorkerConfig
from llambo.worker.engine import fake_model

#: In the environment of every process of one mesh, so that a process that outlives it is found.
MARK = "TESTING_MESH"

#: Events and stories of requests that are printed.
PRINTED = 40

T = TypeVar("T")


class Mesh:
    """A broker and its workers. `config` is for the broker, `worker` and `fake` for workers and their fake engines."""

    def __init__(
        self,
        workers: int = 1,
        *,
        fake: FakeOptions | None = None,
        config: BrokerConfig | None = None,
        worker: WorkerConfig | None = None,
        broker: Literal["thread", "process"] = "thread",
        host: str = "127.0.0.1",
        token_hwm: int = sockets.TOKEN_HWM,
        check: bool = False,
        keys: Folder | None = None,
        metrics: MetricsServer | None = None,
    ) -> None:
        """`keys`: each worker gets a key of its own; a client needs `key_of`. `metrics` needs a broker in a thread.

        `check`: the invariants of a broker in a thread are checked after each turn.
        """
        self.workers: list[Process] = []
        self.thread: BrokerThread | None = None
        self.process: Process | None = None
        self.mark = secrets.token_hex(8)
        #: Changes apply to workers that are started later.
        self.worker_config = replace(worker or WorkerConfig(), fake=fake or FakeOptions(), drain_ms=2_000)
        self._config = config or BrokerConfig()
        self._count = workers
        self._kind = broker
        self._host = host
        self._token_hwm = token_hwm
        self._check = check
        self._keys = keys
        self._metrics = metrics
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
        """Where clients and workers connect."""
        return sockets.endpoint(self._host, self.port)

    def client(self, **settings: Any) -> Client:
        return Client(self.address, **settings)

    @property
    def commands(self) -> Commands:
        """`mesh.commands.ok("status", "--json")`: the `llambo` command with this mesh."""
        return Commands(self.address)

    # --- processes -----------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._kind == "thread":
            self.thread = BrokerThread(
                self._config,
                self._host,
                token_hwm=self._token_hwm,
                check=self._check,
                keys=self._keys,
                metrics=self._metrics,
            )
            self.port = self.thread.server.port
        else:
            self._start_broker()
        started = [self.spawn(f"w{number}") for number in range(self._count)]
        for process in started:
            process.first_line()

    def _node(self, name: str, kind: str, options: object) -> Process:
        words = ["-m", "llambo.testing.node", kind, msgspec.json.encode(options).decode()]
        return Process(*words, name=name, env={**os.environ, MARK: self.mark})

    def _start_broker(self) -> None:
        self.process = self._node("broker", "broker", {
            "config": self._config, "host": self._host, "port": self.port, "token_hwm": self._token_hwm,
            "keys": str(self._keys.path) if self._keys else "",
        })  # fmt: skip
        self.port = int(self.process.first_line())

    def restart_broker(self, how: signal.Signals) -> None:
        """Stop the broker, and start another one at the same ports. Returns when clients can connect."""
        assert self.process is not None, "only a broker that is a process can be restarted"
        self.process.send(how)
        self.process.end()
        self.process.close()
        self._start_broker()

    def spawn(self, name: str, *addresses: str) -> Process:
        """Start a worker of this broker, or of those at these addresses; `first_line` returns when it is ready."""
        key = key_of(self._keys, name, "worker") if self._keys else None
        config = replace(self.worker_config, name=name, brokers=addresses or (self.address,), key=key)
        process = self._node(name, "worker", config)
        self.workers.append(process)
        return process

    def spawn_host(
        self,
        name: str,
        models: str,
        *words: str,
        addresses: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        module: str = "llambo.cli.services.worker",
    ) -> Process:
        """Start `llambo-worker --models MODELS WORDS...` with the fake engine, unless the words say otherwise.

        `addresses`: of its brokers; none: this one. `module`: another one with the same command line.
        `line("is ready")` returns when it is, with nothing loaded.
        """
        key = ("--key", str(self._key_file(name))) if self._keys else ()
        process = Process(
            "-m", module, "--name", name, "--broker", ",".join(addresses or (self.address,)), *key,
            "--engine", "fake", "--models", models, "-v", *words, name=name,
            env={**os.environ, MARK: self.mark, **(env or {})},
        )  # fmt: skip
        self.workers.append(process)
        return process

    def _key_file(self, name: str) -> Path:
        assert self._keys is not None
        key_of(self._keys, name, "worker")
        return self._keys.path / ISSUED / f"{name}.key"

    def broker_rss_bytes(self) -> int:
        return self.process.rss_bytes() if self.process else rss_bytes(os.getpid())

    def close(self) -> None:
        """Stop every process by its id, and check that none is left."""
        for process in self.workers:
            process.close()
        if self.process is not None:
            self.process.close()
        if self.thread is not None:
            self.thread.close()
        self.no_orphans()

    def no_orphans(self) -> None:
        """Check that no engine child outlives its worker."""
        own = [process.pid for process in (*self.workers, *([self.process] if self.process else []))]
        engines = [pid for process in self.workers for pid in process.children()]
        for pid in marked(MARK, self.mark):
            if pid not in own and pid not in engines:
                wait_until_gone(pid)

    # --- looking and waiting ---------------------------------------------------------------------------

    def run(self, scenario: Coroutine[Any, Any, T], timeout_s: float = TIMEOUT_S) -> T:
        """Run it on an event loop of its own, with a deadline."""

        async def limited() -> T:
            async with asyncio.timeout(timeout_s):
                return await scenario

        try:
            return asyncio.run(limited())
        except TimeoutError as error:
            raise AssertionError(f"the scenario did not end within {timeout_s} s") from error

    def look(self, question: Callable[[BrokerCore], T]) -> T:
        """The answer of `question`, computed in the thread of the broker."""
        assert self.thread is not None, "only a broker in a thread can be looked into"
        return self.thread.look(question)

    def until(self, condition: Callable[[BrokerCore], Any], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until it is true of the core; it is called after each turn of the loop of the broker."""
        assert self.thread is not None, "only a broker in a thread can be looked into"
        self.thread.until(condition, what, timeout_s)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The loop of the broker is blocked while the `with` block runs."""
        held, release = threading.Event(), threading.Event()

        def hold(core: BrokerCore) -> None:
            held.set()
            release.wait(TIMEOUT_S)

        holder = threading.Thread(target=self.look, args=(hold,))
        holder.start()
        assert held.wait(TIMEOUT_S), "the loop of the broker was not blocked"
        try:
            yield
        finally:
            release.set()
            holder.join(TIMEOUT_S)

    async def aside(self, condition: Callable[[BrokerCore], Any], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """`until` for a coroutine: the event loop continues meanwhile."""
        await asyncio.to_thread(self.until, condition, what, timeout_s)

    def counter(self, name: str) -> int:
        return int(self.look(lambda core: core.state.counters.flat()[name]))

    def print_story(self) -> None:
        print(f"--- the story of the mesh at {self.address}")
        if self.thread is not None:
            print(self.thread.story())
        for process in (*self.workers, *([self.process] if self.process else [])):
            print(process.story("it runs" if process.running else "it has ended"))


# --- the broker in a thread, so that a test can look at the state of its core, and wait for a change of it -----


class WatchedBroker(BrokerServer):
    """A broker that calls the watches after each turn, in its thread."""

    def __init__(self, config: BrokerConfig, host: str, port: int, *, check: bool, **options: Any) -> None:
        super().__init__(config, host, port, **options)
        self._lock = threading.Lock()
        self._watches: list[Callable[[BrokerCore], bool]] = []
        self._check = check

    def turn(self, readable: dict[Any, int]) -> None:
        super().turn(readable)
        if self._check:
            invariants.check(self.core)
        if self._watches:
            with self._lock:
                self._watches = [watch for watch in self._watches if not watch(self.core)]

    def watch(self, watch: Callable[[BrokerCore], bool]) -> None:
        """Call it after each turn (at least every tenth of a second) until it returns True."""
        with self._lock:
            self._watches.append(watch)


class BrokerThread:
    def __init__(
        self, config: BrokerConfig, host: str = "127.0.0.1", port: int = 0, *, check: bool = False, **options: Any
    ) -> None:
        """`check`: the invariants are checked after each turn. `options` are those of `BrokerServer`."""
        self.server = WatchedBroker(config, host, port, check=check, **options)
        #: What ended the loop, if it was not `close`.
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="broker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:  # noqa: BLE001  # raised in the thread of the test
            self.error = error

    def look(self, question: Callable[[BrokerCore], T]) -> T:
        """The answer, computed in the thread of the broker between two turns."""
        answers: list[T] = []

        def watch(core: BrokerCore) -> bool:
            answers.append(question(core))
            return True

        self._wait(watch, "a turn of the loop", TIMEOUT_S)
        return answers[0]

    def until(self, condition: Callable[[BrokerCore], Any], what: str, timeout_s: float) -> None:
        self._wait(lambda core: bool(condition(core)), what, timeout_s)

    def _wait(self, condition: Callable[[BrokerCore], bool], what: str, timeout_s: float) -> None:
        met = threading.Event()
        errors: list[BaseException] = []

        def watch(core: BrokerCore) -> bool:
            try:
                if not condition(core):
                    return False
            except Exception as error:  # noqa: BLE001  # the error is the test's, and the broker goes on
                errors.append(error)
            met.set()
            return True

        self.server.watch(watch)
        came = met.wait(timeout_s)
        if errors:
            raise errors[0]
        if self.error is not None:
            raise AssertionError(f"the loop of the broker has ended: {self.error!r}") from self.error
        assert came, f"not within {timeout_s} s: {what}\n{self.story()}"

    def story(self) -> str:
        """The state of the broker, for people. It is read from another thread, because the loop may have ended."""
        if self.error is not None:
            return "".join(traceback.format_exception(self.error))
        state = self.server.core.state
        lines = [f"counters: {state.counters}"]
        lines += [f"{event.at_ms} {event.kind}: {event.text}" for event in list(state.journal.entries)[-PRINTED:]]
        for id in list(state.requests)[:PRINTED]:
            lines.append(f"request {id.hex()}")
            lines += [f"    {at} {what}: {detail}" for at, what, detail in queries.story(state, id)]
        return "\n".join(lines)

    def close(self) -> None:
        self.server.stop()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "the loop of the broker does not end"
        self.server.close()
        if self.error is not None:
            raise AssertionError(f"the loop of the broker has ended: {self.error!r}") from self.error


# --- helpers for tests -------------------------------------------------------------------------------------------


def key_folder(path: Path, **roles: Role) -> Folder:
    """A new keyring, with a key for each of these names."""
    folder = Folder(path)
    folder.begin("tcp://127.0.0.1:7330")
    for name, role in roles.items():
        folder.add(Identity(name, role), int(time.time()))
    return folder


def key_of(folder: Folder, name: str, role: Role = "client") -> PeerKey:
    """The key of this name, which is made if there is none."""
    if not folder.ring().named(name):
        folder.add(Identity(name, role), int(time.time()))
    return folder.export(name)


def truth(prompt: str | Messages, seed: int, count: int) -> list[int]:
    """The ids of the only correct answer of a fake engine with default options, to a prompt or a conversation."""
    text = prompt if isinstance(prompt, str) else chat_prompt(prompt).text
    base = fake_model.plain_base(seed, text.encode())
    return [fake_model.plain_next(base, index) for index in range(count)]


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Seconds since the block began."""
    began = time.monotonic()
    yield lambda: time.monotonic() - began
