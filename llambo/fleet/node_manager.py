"""Nodes, over all hosts of a fleet: what there is, put together from providers and the mesh; and steps carried out."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from llambo.fleet import hosted
from llambo.fleet.decide.plan import PlanStep, StepKind
from llambo.fleet.decide.rolling_core import START_MS
from llambo.fleet.model import (
    BROKER,
    Fleet,
    HostedRow,
    HostFacts,
    Node,
    NodeClass,
    NodeFailed,
    NodeRecord,
    NodeState,
    World,
    facts_of,
)
from llambo.fleet.providers.providers import Launch, Providers
from llambo.mesh.client.client import Client
from llambo.mesh.link import sockets
from llambo.mesh.link.sockets import DEFAULT_PORT, local_endpoint
from llambo.mesh.security import keys
from llambo.mesh.security.keyring import ISSUED, Folder
from llambo.mesh.service import clock
from llambo.mesh.service.host import cpus, memory_bytes
from llambo.mesh.settings.settings_table import SECTIONS
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.identity import Identity
from llambo.mesh.wire.reports import DrainReply, RequestRow, WorkerRow

#: Memory of this machine that is left for everything else, in percent.
RESERVE_PERCENT = 10
#: A node that is not ready after so long, with its model loaded, has failed.
START_S = START_MS / 1_000
#: How long a repeated look waits for a host. It is short, because a lease has to be renewed meanwhile.
HOST_WAIT_S = 2.0
#: How many steps are carried out at a time.
AT_ONCE = 8
#: A started process holds its lock after this time at the latest; until then Python may still be starting.
BEGIN_S = 10.0
#: After `drain_ms` a worker gives up its runs and ends, which takes a moment.
AFTER_DRAIN_S = 10.0

Report = Callable[[str], None]
#: Makes a client for the broker at this address.
Connect = Callable[[str], Client]

# --- What a node is started with: its settings, as arguments or as variables. ---


def environ(spec: NodeClass, *, broker: str) -> dict[str, str]:
    """For a worker that is a unit of systemd. Its name is the unit's, and its key a credential."""
    variables = {
        SECTIONS[section][key].env: SECTIONS[section][key].show(value)
        for section, values in spec.settings.items()
        for key, value in values.items()
    }
    return {**variables, SECTIONS["worker"]["class"].env: spec.name, SECTIONS["mesh"]["broker"].env: broker}


def command_of(
    spec: NodeClass, name: str, *, broker: str = "", key: str = "", keys: str = "", port: int | None = None
) -> list[str]:
    """For a process.

    `broker`, `key`: where a worker connects, and its key file; `keys`, `port`: a broker's folder of keys, and its port
    if the file names none.
    """
    command = [sys.executable, "-m", f"llambo.cli.services.{'broker' if spec.is_broker else 'worker'}"]
    for section, values in spec.settings.items():
        for setting, value in values.items():
            row = SECTIONS[section][setting]
            command += [row.flag, row.show(value)]
    if spec.is_broker:
        command += [SECTIONS["broker"]["port"].flag, str(port)] if port is not None else []
        return [*command, *(["--keys", keys] if keys else [])]
    command += ["--name", name, "--class", spec.name]
    command += ["--broker", broker] if broker else []
    return [*command, *(["--key", key] if key else [])]


# --- The state of a node: what its provider knows and what the broker reports, put together. Pure. ---


def node_of(
    record: NodeRecord, workers: Mapping[str, WorkerRow] | None, now_ms: int, *, since_ms: int, away: str = ""
) -> Node:
    """`since_ms`: when it was started, or was in the mesh last; it has `START_S` from then. `away`: why its host cannot
    be reached; then the record is from the last time that it could."""
    row = (workers or {}).get(record.name)
    state, note = NodeState.READY, f"{record.host} is away" if away else ""
    if row is not None:
        if row.state in ("draining", "drained"):
            state = NodeState.DRAINING
        elif row.state in ("loading", "joining"):
            state = NodeState.STARTING
        if isinstance(row, HostedRow):
            note = note or row.note
    elif workers is not None and record.node_class != BROKER:
        # It runs, and the broker does not know it.
        late = now_ms - since_ms > START_MS
        state = NodeState.FAILED if late else NodeState.STARTING
        note = note or (f"it is not in the mesh after {START_S:g} s" if late else "")
    return Node(
        name=record.name, node_class=record.node_class, host=record.host, fingerprint=record.fingerprint, state=state,
        busy=row.busy_slots if row else 0, slots=row.slots if row else record.slots,
        memory_bytes=record.memory_bytes, cores=record.cores, begun_ms=record.begun_ms, note=note,
    )  # fmt: skip


@dataclass(slots=True)
class Snapshot:
    """The fleet at one moment. `workers`: as the broker lists them, by name; None: it does not answer."""

    world: World
    workers: dict[str, WorkerRow] | None
    #: All that wait or run, oldest first.
    requests: list[RequestRow] = field(default_factory=list)
    #: Nodes that have ended by themselves and are not forgotten yet.
    ended: list[NodeRecord] = field(default_factory=list)

    def away(self) -> dict[str, str]:
        """Hosts that cannot be reached, and why."""
        return {name: facts.away for name, facts in self.world.hosts.items() if facts.away}


class _Connection:
    """To the broker. While it is held open, all questions share one client; otherwise each has its own."""

    def __init__(self, connect: Connect) -> None:
        self.held_open = False
        self._connect = connect
        self._client: Client | None = None
        self._address = ""
        self._connecting = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def to(self, address: str) -> AsyncIterator[Client]:
        if not self.held_open:
            async with self._connect(address) as client:
                yield client
            return
        async with self._connecting:
            if self._client is None or self._address != address:
                await self.close()
                client, self._address = self._connect(address), address
                await client.connect()
                self._client = client
        try:
            yield self._client
        except LlamboError as error:
            if error.code in (Code.NO_BROKER, Code.TIMEOUT, Code.UNAUTHORIZED):
                await self.close()
            raise

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()


class NodeManager:
    def __init__(self, fleet: Fleet, folder: Path, address: str, connect: Connect, report: Report) -> None:
        """`address`: of the broker, if the file does not name it."""
        self.fleet = fleet
        self.providers = Providers(fleet, folder)
        self.report = report
        #: Called with the name of a node before it is stopped on purpose, and possibly started again.
        self.on_stopping: Callable[[str], None] = lambda name: None
        self.connect = connect
        #: Earlier versions of classes, by fingerprint: a step may start one of those, too.
        self.older: dict[str, NodeClass] = {}
        self._address = address
        self._connection = _Connection(connect)
        #: When each was in the mesh last, or its service manager was restarting it.
        self._present_ms: dict[str, int] = {}
        #: Steps that are being carried out, or are about to be, by node.
        self._under_way: dict[str, PlanStep] = {}
        self._limit = asyncio.Semaphore(AT_ONCE)

    # --- what there is -----------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where the broker is. The address that a broker of this fleet reported when it was ready comes first."""
        reported = next((one.address for one in self.providers.records() if one.node_class == BROKER), "")
        if reported or self.fleet.broker_address:
            return reported or self.fleet.broker_address
        return self._address if self.fleet.broker is None else _broker_address(self.fleet.broker, self._port)

    @property
    def _port(self) -> int:
        """Of the fleet's own broker, if its table names none: that of the address that the file or the settings name.

        It is no part of the settings of the node: with another environment the same broker goes on.
        """
        named = sockets.split_all(self.fleet.broker_address or self._address)
        return named[0][1] if len(named) == 1 else DEFAULT_PORT

    async def look(self) -> Snapshot:
        self.providers.set_hosts(self.fleet)
        await self.providers.refresh(HOST_WAIT_S if self._connection.held_open else None)
        workers, requests = await self._ask()
        nodes, ended, away = [], [], self.providers.problems()
        now_ms = clock.wall_ms()
        coming = {
            name: step for name, step in self._under_way.items() if step.kind in (StepKind.SPAWN, StepKind.REPLACE)
        }
        for record in self.providers.records():
            step = self._under_way.get(record.name)
            coming.pop(record.name, None)
            if step is not None:
                # Shown as the step will leave it, so that no plan reverses the step.
                state = NodeState.DRAINING if step.kind is StepKind.RETIRE else NodeState.STARTING
                nodes.append(replace(node_of(record, workers, now_ms, since_ms=now_ms), state=state))
            elif self.providers.pid(record.name) is None and not self._just_begun(record, now_ms):
                ended.append(record)
            else:
                if record.name in (workers or {}) or self.providers.starting(record.name):
                    self._present_ms[record.name] = now_ms
                since_ms = max(record.begun_ms, self._present_ms.get(record.name, 0))
                nodes.append(node_of(record, workers, now_ms, since_ms=since_ms, away=away.get(record.host, "")))
        nodes += [self._coming(step, now_ms) for step in coming.values()]
        return Snapshot(World(tuple(nodes), self._hosts(nodes)), workers, requests, ended)

    def _just_begun(self, record: NodeRecord, now_ms: int) -> bool:
        """Another process started it, perhaps one that is gone, and it may not have taken its lock yet."""
        young = now_ms - record.begun_ms < BEGIN_S * 1000
        return young and not record.ready and not self.providers.ours(record.name)

    def _coming(self, step: PlanStep, now_ms: int) -> Node:
        """One that is not started yet, or is being replaced and has ended."""
        spec = self.fleet.named(step.node_class)
        return Node(
            name=step.name, node_class=step.node_class, host=step.host, fingerprint=step.fingerprint,
            state=NodeState.STARTING, memory_bytes=spec.memory_bytes if spec else 0, cores=spec.cores if spec else 0.0,
            begun_ms=now_ms,
        )  # fmt: skip

    def _hosts(self, nodes: list[Node]) -> dict[str, HostFacts]:
        memory, cores = memory_bytes() * (100 - RESERVE_PERCENT) // 100, float(cpus())
        away = self.providers.problems()
        hosts = {
            # For another machine the file has to say it.
            name: facts_of(host, *((0, 0.0) if host.address else (memory, cores)), away=away.get(name, ""))
            for name, host in self.fleet.hosts.items()
        }
        # A host that is no longer in the file: its nodes can be ended, and none is started there.
        return {node.host: HostFacts(0, 0.0) for node in nodes} | hosts

    async def _ask(self) -> tuple[dict[str, WorkerRow] | None, list[RequestRow]]:
        if self.fleet.broker is not None and not any(
            record.node_class == BROKER and self.providers.pid(record.name) for record in self.providers.records()
        ):
            return None, []
        try:
            async with self.mesh() as client:
                rows = {row.worker: row for row in await client.workers()}
                if any(one.name not in rows for one in self.providers.records() if one.node_class != BROKER):
                    rows |= await hosted.ask(client, rows)
                return rows, await client.requests()
        except LlamboError as error:
            if error.code not in (Code.NO_BROKER, Code.TIMEOUT):
                raise
            return None, []

    async def __aenter__(self) -> NodeManager:
        """Use one connection for everything."""
        self._connection.held_open = True
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._connection.held_open = False
        await self._connection.close()

    def mesh(self) -> contextlib.AbstractAsyncContextManager[Client]:
        return self._connection.to(self.address)

    # --- what is done ------------------------------------------------------------------------------------

    async def forget_ended(self, ended: list[NodeRecord]) -> list[NodeFailed]:
        """Nodes that have ended by themselves: how, and the end of their logs. Their names are free afterwards."""
        failed = []
        for record in ended:
            log_tail = await self.providers.fetch_log_tail(record.name)
            failed.append(NodeFailed(record.name, self.providers.how_it_ended(record.name), log_tail))
            try:
                await self.providers.forget(record.name)
            except NodeFailed as remaining:
                self.report(f"{remaining}")  # the next look finds it again
        return failed

    async def carry_out(self, step: PlanStep) -> NodeFailed | None:
        self.begin_step(step)
        try:
            async with self._limit:
                await self._do(step)
        except NodeFailed as failed:
            self.report(f"{failed}")
            return failed
        finally:
            self.end_step(step.name)
        return None

    def begin_step(self, step: PlanStep) -> None:
        """From now on the node is shown as this step will leave it."""
        self._under_way[step.name] = step
        if step.kind in (StepKind.RETIRE, StepKind.REPLACE):
            self.on_stopping(step.name)

    def end_step(self, name: str) -> None:
        self._under_way.pop(name, None)

    async def _do(self, step: PlanStep) -> None:
        match step.kind:
            case StepKind.SPAWN:
                await self.spawn(step)
            case StepKind.RESUME:
                await self.drain(step.name, undo=True)
                self.report(f"{step.name} works again: {step.why}")
            case StepKind.RETIRE:
                await self.retire(step)
            case StepKind.REPLACE:
                await self.retire(step)
                await self.spawn(step)

    def spec_of(self, step: PlanStep) -> NodeClass | None:
        """What a step starts."""
        return self.older.get(step.fingerprint) or self.fleet.named(step.node_class)

    async def spawn(self, step: PlanStep) -> None:
        spec = self.spec_of(step)
        assert spec is not None, "plans start nodes of classes that exist"
        began = time.monotonic()
        record = NodeRecord(
            name=step.name, node_class=spec.name, host=step.host, fingerprint=step.fingerprint, slots=spec.slots,
            memory_bytes=spec.memory_bytes, cores=spec.cores, begun_ms=clock.wall_ms(),
        )  # fmt: skip
        ready_line = await self.providers.spawn(record, self._launch(spec, step.name, step.host), START_S)
        address = _broker_address(spec, self._port, int(ready_line)) if spec.is_broker else ""
        self.providers.remember(msgspec.structs.replace(record, ready=True, address=address))
        self.report(f"{step.name} is ready after {time.monotonic() - began:.1f} s")

    async def retire(self, step: PlanStep) -> None:
        """Drain a node, so that its runs move, and end it with a signal, on which it finishes the rest.

        Neither needs the broker to answer.
        """
        spec = self.fleet.named(step.node_class)
        drained = await self._drain(step)
        default = SECTIONS["worker"]["drain_ms"].default
        drain_ms = spec.settings.get("worker", {}).get("drain_ms", default) if spec else default
        await self.providers.end(step.name, int(drain_ms) / 1000 + AFTER_DRAIN_S)
        # The broker remembers a drain by name, so that it survives a restart. The next node of this name is another.
        for worker in drained:
            with _unless_gone():
                async with self.mesh() as client:
                    await client.drain(worker, undo=True)
        self.report(f"{step.name} has left: {step.why}")

    async def _drain(self, step: PlanStep) -> list[str]:
        """Returns the workers that it has, or may have."""
        if step.node_class == BROKER:
            return []
        workers = [step.name]
        with _unless_gone():
            async with self.mesh() as client:
                workers = await _workers(client, step.name)
                for worker in workers:
                    with _unless_gone():
                        await client.drain(worker, move=True)
        return workers

    async def drain(self, node: str, *, undo: bool) -> tuple[DrainReply, list[str]]:
        """And the workers that it counts for: the node, or those of the models that it has loaded as a host. No message
        keeps a host from loading others."""
        async with self.mesh() as client:
            workers = await _workers(client, node)
            replies = [await client.drain(worker, undo, move=not undo) for worker in workers]
        running = sum(reply.running for reply in replies)
        return DrainReply(worker=node, draining=not undo, moving=not undo, running=running), workers

    def _launch(self, spec: NodeClass, name: str, host: str) -> Launch:
        if spec.is_broker:
            named = "port" in spec.settings.get("broker", {})
            return Launch(command_of(spec, name, keys=self.fleet.keys, port=None if named else self._port), {})
        path = self._key(spec.name) if self.fleet.keys else None
        # The address in the file is valid everywhere; the one that a broker of this fleet reported, on this machine.
        address = self.fleet.broker_address or self.address
        if self.fleet.hosts[host].address and any(sockets.is_loopback(one) for one, _ in sockets.split_all(address)):
            text = f"is to run on {host}, which cannot reach a broker at {address}"
            raise NodeFailed(name, f"{text}: set its address as broker in [fleet]", "")
        command = command_of(spec, name, broker=address, key=str(path or ""))
        key = keys.read_private(path) if path else ""
        return Launch(command, environ(spec, broker=address), key, spec.cpu_weight)

    def _key(self, node_class: str) -> Path:
        """One for all workers of a class, whose names begin with the name of the class. It is made if it is missing."""
        folder = Folder(Path(self.fleet.keys).expanduser())
        if not folder.ring().named(node_class):
            folder.add(Identity(node_class, "worker"), clock.wall_ms() // 1000)
        return folder.path / ISSUED / f"{node_class}.key"


@contextlib.contextmanager
def _unless_gone() -> Iterator[None]:
    """What is done to a worker needs neither the worker nor the broker: one that is gone is drained."""
    try:
        yield
    except LlamboError as error:
        if error.code not in (Code.NO_BROKER, Code.TIMEOUT, Code.UNKNOWN_WORKER):
            raise


async def _workers(client: Client, node: str) -> list[str]:
    """The node itself, or those that it has as a host."""
    workers = {row.worker: row for row in await client.workers()}
    hosts = {} if node in workers else await hosted.ask(client, workers)
    return hosts[node].workers if node in hosts else [node]


def _broker_address(broker: NodeClass, default: int, reported: int | None = None) -> str:
    """Where a broker of this fleet is reached from this machine. `default`: its port, if the file names none."""
    settings = broker.settings.get("broker", {})
    configured = int(settings.get("port", default))
    return local_endpoint(str(settings.get("bind", "127.0.0.1")), configured if reported is None else reported)
