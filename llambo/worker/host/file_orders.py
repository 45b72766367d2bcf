"""What brokers want a host to have the files of, and what it may give to other hosts. A part of the host core.

An order counts until the next message of its broker, or until it was not repeated for some heartbeats; so do grants.
They outlast the loss of a connection for that long, because to stop a transfer costs bytes. Orders of several brokers
for one model are one: it is fetched from all hosts that any of them names, and from outside if one of them says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.timers import NEVER_MS
from llambo.worker.host.host_events import FetchModel, GrantFiles, HostAction, StopFetching

#: Models that are fetched at a time; others wait.
FETCHES = 2
#: States in which no thread works on it.
ENDED = ("absent", "here", "failed")


@dataclass(frozen=True, slots=True)
class _Given:
    orders: list[m.FileOrder]
    grants: list[m.FileGrant]
    until_ms: int


class FileOrders:
    def __init__(self, out: list[HostAction]) -> None:
        self._out = out
        self._given: dict[int, _Given] = {}
        self._orders: dict[str, m.FileOrder] = {}
        self._grants: tuple[m.FileGrant, ...] = ()
        #: Those that a thread works on, by the last order.
        self._active: dict[str, m.FileOrder] = {}
        self.files: dict[str, m.HostedFile] = {}
        #: Named for this host, and not here.
        self._wanted: tuple[str, ...] = ()
        #: What is reported has changed.
        self.changed = False
        self.stopping = False

    def on_orders(self, broker: int, message: m.FetchFiles, until_ms: int) -> None:
        self._given[broker] = _Given(message.orders, message.grants, until_ms)

    def on_wanted(self, wanted: tuple[str, ...]) -> None:
        self.changed = self.changed or wanted != self._wanted
        self._wanted = wanted

    def on_file(self, file: m.HostedFile) -> None:
        self.changed = True
        if file.state in ENDED:
            self._active.pop(file.ref, None)
        if file.ref in self._orders:
            self.files[file.ref] = file

    def stop(self) -> None:
        self.stopping = True
        self._given.clear()

    def settle(self, now_ms: int) -> None:
        for broker in [broker for broker, given in self._given.items() if given.until_ms <= now_ms]:
            del self._given[broker]
        self._orders = {}
        for given in self._given.values():
            for order in given.orders:
                known = self._orders.get(order.ref)
                self._orders[order.ref] = order if known is None else _both(known, order)
        for ref in self.files.keys() - self._orders.keys():
            del self.files[ref]
            self.changed = True
        for ref in self._active.keys() - self._orders.keys():
            self._out.append(StopFetching(ref))
            del self._active[ref]
        for order in self._orders.values():
            self._carry_out(order)
        grants = tuple(grant for given in self._given.values() for grant in given.grants)
        if grants != self._grants:
            self._grants = grants
            self._out.append(GrantFiles(grants))

    def _carry_out(self, order: m.FileOrder) -> None:
        file, active = self.files.get(order.ref), self._active.get(order.ref)
        if active is None and file is not None:
            again = file.attempt < order.attempt if file.state == "failed" else file.state == "absent" and order.want
            if not again:
                return
        if active == order or (active is None and len(self._active) >= FETCHES):
            return
        self._active[order.ref] = order
        self._out.append(FetchModel(order))

    def hosted(self) -> list[m.HostedFile]:
        """For a report."""
        asked = [m.HostedFile(ref, "wanted") for ref in self._wanted if ref not in self.files]
        waiting = [m.HostedFile(ref, "waiting", note=f"{FETCHES} others are fetched") for ref in self._orders
                   if ref not in self.files and ref not in self._active]  # fmt: skip
        return [*self.files.values(), *asked, *waiting][: limits.FILES_PER_HOST]

    @property
    def next_wakeup_ms(self) -> int:
        return min((given.until_ms for given in self._given.values()), default=NEVER_MS)


def _both(one: m.FileOrder, other: m.FileOrder) -> m.FileOrder:
    sources = {source.host: source for source in [*other.sources, *one.sources]}
    return msgspec.structs.replace(
        one,
        want=one.want or other.want,
        outside=one.outside or other.outside,
        sources=list(sources.values())[: limits.SOURCES_PER_FILE],
        attempt=max(one.attempt, other.attempt),
    )
