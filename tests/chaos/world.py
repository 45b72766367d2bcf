"""The processes of one run, where they are, and what their brokers say about them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from pathlib import Path

from llambo import Client, LlamboError
from llambo.mesh.security import keyring
from llambo.mesh.security.keyring import ISSUED
from llambo.mesh.security.keys import KEY_ENV, to_line
from llambo.mesh.wire.identity import Identity
from llambo.mesh.wire.reports import MeshStatus, WorkerRow
from llambo.testing.processes import has_ended
from llambo.testing.proxy import Plane, Proxy
from tests.chaos import hosts, nodes, places
from tests.chaos.history import Journal, now_ms
from tests.chaos.plan import Plan

#: The first broker's port in a network of its own, and how far apart the ports of two brokers are.
BASE_PORT, APART = 7330, 10
#: How often a broker is asked for its workers, and every how many times for its counters.
LOOK_S, COUNTERS_EVERY = 0.25, 4
SIZES_S = 2.0
#: How long clients may take to finish their requests, once the faults are over.
SETTLE_S = 60.0
LEAVE_S = 20.0
#: What a worker connects to.
WORKER_PLANES: list[Plane] = ["worker control", "worker tokens"]
#: What a gateway connects to.
CLIENT_PLANES: list[Plane] = ["client control", "client tokens"]


def free_port(start: int) -> int:
    """The first of four ports in a row that are free. Below those that the kernel gives out by itself."""
    for base in range(start, 30_000, APART):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(base, base + 4):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return base
    raise RuntimeError("no four ports in a row are free")


class World:
    def __init__(self, plan: Plan, folder: Path, journal: Journal) -> None:
        self.plan = plan
        self.folder = folder
        self.journal = journal
        self.inside = places.is_inside()
        self.host = places.BROKERS if self.inside else "127.0.0.1"
        self.ports: list[int] = []
        for _ in range(plan.brokers):
            self.ports.append(free_port(self.ports[-1] + APART if self.ports else BASE_PORT if self.inside else 20_000))
        self.keys = self._made_keys()
        self.namespaces: dict[int, places.Namespace] = {}
        self.proxies: dict[int, Proxy] = {}
        self.brokers = [self._broker(number) for number in range(plan.brokers)]
        self.gateway_proxies = [Proxy(f"127.0.2.{n + 1}", self.host, self.ports, CLIENT_PLANES)
                                for n in range(plan.gateways)]  # fmt: skip
        self.gateway_ports: list[int] = []
        for _ in range(plan.gateways):
            self.gateway_ports.append(free_port(max([*self.ports, *self.gateway_ports]) + APART))
        self.gateways = [self._gateway(number) for number in range(plan.gateways)]
        self.workers: list[nodes.Node] = []
        self.clients = [self._client(number) for number in range(plan.clients)]
        #: Workers under a fault now, and how many: no promise holds for them.
        self.under_fault: dict[str, int] = {}
        #: The latest rows of the brokers: broker to worker to its row.
        self.views: dict[str, dict[str, WorkerRow]] = {}
        self.seen = asyncio.Condition()
        #: Engine children and whose they are, to see that none is left.
        self.engines: dict[int, tuple[str, int]] = {}
        #: Of hosts.
        self.memory: hosts.Memory | None = None
        self._keeping: list[asyncio.Task[None]] = []
        self._looking: list[asyncio.Task[None]] = []

    def _made_keys(self) -> keyring.Folder:
        """One for each worker, and an admin's for clients and for us, where all of those look for it."""
        folder, now = keyring.Folder(self.folder / "keys"), int(time.time())
        folder.begin(self.addresses())
        folder.add(Identity("harness", "admin"), now)
        for number in range(self.plan.workers):
            folder.add(Identity(f"w{number}", "worker"), now)
        os.environ[KEY_ENV] = to_line(folder.export("harness"))
        return folder

    # --- names and commands --------------------------------------------------------------------------

    def address(self, broker: int, host: str = "") -> str:
        return f"tcp://{host or self.host}:{self.ports[broker]}"

    def addresses(self, host: str = "", first: int = 0) -> str:
        """Of all brokers, beginning with one of them."""
        order = [(first + number) % self.plan.brokers for number in range(self.plan.brokers)]
        return ",".join(self.address(number, host) for number in order)

    def _broker(self, number: int) -> nodes.Node:
        flags = {"lease-ms": self.plan.lease_ms, "queue-ms": self.plan.queue_ms, "keys": self.keys.path}
        command = nodes.broker_command(f"b{number}", self.host, self.ports[number], flags)
        return nodes.Node(f"b{number}", lambda _: command, self.folder, self.journal)

    async def _worker(self, number: int) -> nodes.Node:
        plan, name, host = self.plan, f"w{number}", self.host
        prefix: list[str] = []
        match plan.place(number):
            case "far":
                namespace = self.namespaces[number] = places.Namespace(number)
                prefix = namespace.prefix
            case "near":
                proxy = self.proxies[number] = Proxy(f"127.0.1.{number + 1}", self.host, self.ports, WORKER_PLANES)
                await proxy.start()
                host = proxy.host
        flags: dict[str, object] = {"engine": plan.engine, "slots": plan.slots, "stall-ms": plan.stall_ms,
                                    "drain-ms": plan.drain_ms,
                                    "key": self.keys.path / ISSUED / f"{name}.key"}  # fmt: skip
        if plan.engine == "fake":
            flags |= {"fake-tokens-per-s": plan.tokens_per_s, "fake-burst": 2, "fake-utf8-split": "yes",
                      "fake-style": plan.style, "fake-jitter-ms": 4, "fake-poison": "arsenic"}  # fmt: skip
            flags |= self._models(number)
        else:
            flags |= {"model": "smollm2", "threads": 1, "ctx": 512}
        command = [*prefix, *nodes.worker_command(name, self.addresses(host), flags)]
        return nodes.Node(name, lambda _: command, self.folder, self.journal)

    def _models(self, number: int) -> dict[str, object]:
        """What makes a worker a host. Every other host lacks a file that its last model needs."""
        plan = self.plan
        if not plan.models:
            return {}
        files = self.folder / f"files of w{number}"
        files.mkdir()
        models = hosts.specs(plan.models, plan.load_ms)
        for name in list(models)[: len(models) - number % 2]:
            (files / name).touch()
        return {"models": ",".join(models.values()), "memory-bytes": f"{plan.budget_mib}MiB", "min-loaded-ms": 500,
                "fake-load-file": files / "{model}"}  # fmt: skip

    def _client(self, number: int) -> nodes.Node:
        plan = self.plan

        def command(start: int) -> list[str]:
            name = f"c{number}.{start}"
            options = {"name": name, "history": str(self.folder / f"{name}.jsonl"), "parent": os.getpid(),
                       "seed": plan.seed, "streams": plan.streams, "tokens": plan.tokens,
                       "models": hosts.chances(len(plan.models))}  # fmt: skip
            if plan.gateways:
                return nodes.reader_command({**options, "ports": self.gateway_ports})
            return nodes.client_command({**options, "address": self.addresses(first=number)})

        return nodes.Node(f"c{number}", command, self.folder, self.journal, says=False)

    def _gateway(self, number: int) -> nodes.Node:
        address = self.addresses(self.gateway_proxies[number].host, number)
        # Beyond that time a gateway that is stopped leaves its readers to the other one.
        command = nodes.gateway_command(address, self.gateway_ports[number], {"leave-ms": 1_000})
        return nodes.Node(f"g{number}", lambda _: command, self.folder, self.journal)

    def client_name(self, number: int) -> str:
        return f"c{number}.{self.clients[number].starts}"

    def everybody(self) -> list[nodes.Node]:
        return [*self.brokers, *self.workers, *self.gateways, *self.clients]

    # --- coming and going ----------------------------------------------------------------------------

    async def begin(self) -> None:
        for broker in self.brokers:
            await broker.start()
            self._supervised(broker)
        self.workers = [await self._worker(number) for number in range(self.plan.workers)]
        self.memory = hosts.Memory(self.workers, self.journal) if self.plan.models else None
        await asyncio.gather(*(worker.start() for worker in self.workers))
        missing = [worker.name for worker in self.workers if not worker.ready.is_set()]
        if missing:
            raise RuntimeError(f"not ready: {', '.join(missing)}; see {self.folder}")
        for worker in self.workers:
            self._supervised(worker)
        for proxy in self.gateway_proxies:
            await proxy.start()
        for node in (*self.gateways, *self.clients):
            await node.start()
            self._supervised(node)
        for number in range(self.plan.brokers):
            self._looking.append(asyncio.create_task(self._watch(number)))
        self._looking.append(asyncio.create_task(self._measure_sizes()))
        if self.memory is not None:
            self._looking.append(asyncio.create_task(self.memory.watch()))

    def _supervised(self, node: nodes.Node) -> None:
        self._keeping.append(asyncio.create_task(self._supervise(node)))

    async def _supervise(self, node: nodes.Node) -> None:
        try:
            await node.keep()
        except (OSError, TimeoutError) as error:
            self.journal.write("broken", whom=node.name, text=repr(error))

    async def finish(self) -> None:
        """Faults are over: the clients finish what runs. A client that does not is recorded: its requests hang."""
        for client in self.clients:
            client.wanted = False
            if client.process is not None and client.process.stdin is not None:
                client.process.stdin.close()
        try:
            async with asyncio.timeout(SETTLE_S):
                await asyncio.gather(*(client.process.wait() for client in self.clients if client.process))
        except TimeoutError:
            self.journal.write("broken", whom="clients", text=f"not done {SETTLE_S:.0f} s after the faults were over")
        for client in self.clients:
            if client.process is not None and client.process.returncode:
                text = f"it ended with status {client.process.returncode}; see {client.log}"
                self.journal.write("broken", whom=client.name, text=text)
        await self._last_look()

    async def _last_look(self) -> None:
        """Wait until all workers are ready and no broker has a request, and record what each broker reports."""
        for number, broker in enumerate(self.brokers):
            status, ready, left = MeshStatus(running=-1, waiting=-1, busy=-1), list[str](), list[str]()
            with contextlib.suppress(LlamboError, TimeoutError):
                async with asyncio.timeout(LEAVE_S), Client(self.address(number)) as client:
                    while True:
                        status = await client.status()
                        idle = not (status.running or status.waiting or status.busy)
                        left = await self.memory.left_over(client) if self.memory is not None else []
                        ready = await self.ready_at(client)
                        if idle and not left and len(ready) >= self.plan.workers:
                            break
                        await asyncio.sleep(LOOK_S)
            if status.counters:
                self.journal.write("status", broker=broker.name, pid=broker.pid, counters=status.counters)
            facts = {name: getattr(status, name) for name in ("running", "waiting", "busy")}
            self.journal.write("last", broker=broker.name, workers_wanted=self.plan.workers, ready=len(ready),
                               left=left, **facts)  # fmt: skip

    async def end(self) -> None:
        """Stop all processes, with SIGTERM first. A process that outlives its parent is recorded."""
        for task in self._looking:
            task.cancel()
        for group in (self.clients, self.gateways, self.workers, self.brokers):
            for node in group:
                node.wanted = False
                node.send(signal.SIGCONT)
                node.send(signal.SIGTERM)
            await asyncio.gather(*(self._gone(node) for node in group))
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._looking, *self._keeping, return_exceptions=True)
        for proxy in (*self.proxies.values(), *self.gateway_proxies):
            await proxy.close()
        for namespace in self.namespaces.values():
            namespace.close()
        if self.memory is not None:
            self.memory.end()
            self.engines |= self.memory.engines
        for pid, (whom, began) in self.engines.items():
            # A number may be another process's by now.
            if nodes.began(pid) == began and not await gone(pid, 2.0):
                self.journal.write("orphan", pid=pid, whom=whom)

    def saw(self, engine: int, whom: str) -> None:
        self.engines[engine] = whom, nodes.began(engine)

    async def _gone(self, node: nodes.Node) -> None:
        if node.process is None:
            return
        try:
            async with asyncio.timeout(LEAVE_S):
                await node.process.wait()
        except TimeoutError:
            self.journal.write("broken", whom=node.name, text=f"still there {LEAVE_S:.0f} s after SIGTERM")
            node.send(signal.SIGKILL)
            await node.process.wait()

    # --- looking -------------------------------------------------------------------------------------

    async def _watch(self, number: int) -> None:
        """What this broker says, life after life."""
        broker = self.brokers[number]
        while True:
            await broker.ready.wait()
            pid = broker.pid
            try:
                async with Client(self.address(number), name="watcher", query_ms=2_000) as client:
                    await self._look(client, broker, pid)
            except LlamboError:
                # It went away in the middle; the fault that caused it is in the history.
                self.views.pop(broker.name, None)
                await asyncio.sleep(LOOK_S)

    async def _look(self, client: Client, broker: nodes.Node, pid: int) -> None:
        since, turn = 0, 0
        while broker.pid == pid:
            listed = {line.worker: line for line in await client.workers()}
            ready = await self.ready_at(client)
            self.journal.write("workers", broker=broker.name, names=list(listed), ready=ready)
            async with self.seen:
                self.views[broker.name] = listed
                self.seen.notify_all()
            for event in await client.events(since):
                since = event.number
                # Its own clock is not ours, but the age is true.
                self.journal.write("event", broker=broker.name, kind=event.kind, text=event.text,
                                   t=now_ms() - event.age_ms)  # fmt: skip
            if turn % COUNTERS_EVERY == 0:
                status = await client.status()
                self.journal.write("status", broker=broker.name, pid=pid, counters=status.counters)
            turn += 1
            await asyncio.sleep(LOOK_S)

    async def _measure_sizes(self) -> None:
        while True:
            for node in self.everybody():
                size = node.size()
                if size is not None:
                    self.journal.write("size", whom=node.name, pid=node.pid, rss=size[0], fds=size[1])
                engine = node.engine() if node in self.workers else 0
                if engine and (size := nodes.size_of(engine)):
                    self.saw(engine, node.name)
                    self.journal.write("size", whom=f"{node.name} engine", pid=engine, rss=size[0], fds=size[1])
            await asyncio.sleep(SIZES_S)

    async def ready_at(self, client: Client) -> list[str]:
        """The workers that are ready there; where models are loaded on demand, the hosts that are."""
        if self.memory is not None:
            return [line.host for line in await client.hosts()]
        return [line.worker for line in await client.workers() if line.state == "ready"]

    def busy(self, worker: str) -> int:
        """How many requests it has, all brokers together."""
        return sum(view[worker].busy for view in self.views.values() if worker in view)

    def healthy(self) -> list[str]:
        return [node.name for node in self.workers if node.ready.is_set() and not self.under_fault.get(node.name)]


async def gone(pid: int, within_s: float) -> bool:
    return await asyncio.to_thread(has_ended, pid, within_s)
