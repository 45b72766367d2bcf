"""From plans to processes: what there is, put together from providers and the mesh, and steps carried out."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from llambo.fleet.decide.plan import Do, Step
from llambo.fleet.model import Fleet, NodeClass
from llambo.fleet.providers.process import Failed, Record
from llambo.fleet.providers.providers import Providers, Told
from llambo.fleet.world import HostFacts, Node, NodeState, World, facts_of
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

#: Memory of this machine that is left for everything else, in percent.
RESERVE_PERCENT = 10

# --- What a node is begun with: its settings as the words of a command line. ---


def environ(kept: NodeClass, *, broker: str) -> dict[str, str]:
    """A worker's as variables. Its name is its unit's, and its key a credential."""
    told = {
        SECTIONS[section][key].env: SECTIONS[section][key].show(value)
        for section, said in kept.settings.items()
        for key, value in said.items()
    }
    return {**told, SECTIONS["worker"]["class"].env: kept.name, SECTIONS["mesh"]["broker"].env: broker}


def command_of(kept: NodeClass, name: str, *, broker: str = "", key: str = "", keys: str = "") -> list[str]:
    """`broker`: where a worker finds it; `key`: what it shows there; `keys`: what a broker looks it up in."""
    found = [sys.executable, "-m", f"llambo.cli.services.{'broker' if kept.is_broker else 'worker'}"]
    for section, told in kept.settings.items():
        for key_name, value in told.items():
            row = SECTIONS[section][key_name]
            found += [row.flag, row.show(value)]
    if kept.is_broker:
        return [*found, *(["--keys", keys] if keys else [])]
    found += ["--name", name, "--class", kept.name]
    found += ["--broker", broker] if broker else []
    return [*found, *(["--key", key] if key else [])]


# --- How a node is: what its provider knows of it and what the mesh says, put together. Pure. ---

#: A node that is not ready after so long has failed: it loads its model meanwhile.
START_S = 300.0


def node_of(
    record: Record, workers: Mapping[str, dict[str, Any]] | None, now_ms: int, *, since_ms: int, away: str = ""
) -> Node:
    """`since_ms`: when it was begun, or was in the mesh last: from then on it has its time to come. `away`: why its
    host cannot be asked; what is known of it is what was known last."""
    told = (workers or {}).get(record.name)
    state, note = NodeState.READY, f"{record.host} is away" if away else ""
    if told is not None:
        if told["state"] in ("draining", "drained"):
            state = NodeState.DRAINING
        elif told["state"] in ("loading", "joining"):
            state = NodeState.STARTING
    elif workers is not None and record.node_class != "broker":
        # It lives, and the mesh has not heard of it.
        late = now_ms - since_ms > START_S * 1000
        state = NodeState.FAILED if late else NodeState.STARTING
        note = note or (f"it is not in the mesh after {START_S:g} s" if late else "")
    return Node(
        name=record.name, node_class=record.node_class, host=record.host, fingerprint=record.fingerprint, state=state,
        busy=told["busy"] + told["busy_elsewhere"] if told else 0, slots=told["slots"] if told else record.slots,
        memory_bytes=record.memory_bytes, cores=record.cores, begun_ms=record.begun_ms, note=note,
    )  # fmt: skip


#: Who looks again and again waits no longer for a host: a lease is to be renewed meanwhile.
LOOK_S = 2.0
#: How many are begun or ended at a time.
AT_ONCE = 8
#: From then on it says that it lives, which takes a Python that starts.
BEGIN_S = 10.0
#: After `drain_ms` a worker gives up what it runs, which takes a moment.
AFTER_DRAIN_S = 10.0

Tell = Callable[[str], None]
#: Makes a client for this broker.
Connect = Callable[[str], Client]


@dataclass(slots=True)
class Seen:
    """One look. `workers`: as the broker lists them, by name; None: it does not answer."""

    world: World
    workers: dict[str, dict[str, Any]] | None
    #: Those that live in the mesh, oldest first.
    requests: list[dict[str, Any]] = field(default_factory=list)
    #: Those that have ended by themselves since the last look.
    ended: list[Record] = field(default_factory=list)

    def away(self) -> dict[str, str]:
        """Hosts that cannot be asked, and why."""
        return {name: facts.away for name, facts in self.world.hosts.items() if facts.away}


class Keeper:
    """Of all hosts, whoever their provider is."""

    def __init__(self, fleet: Fleet, folder: Path, address: str, connect: Connect, tell: Tell) -> None:
        """`address`: of the broker, if the file does not say it."""
        self.fleet = fleet
        self.processes = Providers(fleet, folder)
        self.tell = tell
        self.connect = connect
        #: Classes as they were, by fingerprint: a step may begin one of those, too.
        self.older: dict[str, NodeClass] = {}
        self._address = address
        self._lasting = False
        self._client: Client | None = None
        self._client_of = ""
        self._calling = asyncio.Lock()
        #: When each was in the mesh last, or was on its way there for its manager has begun it again.
        self._met: dict[str, int] = {}
        #: What is being done to whom, or is about to be.
        self._under_way: dict[str, Step] = {}
        self._limit = asyncio.Semaphore(AT_ONCE)

    # --- what there is -----------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where the broker is: the one that is kept here says so itself."""
        kept = next((one.address for one in self.processes.records() if one.node_class == "broker"), "")
        if kept or self.fleet.broker_address:
            return kept or self.fleet.broker_address
        if self.fleet.broker is None:
            return self._address
        told = self.fleet.broker.settings.get("broker", {})
        return _reached(str(told.get("bind", "127.0.0.1")), int(told.get("port", DEFAULT_PORT)))

    async def look(self) -> Seen:
        self.processes.told_of(self.fleet)
        await self.processes.refresh(LOOK_S if self._lasting else None)
        workers, requests = await self._ask()
        nodes, ended, away = [], [], self.processes.problems()
        now_ms = clock.wall_ms()
        coming = {name: step for name, step in self._under_way.items() if step.do in (Do.SPAWN, Do.REPLACE)}
        for record in self.processes.records():
            step = self._under_way.get(record.name)
            coming.pop(record.name, None)
            if step is not None:
                # It is as the step will leave it: about to be, or about to be gone, and nobody takes that back.
                about = NodeState.DRAINING if step.do is Do.RETIRE else NodeState.STARTING
                nodes.append(replace(node_of(record, workers, now_ms, since_ms=now_ms), state=about))
            elif self.processes.pid(record.name) is None and not self._just_begun(record, now_ms):
                ended.append(record)
            else:
                if record.name in (workers or {}) or self.processes.starting(record.name):
                    self._met[record.name] = now_ms
                since_ms = max(record.begun_ms, self._met.get(record.name, 0))
                nodes.append(node_of(record, workers, now_ms, since_ms=since_ms, away=away.get(record.host, "")))
        nodes += [self._coming(step, now_ms) for step in coming.values()]
        return Seen(World(tuple(nodes), self._hosts(nodes)), workers, requests, ended)

    def _just_begun(self, record: Record, now_ms: int) -> bool:
        """By somebody who is gone since; it has not come to say that it lives."""
        young = now_ms - record.begun_ms < BEGIN_S * 1000
        return young and not record.ready and not self.processes.ours(record.name)

    def _coming(self, step: Step, now_ms: int) -> Node:
        """One that is not begun yet, or is between its old life and its new one."""
        kept = self.fleet.named(step.node_class)
        return Node(
            name=step.name, node_class=step.node_class, host=step.host, fingerprint=step.fingerprint,
            state=NodeState.STARTING, memory_bytes=kept.memory_bytes if kept else 0, cores=kept.cores if kept else 0.0,
            begun_ms=now_ms,
        )  # fmt: skip

    def _hosts(self, nodes: list[Node]) -> dict[str, HostFacts]:
        memory, cores = memory_bytes() * (100 - RESERVE_PERCENT) // 100, float(cpus())
        away = self.processes.problems()
        hosts = {
            # Of another machine it is known what the file says.
            name: facts_of(host, *((0, 0.0) if host.address else (memory, cores)), away=away.get(name, ""))
            for name, host in self.fleet.hosts.items()
        }
        # One that the file has called otherwise since: what runs there can be ended, and nothing is begun there.
        return {node.host: HostFacts(0, 0.0) for node in nodes} | hosts

    async def _ask(self) -> tuple[dict[str, dict[str, Any]] | None, list[dict[str, Any]]]:
        if self.fleet.broker is not None and not any(
            record.node_class == "broker" and self.processes.pid(record.name) for record in self.processes.records()
        ):
            return None, []
        try:
            async with self.mesh() as client:
                return {row["worker"]: row for row in await client.query("workers")}, await client.query("requests")
        except LlamboError as error:
            if error.code not in (Code.NO_BROKER, Code.TIMEOUT):
                raise
            return None, []

    async def __aenter__(self) -> Keeper:
        """For long: one connection for everything, and not one for each question."""
        self._lasting = True
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._lasting = False
        await self._hang_up()

    @contextlib.asynccontextmanager
    async def mesh(self) -> AsyncIterator[Client]:
        if not self._lasting:
            async with self.connect(self.address) as client:
                yield client
            return
        async with self._calling:
            if self._client is None or self._client_of != self.address:
                await self._hang_up()
                client, self._client_of = self.connect(self.address), self.address
                await client.connect()
                self._client = client
        try:
            yield self._client
        except LlamboError as error:
            if error.code in (Code.NO_BROKER, Code.TIMEOUT, Code.UNAUTHORIZED):
                await self._hang_up()
            raise

    async def _hang_up(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    # --- what is done ------------------------------------------------------------------------------------

    async def bury(self, ended: list[Record]) -> list[Failed]:
        """Those that have ended by themselves: how, and with which words."""
        failed = []
        for record in ended:
            words = await self.processes.fetch_words(record.name)
            failed.append(Failed(record.name, self.processes.how_it_ended(record.name), words))
            try:
                await self.processes.forget(record.name)
            except Failed as left:
                self.tell(f"{left}")  # it is found again at the next look
        return failed

    async def carry_out(self, step: Step) -> Failed | None:
        self.see_to(step)
        try:
            async with self._limit:
                await self._do(step)
        except Failed as failed:
            self.tell(f"{failed}")
            return failed
        finally:
            self.leave_alone(step.name)
        return None

    def see_to(self, step: Step) -> None:
        """From now on it is shown as this step will leave it."""
        self._under_way[step.name] = step

    def leave_alone(self, name: str) -> None:
        self._under_way.pop(name, None)

    async def _do(self, step: Step) -> None:
        match step.do:
            case Do.SPAWN:
                await self.spawn(step)
            case Do.RESUME:
                async with self.mesh() as client:
                    await client.drain(step.name, undo=True)
                self.tell(f"{step.name} works again: {step.why}")
            case Do.RETIRE:
                await self.retire(step)
            case Do.REPLACE:
                await self.retire(step)
                await self.spawn(step)

    async def spawn(self, step: Step) -> None:
        kept = self.older.get(step.fingerprint) or self.fleet.named(step.node_class)
        assert kept is not None, "plans begin nodes of classes that there are"
        began = time.monotonic()
        record = Record(
            name=step.name, node_class=kept.name, host=step.host, fingerprint=step.fingerprint, slots=kept.slots,
            memory_bytes=kept.memory_bytes, cores=kept.cores, begun_ms=clock.wall_ms(),
        )  # fmt: skip
        said = await self.processes.spawn(record, self._told(kept, step.name, step.host), START_S)
        told = kept.settings.get("broker", {})
        address = _reached(str(told.get("bind", "127.0.0.1")), int(said)) if kept.is_broker else ""
        self.processes.remember(msgspec.structs.replace(record, ready=True, address=address))
        self.tell(f"{step.name} is ready after {time.monotonic() - began:.1f} s")

    async def retire(self, step: Step) -> None:
        """What it runs goes elsewhere; a signal lets it finish what does not. Neither needs the broker to be there."""
        kept = self.fleet.named(step.node_class)
        await self._drain(step, undo=False)
        default = SECTIONS["worker"]["drain_ms"].default
        told = kept.settings.get("worker", {}).get("drain_ms", default) if kept else default
        await self.processes.end(step.name, int(told) / 1000 + AFTER_DRAIN_S)
        # The broker remembers a drain, so that it outlives a restart. The next one of this name is not meant.
        await self._drain(step, undo=True)
        self.tell(f"{step.name} has left: {step.why}")

    async def _drain(self, step: Step, *, undo: bool) -> None:
        if step.node_class == "broker":
            return
        try:
            async with self.mesh() as client:
                await client.drain(step.name, undo, move=not undo)
        except LlamboError as error:
            if error.code not in (Code.NO_BROKER, Code.TIMEOUT, Code.UNKNOWN_WORKER):
                raise

    def _told(self, kept: NodeClass, name: str, host: str) -> Told:
        if kept.is_broker:
            return Told(command_of(kept, name, keys=self.fleet.keys), {})
        path = self._key(kept.name) if self.fleet.keys else None
        # What the file says is meant for everybody; a broker that is kept here says how it is reached from here.
        address = self.fleet.broker_address or self.address
        if self.fleet.hosts[host].address and any(sockets.is_loopback(one) for one in _hosts_of(address)):
            text = f"is to run on {host}, from where no broker is reached at {address}"
            raise Failed(name, f"{text}: say where it is, as broker in [fleet]", "")
        words = command_of(kept, name, broker=address, key=str(path or ""))
        key = keys.read_private(path) if path else ""
        return Told(words, environ(kept, broker=address), key, kept.cpu_weight)

    def _key(self, node_class: str) -> Path:
        """One for all workers of a class, whose names begin with its name; it is made if there is none yet."""
        folder = Folder(Path(self.fleet.keys).expanduser())
        if not folder.ring().named(node_class):
            folder.add(Identity(node_class, "worker"), clock.wall_ms() // 1000)
        return folder.path / ISSUED / f"{node_class}.key"


def _hosts_of(address: str) -> list[str]:
    return [host for host, _ in sockets.split_all(address)]


def _reached(host: str, port: int) -> str:
    return local_endpoint(host, port)
