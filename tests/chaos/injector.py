"""Injects the faults of the schedule, and records each with its begin and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llambo import Client, LlamboError
from llambo.testing.proxy import Plane
from tests.chaos import nodes
from tests.chaos.history import now_ms
from tests.chaos.nodes import Node
from tests.chaos.plan import TARGETS, Fault
from tests.chaos.world import CLIENT_PLANES, WORKER_PLANES, World, gone

#: How long workers may take to be back, and a drained one to be empty, before that is given up and reported.
BACK_S, EMPTY_S = 15.0, 60.0
#: How often a broker that came back is asked for its workers.
ASK_S = 0.05


def planes_of(what: str) -> list[Plane]:
    return [plane for plane in WORKER_PLANES if what in ("", "both") or plane.endswith(what)]


class Injector:
    def __init__(self, world: World) -> None:
        self._world = world
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, faults: list[Fault]) -> None:
        """Returns when the last fault is over."""
        begun = asyncio.get_running_loop().time()
        for fault in faults:
            await asyncio.sleep(max(0.0, begun + fault.at_ms / 1000 - asyncio.get_running_loop().time()))
            task = asyncio.create_task(self._one(fault))
            self._running.add(task)
            task.add_done_callback(self._done)
        await asyncio.gather(*self._running)

    def _done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            self._running.discard(task)

    async def _one(self, fault: Fault) -> None:
        match fault.kind:
            case "broker":
                await self._broker(fault, self._world.brokers[fault.victim])
            case "client":
                await self._client(fault)
            case "rolling":
                await self._rolling(fault)
            case "poison":
                await self._poison(fault)
            case "broker-stop":
                await self._suspend(fault, self._world.brokers[fault.victim])
            case "gateway-stop":
                await self._suspend(fault, self._world.gateways[fault.victim])
            case "gateway":
                await self._gateway(fault, self._world.gateways[fault.victim])
            case "gateway-cut":
                self._begin(fault, self._world.gateways[fault.victim].name)
                planes = [plane for plane in CLIENT_PLANES if fault.what == "both" or plane.endswith(fault.what)]
                self._world.gateway_proxies[fault.victim].inject_fault("cut", planes)
                self._say("healed", fault)
            case _:
                await self._of_worker(fault)

    # --- workers -------------------------------------------------------------------------------------

    async def _of_worker(self, fault: Fault) -> None:
        worker = self._world.workers[fault.victim]
        if not worker.ready.is_set() or not (worker.engine() or fault.kind == "term"):
            self._say("skipped", fault, why="it is not there")
            return
        with self._under_fault(worker):
            match fault.kind:
                case "kill":
                    await self._kill(fault, worker)
                case "stop":
                    await self._stop(fault, worker)
                case "term":
                    self._begin(fault, worker.name)
                    await self._terminated(worker, fault.kind)
                    self._say("healed", fault)
                case "hang":
                    await self._hang(fault, worker)
                case "drain" | "move":
                    await self._drain(fault, worker)
                case "link":
                    await self._link(fault, worker)
                case _:
                    await self._network(fault, worker)

    async def _kill(self, fault: Fault, worker: Node) -> None:
        agent, engine, starts = worker.pid, worker.engine(fault.number), worker.starts
        self._world.saw(engine, worker.name)
        pids = {"agent": [agent], "engine": [engine], "both": [agent, engine]}[fault.what]
        self._begin(fault, worker.name, pid=agent)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # an engine that has found itself alone is gone already
                os.kill(pid, signal.SIGKILL)
        if not await gone(engine, BACK_S):
            self._world.journal.write("orphan", pid=engine, whom=worker.name)
        if fault.what != "engine":
            await worker.restarted(starts)
        self._say("healed", fault)

    async def _stop(self, fault: Fault, worker: Node) -> None:
        process = worker.process
        self._begin(fault, worker.name, busy=self._world.busy(worker.name))
        worker.send(signal.SIGSTOP)
        await asyncio.sleep(fault.length_ms / 1000)
        if worker.process is process:
            worker.send(signal.SIGCONT)
        self._say("healed", fault)

    async def _hang(self, fault: Fault, worker: Node) -> None:
        engine, busy = worker.engine(), self._world.busy(worker.name)
        self._world.saw(engine, worker.name)
        if not busy:
            self._say("skipped", fault, why="it has nothing to do")
            return
        self._begin(fault, worker.name, busy=busy, pid=engine)
        os.kill(engine, signal.SIGSTOP)
        if await gone(engine, fault.length_ms / 1000 + BACK_S):
            self._say("gone", fault)
        elif worker.engine() == engine:
            os.kill(engine, signal.SIGCONT)
        self._say("healed", fault)

    async def _link(self, fault: Fault, worker: Node) -> None:
        namespace = self._world.namespaces.get(fault.victim)
        if namespace is None:
            self._say("skipped", fault, why="it has no network of its own")
            return
        self._begin(fault, worker.name)
        await asyncio.to_thread(namespace.link, False)
        await asyncio.sleep(fault.length_ms / 1000)
        await asyncio.to_thread(namespace.link, True)
        self._say("healed", fault)

    async def _network(self, fault: Fault, worker: Node) -> None:
        proxy = self._world.proxies.get(fault.victim)
        if proxy is None:
            self._say("skipped", fault, why="it has no proxy")
            return
        self._begin(fault, worker.name)
        planes = planes_of(fault.what)
        proxy.inject_fault(fault.kind, planes, fault.amount)
        await asyncio.sleep(fault.length_ms / 1000)
        proxy.heal(planes)
        self._say("healed", fault)

    async def _drain(self, fault: Fault, worker: Node) -> None:
        flags = ["--move"] if fault.kind == "move" else []
        broker = next((number for number, node in enumerate(self._world.brokers) if node.ready.is_set()), None)
        if broker is None or not await self._drain_by_command(broker, worker.name, *flags):
            self._say("skipped", fault, why="no broker took the command")
            return
        self._begin(fault, worker.name)
        ms = await self._emptied(broker, worker.name)
        if ms is not None:
            self._world.journal.write("emptied", whom=worker.name, how=fault.kind, ms=ms, code=0)
        else:
            self._world.journal.write("broken", whom=worker.name, text=f"not empty {EMPTY_S:.0f} s after its drain")
        if not await self._drain_by_command(broker, worker.name, "--undo"):
            self._world.journal.write("broken", whom=worker.name, text="its drain could not be undone")
        self._say("healed", fault)

    async def _drain_by_command(self, broker: int, worker: str, *flags: str) -> bool:
        """Run `llambo drain`. The broker may be away just then, so up to three times."""
        command = nodes.drain_command(self._world.address(broker), worker, "--no-wait", *flags)
        for _ in range(3):
            process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
            _, errors = await process.communicate()
            if process.returncode == 0:
                return True
            self._world.journal.write("refused", whom=worker, text=errors.decode(errors="replace")[-200:])
        return False

    async def _emptied(self, broker: int, name: str) -> int | None:
        """Milliseconds from the order, as the broker has it in its feed, until it had nothing any more."""
        began = now_ms()
        try:
            async with asyncio.timeout(EMPTY_S), Client(self._world.address(broker), name="watcher") as client:
                while True:
                    lines = await client.workers(name)
                    if lines and not lines[0].busy and not lines[0].busy_elsewhere:
                        break
                    await asyncio.sleep(ASK_S / 2)
                ordered = [event.age_ms for event in await client.events() if event.kind == "drain"
                           and event.text.startswith(f"{name}: takes")]  # fmt: skip
        except (LlamboError, TimeoutError):
            return None
        # A broker that was restarted meanwhile has no feed of that.
        return min(ordered, default=now_ms() - began)

    # --- the others ----------------------------------------------------------------------------------

    async def _broker(self, fault: Fault, broker: Node) -> None:
        if not broker.ready.is_set():
            self._say("skipped", fault, why="it is not there")
            return
        self._begin(fault, broker.name)
        starts = broker.starts
        broker.pause_s = fault.length_ms / 1000
        broker.send(signal.SIGTERM if fault.what == "term" else signal.SIGKILL)
        if not await broker.restarted(starts):
            self._world.journal.write("broken", whom=broker.name, text="it did not come back")
            return
        self._say("healed", fault)
        await self._all_back(fault.victim, broker)

    async def _gateway(self, fault: Fault, gateway: Node) -> None:
        if not gateway.ready.is_set():
            self._say("skipped", fault, why="it is not there")
            return
        self._begin(fault, gateway.name)
        starts = gateway.starts
        gateway.pause_s = fault.length_ms / 1000
        gateway.send(signal.SIGTERM if fault.what == "term" else signal.SIGKILL)
        if not await gateway.restarted(starts):
            self._world.journal.write("broken", whom=gateway.name, text="it did not come back")
            return
        self._say("healed", fault)

    async def _suspend(self, fault: Fault, node: Node) -> None:
        if not node.ready.is_set():
            self._say("skipped", fault, why="it is not there")
            return
        process = node.process
        self._begin(fault, node.name)
        node.send(signal.SIGSTOP)
        await asyncio.sleep(fault.length_ms / 1000)
        if node.process is process:
            node.send(signal.SIGCONT)
        self._say("healed", fault)

    async def _all_back(self, number: int, broker: Node) -> None:
        """How long it takes until every worker without a fault of its own is ready at the new broker."""
        began, missing, ms, pid = now_ms(), self._world.healthy(), None, broker.pid
        with contextlib.suppress(LlamboError, TimeoutError):
            async with asyncio.timeout(BACK_S), Client(self._world.address(number), name="watcher") as client:
                while True:
                    ready = await self._world.ready_at(client)
                    missing = [name for name in self._world.healthy() if name not in ready]
                    if not missing:
                        ms = now_ms() - began
                        break
                    await asyncio.sleep(ASK_S)
        if ms is not None or broker.pid == pid:  # otherwise it was ended once more
            self._world.journal.write("back", broker=broker.name, ms=ms, missing=missing)

    async def _client(self, fault: Fault) -> None:
        client = self._world.clients[fault.victim]
        self._begin(fault, client.name)
        starts = client.starts
        self._world.journal.write("killed", whom=self._world.client_name(fault.victim))
        client.send(signal.SIGKILL)
        await client.restarted(starts)
        self._say("healed", fault)

    async def _rolling(self, fault: Fault) -> None:
        """One worker after the other, as an update would do it."""
        self._begin(fault, "fleet")
        for worker in self._world.workers:
            with self._under_fault(worker):
                await self._terminated(worker, fault.kind)
        self._say("healed", fault)

    async def _terminated(self, worker: Node, how: str) -> None:
        process, starts, began = worker.process, worker.starts, now_ms()
        if process is None:
            return
        worker.send(signal.SIGTERM)
        code = await process.wait()
        self._world.journal.write("emptied", whom=worker.name, how=how, ms=now_ms() - began, code=code)
        await worker.restarted(starts)

    async def _poison(self, fault: Fault) -> None:
        client = self._world.clients[0]
        if client.process is None or client.process.stdin is None or not client.ready.is_set():
            self._say("skipped", fault, why="no client is there")
            return
        self._begin(fault, "fleet")
        request = {"seed": fault.number + 1, "prompt": f"tea with arsenic {fault.number}", "max": 40,
                   "fate": "engine_failed"}  # fmt: skip
        client.process.stdin.write(json.dumps(request).encode() + b"\n")
        await client.process.stdin.drain()

    # --- writing it down -----------------------------------------------------------------------------

    @contextmanager
    def _under_fault(self, worker: Node) -> Iterator[None]:
        under_fault = self._world.under_fault
        under_fault[worker.name] = under_fault.get(worker.name, 0) + 1
        try:
            yield
        finally:
            under_fault[worker.name] -= 1

    def _begin(self, fault: Fault, whom: str, **facts: Any) -> None:
        self._world.journal.write("fault", n=fault.number, kind=fault.kind, whom=whom, what=fault.what,
                                  length=fault.length_ms, amount=fault.amount, **facts)  # fmt: skip

    def _say(self, event: str, fault: Fault, **facts: Any) -> None:
        self._world.journal.write(event, n=fault.number, kind=fault.kind, target=TARGETS[fault.kind], **facts)
