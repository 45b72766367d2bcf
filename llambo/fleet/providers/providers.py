"""All providers of a fleet as one: each host has one, and what is asked about a node goes to the one that has it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from llambo.fleet.model import Fleet
from llambo.fleet.providers.process import Processes, Record
from llambo.fleet.providers.units import Units


@dataclass(frozen=True, slots=True)
class Told:
    """What a node is told, for whichever way it is told."""

    #: A command line.
    words: list[str]
    #: The same as variables, for a worker.
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
        self.told_of(fleet)

    def told_of(self, fleet: Fleet) -> None:
        """Another file: hosts may have come. One that it does not name any more keeps what runs there."""
        for host in fleet.hosts.values():
            if host.provider != "systemd":
                continue
            known = self._units.get(host.name)
            if known is None or (known.host.address, known.host.user) != (host.address, host.user):
                self._units[host.name] = Units(fleet.name, host, self._folder)

    async def refresh(self, patience_s: float | None = None) -> None:
        """Who has been asked before and does not answer within `patience_s` is as it was known last; its answer counts
        when it comes."""
        hosts = list(self._units.values())
        if not hosts:
            return
        # Each is asked by one at a time.
        for units in hosts:
            if units not in self._asking:
                self._asking[units] = asyncio.create_task(units.refresh())
        await asyncio.wait(self._asking.values(), timeout=patience_s if all(units.asked for units in hosts) else None)
        for units in [units for units, task in self._asking.items() if task.done()]:
            self._asking.pop(units).result()

    def problems(self) -> dict[str, str]:
        """Hosts that cannot be asked, and why."""
        return {name: units.problem for name, units in self._units.items() if units.problem}

    def records(self) -> list[Record]:
        return [*self.processes.records(), *(record for units in self._units.values() for record in units.records())]

    def _of(self, name: str) -> Processes | Units:
        for units in self._units.values():
            if any(record.name == name for record in units.records()):
                return units
        return self.processes

    def pid(self, name: str) -> int | None:
        return self._of(name).pid(name)

    def starting(self, name: str) -> bool:
        """Its manager has begun it, perhaps again, and waits for it to be ready."""
        there = self._of(name)
        return isinstance(there, Units) and there.starting(name)

    def ours(self, name: str) -> bool:
        return self.processes.ours(name)

    def words(self, name: str) -> str:
        return self._of(name).words(name)

    async def fetch_words(self, name: str) -> str:
        there = self._of(name)
        return await there.fetch_words(name) if isinstance(there, Units) else there.words(name)

    def how_it_ended(self, name: str) -> str:
        return self._of(name).how_it_ended(name)

    async def spawn(self, record: Record, told: Told, within_s: float) -> str:
        units = self._units.get(record.host)
        if units is not None:
            return await units.spawn(record, told.environ, told.key, told.cpu_weight, within_s)
        return await self.processes.spawn(record, told.words, within_s)

    async def end(self, name: str, within_s: float) -> None:
        await self._of(name).end(name, within_s)

    def remember(self, record: Record) -> None:
        """That it was ready, once; a service manager knows so itself."""
        if record.host not in self._units:
            self.processes.remember(record)

    async def forget(self, name: str) -> None:
        """One that has ended by itself."""
        there = self._of(name)
        if isinstance(there, Units):
            await there.end(name, 0)
        else:
            there.forget(name)
