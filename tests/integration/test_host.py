"""A host with real processes: models loaded and unloaded on demand, within its budget, while others stream.

What brokers want comes from a peer that plays a broker, so that each test decides what it is. The requests go over a
real broker, which the workers of the host join as well.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from llambo.cli.kit.failure import Exit
from llambo.mesh.link import sockets
from llambo.mesh.wire import codec
from llambo.mesh.wire import messages as m
from llambo.testing.commands import WORKER
from llambo.testing.mesh import Mesh, truth
from llambo.testing.processes import TIMEOUT_S, Process, children, family, rss_bytes, wait_until_gone
from llambo.worker.config import RAM
from llambo.worker.host.catalogue import Servable
from llambo.worker.host.model_host import Inbox, Looker, Scanned
from llambo.worker.models import model_files
from tests.integration import bad_host

MIB = 1024 * 1024


class PlayedBroker:
    """Not a broker: it plays one for a host, on the control port of workers, and ignores its workers."""

    def __init__(self) -> None:
        self.models: dict[str, m.HostedModel] = {}
        self.memory: dict[str, m.Memory] = {}
        #: All states of each model, in the order in which they were reported.
        self.states: dict[str, list[str]] = {}
        self.hellos: list[m.HostHello] = []
        self.goodbyes: list[m.Goodbye] = []
        self._session = secrets.token_bytes(8)
        self._route = b""
        self._seq = 0
        self._beats = 0
        self._revision = 0
        self._place = m.PlaceModels(0)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = sockets.control(self._context, zmq.ROUTER)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port - sockets.WORKER_OFFSET}"

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()

    def place(self, *load: str, evict: tuple[str, ...] = ()) -> None:
        """As a broker: repeated with each heartbeat."""
        self._place = m.PlaceModels(0, list(load), list(evict))
        self._beat()

    def grant(self, ref: str) -> None:
        self._send(m.FetchFiles(self._next(), grants=[m.FileGrant(secrets.token_bytes(16), ref)]))

    def hold(self, model: str, holder: str, **fields: Any) -> None:
        self._send(m.Hold(self._next(), model, holder, **fields))

    def until(self, condition: Callable[[PlayedBroker], Any], what: str) -> None:
        """Answer the host until it is true."""
        deadline = time.monotonic() + TIMEOUT_S
        beat_at = 0.0
        while not condition(self):
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"not within {TIMEOUT_S} s: {what}; {self.models} {self.states}"
            if time.monotonic() >= beat_at:
                self._beat()
                beat_at = time.monotonic() + 0.1
            if self._socket.poll(20):
                self._receive()

    def are(self, **states: str) -> None:
        def reached(broker: PlayedBroker) -> bool:
            return all(name in broker.models and broker.models[name].state == states[name] for name in states)

        self.until(reached, str(states))

    def _receive(self) -> None:
        frames = self._socket.recv_multipart()
        bundle = codec.from_worker.decode(frames[1:])
        assert not bundle.problems, bundle.problems
        for message, _ in bundle.messages:
            if isinstance(message, m.HostHello):
                self.hellos.append(message)
                self._route = frames[0]
                welcome = m.Welcome(self._session, 1, broker="played", heartbeat_ms=100, lease_ms=10_000)
                self._send(welcome, session=codec.NO_SESSION)
            elif isinstance(message, m.Goodbye) and bundle.session == self._session:
                self.goodbyes.append(message)
            elif isinstance(message, m.HostHeartbeat):
                self._report(message)

    def _report(self, beat: m.HostHeartbeat) -> None:
        self._revision = beat.revision
        if not beat.models:
            return
        self.models = {model.name: model for model in beat.models}
        self.memory = beat.memory
        for name, memory in beat.memory.items():
            assert memory.used <= memory.bytes, f"{memory.used} of {memory.bytes} bytes of {name} are used"
        for model in beat.models:
            seen = self.states.setdefault(model.name, [])
            if seen[-1:] != [model.state]:
                seen.append(model.state)

    def _beat(self) -> None:
        if self._route:
            self._beats += 1
            self._send(m.BrokerHeartbeat(self._beats, self._revision, seq=self._next()))
            self._send(m.PlaceModels(self._next(), self._place.load, self._place.evict))

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _send(self, message: m.Message, session: bytes | None = None) -> None:
        frames = codec.encode(self._session if session is None else session, [(message, None)])
        try:
            self._socket.send_multipart([self._route, *frames])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # the host has ended
                raise


@contextmanager
def hosting(
    models: str, *words: str, budget: int = 100, fault: str = ""
) -> Iterator[tuple[Mesh, PlayedBroker, Process]]:
    """A host that has joined both brokers. `budget`: in MiB. `fault`: as in `bad_host`."""
    broker = PlayedBroker()
    try:
        with Mesh(workers=0, check=True) as mesh:
            memory = ("--memory-bytes", f"{budget}MiB")
            module = bad_host.__name__ if fault else WORKER
            process = mesh.spawn_host(
                "box", models, *memory, *words, addresses=(broker.address, mesh.address), module=module,
                env={bad_host.FAULT: fault},
            )  # fmt: skip
            broker.until(lambda broker: broker.models, "the host reports its models")
            yield mesh, broker, process
    finally:
        broker.close()


def serves(mesh: Mesh, worker: str) -> None:
    mesh.until(
        lambda core: (
            worker in core.state.registry.worker_names and core.state.registry.worker_names[worker].dispatchable
        ),
        f"{worker} serves",
    )


PACE = ("--min-loaded-ms", "0", "--fake-tokens-per-s", "100")


async def stream(
    mesh: Mesh, model: str, tokens: int, begun: asyncio.Event | None = None, late: asyncio.Event | None = None
) -> list[int]:
    """`begun`, `late`: set after 3 and after 100 tokens."""
    ids: list[int] = []
    async with (
        mesh.client() as client,
        client.stream("x", model=model, max_tokens=tokens, seed=3) as answer,
    ):
        while (piece := await answer.next_piece()) is not None:
            ids += piece.ids
            if begun is not None and len(ids) >= 3:
                begun.set()
            if late is not None and len(ids) >= 100:
                late.set()
    return ids


def test_three_models_on_a_budget_of_two_and_a_busy_one_stays() -> None:
    with hosting("a:40:20ms,b:40:20ms,c:40:20ms", *PACE) as (mesh, broker, host):
        assert broker.hellos[0].name == "box" and broker.memory[RAM] == m.Memory(100 * MIB, 0, 20 * MIB)
        broker.place("a", "b")
        broker.are(a="ready", b="ready")
        assert len(host.children()) == 2
        for worker in ("box-a", "box-b"):
            serves(mesh, worker)

        async def scenario() -> None:
            begun, late = asyncio.Event(), asyncio.Event()
            reading = asyncio.create_task(stream(mesh, "a", 200, begun, late))
            await begun.wait()
            broker.place("c", evict=("a",))
            await asyncio.to_thread(broker.until, lambda _: late.is_set(), "half of the stream is here")
            assert broker.states["a"] == ["stored", "loading", "ready"], "it is busy"
            assert await reading == truth("x", 3, 200)

        mesh.run(scenario())
        broker.are(a="stored", b="ready", c="ready")
        assert broker.states["a"][-2:] == ["unloading", "stored"]
        engines = host.children()
        assert len(engines) == 2 and sum(map(rss_bytes, engines)) > 80 * MIB, "each takes what it says"
        assert broker.models["c"].loads == 1 and broker.models["c"].worker == "box-c"


def test_a_load_that_fails_is_reported_and_disturbs_no_other(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with hosting("a:40,b:40", "--fake-load-file", str(tmp_path / "{model}"), *PACE) as (mesh, broker, _):
        broker.place("a")
        broker.are(a="ready")
        serves(mesh, "box-a")

        async def scenario() -> None:
            begun = asyncio.Event()
            reading = asyncio.create_task(stream(mesh, "a", 60, begun))
            await begun.wait()
            broker.place("a", "b")
            await asyncio.to_thread(broker.are, b="failed")
            assert await reading == truth("x", 3, 60)

        mesh.run(scenario())
        failed = broker.models["b"]
        assert "there is no file" in failed.note and 0 < failed.retry_ms <= 5_000 and not failed.worker
        assert broker.memory[RAM].used == 40 * MIB


def test_out_of_memory_is_recognised_and_tried_once_more() -> None:
    with hosting("a:40,huge:4000000000", "--min-loaded-ms", "0", budget=5_000_000_000) as (_, broker, host):
        broker.place("a")
        broker.are(a="ready")
        broker.place("huge")
        broker.are(huge="failed")
        assert broker.states["a"][-2:] == ["unloading", "stored"], "everything idle was unloaded"
        assert host.log().count("huge: loading, ") == 2
        assert "there is no memory" in broker.models["huge"].note
        assert host.running


def test_a_killed_engine_touches_no_other_model() -> None:
    with hosting("a:10,b:10", *PACE) as (mesh, broker, host):
        broker.place("a")
        broker.are(a="ready")
        engine = host.children()[0]
        broker.place("a", "b")
        broker.are(b="ready")
        for worker in ("box-a", "box-b"):
            serves(mesh, worker)

        async def scenario() -> None:
            begun = [asyncio.Event(), asyncio.Event()]
            reading = [
                asyncio.create_task(stream(mesh, model, 100, event)) for model, event in zip("ab", begun, strict=True)
            ]
            for event in begun:
                await event.wait()
            os.kill(engine, signal.SIGKILL)
            # The worker of `a` starts another engine, on which its stream goes on.
            assert await asyncio.gather(*reading) == [truth("x", 3, 100)] * 2

        mesh.run(scenario())
        broker.until(lambda broker: broker.models["a"].loads == 2, "the other engine is reported")
        assert broker.states["b"] == ["stored", "loading", "ready"]
        assert mesh.look(lambda core: core.state.counters.peers.workers_lost) == 0
        engines = host.children()
        host.kill()
        for pid in engines:
            wait_until_gone(pid)


def test_a_host_that_stops_lets_its_runs_finish() -> None:
    with hosting("a:10,b:10", *PACE) as (mesh, broker, host):
        broker.place("a", "b")
        broker.are(a="ready", b="ready")
        serves(mesh, "box-a")
        engines = host.children()

        async def scenario() -> None:
            begun = asyncio.Event()
            reading = asyncio.create_task(stream(mesh, "a", 150, begun))
            await begun.wait()
            host.send(signal.SIGTERM)
            await asyncio.to_thread(broker.until, lambda broker: broker.goodbyes, "the host leaves at once")
            assert host.running
            assert await reading == truth("x", 3, 150)

        mesh.run(scenario())
        assert host.end() == 0
        for engine in engines:
            wait_until_gone(engine)
        assert "box-a" in host.log(), "the log names the worker"


def test_a_host_that_cannot_share_any_more_says_so_and_ends_as_one_that_is_stopped() -> None:
    """Brokers know that it shares, and would send other hosts to it."""
    words = (*PACE, "--share", "tcp://127.0.0.1:0")
    with hosting("a:10", *words, fault="fails") as (mesh, broker, host):
        assert broker.hellos[0].share
        broker.place("a")
        broker.are(a="ready")
        serves(mesh, "box-a")

        async def scenario() -> None:
            begun = asyncio.Event()
            reading = asyncio.create_task(stream(mesh, "a", 150, begun))
            await begun.wait()
            broker.grant("hf:o/r")
            await asyncio.to_thread(broker.until, lambda broker: broker.goodbyes, "it leaves at once")
            assert await reading == truth("x", 3, 150)

        mesh.run(scenario())
        assert host.end() == Exit.ERROR, host.log()
        assert "files cannot be given to other hosts any more: RuntimeError: the fault of this test" in host.log()


class _Failing:
    """A catalogue whose first look fails by an error that was not expected."""

    missing_refs = ()

    def __init__(self) -> None:
        self.looks = 0

    def scan(self) -> dict[str, Servable]:
        self.looks += 1
        if self.looks == 1:
            raise RuntimeError("not expected")
        return {}


def test_a_look_for_models_that_fails_is_logged_and_repeated(caplog: pytest.LogCaptureFixture) -> None:
    inbox = Inbox()
    looker = Looker(_Failing(), inbox)  # type: ignore[arg-type]
    looker.start()
    deadline, events = time.monotonic() + TIMEOUT_S, []
    while not (events := inbox.take()) and time.monotonic() < deadline:
        looker.look_now()
        time.sleep(0.01)
    looker.stop()
    inbox.close()
    assert events == [Scanned({}, ())]
    assert "models cannot be looked for" in caplog.text and "RuntimeError: not expected" in caplog.text


def test_the_memory_of_real_models_stays_within_the_budget(tmp_path: Path) -> None:
    """Measured from outside, on a host whose budget has room for one of two."""
    for name in ("one", "two"):
        os.link(model_files.find("smollm2"), tmp_path / f"{name}.gguf")
    words = ("--engine", "llama", "--slots", "1", "--ctx", "512", "--min-loaded-ms", "0")
    with hosting(str(tmp_path), *words, budget=600) as (mesh, broker, host):
        os.link(tmp_path / "one.gguf", tmp_path / "later.gguf")
        (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
        needs = broker.models["one"].needs[RAM]
        assert needs <= 600 * MIB < 2 * needs
        most = Peak(host.pid)
        for load, evict in (("one", "two"), ("two", "one")):
            broker.place(load, evict=(evict,))
            broker.are(**{load: "ready"})
            serves(mesh, f"box-{load}")
            mesh.run(stream(mesh, load, 20))
            assert len(children(host.pid)) == 1
        corrected = broker.models["one"].needs[RAM]
        assert rss_bytes(host.children()[0]) <= corrected < needs, "it was measured when it was loaded"
        assert most.end() <= 600 * MIB, f"{most.bytes // MIB} MiB were resident"
        assert most.samples > 50 and most.bytes > 100 * MIB
        assert broker.models["one"].loads == broker.models["two"].loads == 1
        broker.until(lambda broker: "later" in broker.models, "a file that appears is found")
        assert broker.models["damaged"].state == "failed" and "damaged" in broker.models["damaged"].note


class Peak:
    """The most memory that a process and its descendants have had resident at a time."""

    def __init__(self, pid: int) -> None:
        self.bytes = self.samples = 0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            try:
                total = sum(map(rss_bytes, (self._pid, *family(self._pid))))
            except (FileNotFoundError, ProcessLookupError):
                continue  # one of them has ended meanwhile
            self.bytes = max(self.bytes, total)
            self.samples += 1

    def end(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.bytes
