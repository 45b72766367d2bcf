"""All providers of a fleet as one. Each host has one, and a question about a node goes to the one that runs it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from llambo.fleet.model import Fleet, NodeRecord
from llambo.fleet.providers.process import Processes
from llambo.fleet.providers.units import Units


@dataclass(frozen=True, slots=True)
class Launch:
    """What a node is started with, for either provider."""

    #: For a process.
    command: list[str]
    #: For a unit, which is always a worker: the same as variables.
    environ: dict[str, str]
    #: The key itself.
    key: str = ""
    cpu_weight: int = 100


class Providers:
    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.processes = Processes(folder)
        self._folder = folder
        self._units: dict[str, Units] = {}
        self._asking: dict[Units, asyncio.Task[None]] = {}
        self.set_hosts(fleet)

    def set_hosts(self, fleet: Fleet) -> None:
        """Add hosts that are new in the file. Hosts that are no longer in it remain, with the nodes that run there."""
        for host in fleet.hosts.values():
            if host.provider != "systemd":
                continue
            known = self._units.get(host.name)
            if known is None or (known.host.address, known.host.user) != (host.address, host.user):
                self._units[host.name] = Units(fleet.name, host, self._folder)

    async def refresh(self, wait_s: float | None = None) -> None:
        """Ask all hosts what runs there. A host that has been asked before and does not answer within `wait_s` stays as
        it was; its answer counts when it arrives."""
        hosts = list(self._units.values())
        if not hosts:
            return
        # Each is asked one question at a time.
        for units in hosts:
            if units not in self._asking:
                self._asking[units] = asyncio.create_task(units.refresh())
        await asyncio.wait(self._asking.values(), timeout=wait_s if all(units.asked for units in hosts) else None)
        for units in [units for units, task in self._asking.items() if task.done()]:
            self._asking.pop(units).result()

    def problems(self) -> dict[str, str]:
        """Hosts that cannot be asked, and why."""
        return {name: units.problem for name, units in self._units.items() if units.problem}

    def records(self) -> list[NodeRecord]:
        return [*self.processes.records(), *(record for units in self._units.values() for record in units.records())]

    def fingerprints(self) -> dict[str, str]:
        """What each node runs."""
        return {record.name: record.fingerprint for record in self.records()}

    def _of(self, name: str) -> Processes | Units:
        for units in self._units.values():
            if any(record.name == name for record in units.records()):
                return units
        return self.processes

    def pid(self, name: str) -> int | None:
        return self._of(name).pid(name)

    def starting(self, name: str) -> bool:
        """Its service manager has started or restarted it, and waits until it is ready."""
        provider = self._of(name)
        return isinstance(provider, Units) and provider.starting(name)

    def ours(self, name: str) -> bool:
        return self.processes.ours(name)

    def log_tail(self, name: str) -> str:
        return self._of(name).log_tail(name)

    async def fetch_log_tail(self, name: str) -> str:
        provider = self._of(name)
        return await provider.fetch_log_tail(name) if isinstance(provider, Units) else provider.log_tail(name)

    def how_it_ended(self, name: str) -> str:
        return self._of(name).how_it_ended(name)

    async def spawn(self, record: NodeRecord, launch: Launch, within_s: float) -> str:
        units = self._units.get(record.host)
        if units is not None:
            return await units.spawn(record, launch.environ, launch.key, launch.cpu_weight, within_s)
        return await self.processes.spawn(record, launch.command, within_s)

    async def end(self, name: str, within_s: float) -> None:
        await self._of(name).end(name, within_s)

    def remember(self, record: NodeRecord) -> None:
        """Store that a process has been ready. A service manager knows it by itself."""
        if record.host not in self._units:
            self.processes.remember(record)

    async def forget(self, name: str) -> None:
        """A node that has ended by itself."""
        provider = self._of(name)
        if isinstance(provider, Units):
            await provider.end(name, 0)
        else:
            provider.forget(name)
