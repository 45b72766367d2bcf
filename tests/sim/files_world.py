"""Hosts that fetch one file from each other, in virtual time: the real fetch cores and grants, over a bad network.

One host has the file, or gets it chunk by chunk from outside. Of the others some send wrong bytes, some state wrong
checksums, some are slow, die and come back with what they had; messages are lost; grants come late and end. A chunk is
a text here, and its sum is itself.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from llambo.mesh.wire.messages import FileGrant
from llambo.worker.share.fetch_core import AskForChunk, AskForSums, FetchAction, FetchCore, WriteChunk
from llambo.worker.share.grants import Grants

#: A run that is not done by then is stuck.
LONGEST_MS = 600_000
TURN_MS = 100


def right(number: int) -> bytes:
    return b"right %d" % number


@dataclass(slots=True)
class SimHost:
    name: str
    #: "", "corrupt": wrong bytes of what it states; "liar": another file.
    fault: str
    delay_ms: int
    core: FetchCore
    grants: Grants = field(default_factory=Grants)
    file: list[bytes] = field(default_factory=list)
    early: dict[int, bytes] = field(default_factory=dict)
    alive: bool = True

    def stated(self) -> list[bytes]:
        return [b"lie" + each for each in self.file] if self.fault == "liar" else self.file

    def chunk(self, number: int) -> bytes:
        return self.stated()[number] + (b"!" if self.fault == "corrupt" else b"")


class FilesWorld:
    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = 0
        self.chunks = self.chance.randint(1, 60)
        self.loss = self.chance.choice((0.0, 0.0, 0.05, 0.2))
        #: How often there is no grant. A refused host asks anew, also for what was lost: so some worlds have none.
        self.ungranted = self.chance.choice((0.0, 0.05))
        self.wrong: list[str] = []
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._number = count()
        names = [f"h{number}" for number in range(self.chance.randint(2, 6))]
        self.hosts = {name: self._host(name, first=name == "h0") for name in names}
        self.tickets = {(a, b): self.chance.randbytes(16) for a in names for b in names}

    def _host(self, name: str, *, first: bool) -> SimHost:
        fault = "" if first else self.chance.choice(("", "", "", "corrupt", "liar"))
        delay_ms = self.chance.choice((1, 5, 20, 20, 100, 3_000))
        host = SimHost(name, fault, delay_ms, FetchCore(self.chunks, 0))
        if (first and self.chance.random() < 0.5) or fault:
            host.file = [right(number) for number in range(self.chunks)]
        return host

    # --- time ---

    def later(self, delay_ms: float, work: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + max(1, round(delay_ms)), next(self._number), work))

    def run(self) -> list[str]:
        """What went wrong."""
        for name in self.hosts:
            self._turn(name)
        self._outside()
        self._intrude()
        while self._events and self.now < LONGEST_MS and not self.wrong and not self._done():
            self.now, _, work = heapq.heappop(self._events)
            work()
        if not self.wrong and not self._done():
            self.wrong.append(f"stuck: { ({host.name: len(host.file) for host in self.hosts.values()}) }")
        return self.wrong

    def _done(self) -> bool:
        whole = [right(number) for number in range(self.chunks)]
        return all(host.file == whole for host in self.hosts.values())

    # --- what hosts do ---

    def _turn(self, name: str) -> None:
        host = self.hosts[name]
        self.later(TURN_MS, lambda: self._turn(name))
        # The grants of a broker, which may be late, and end for a while. The first host is named first.
        others = [other for other in self.hosts.values() if other is not host and other.alive]
        given = [FileGrant(self.tickets[name, other.name], "hf:a/b", other.name) for other in others]
        host.grants.replace(tuple(each for each in given if self.chance.random() >= self.ungranted))
        if not host.fault and len(host.file) < self.chunks and name != "h0":
            self._perform(host, host.core.on_hosts([other.name for other in others], self.now))
            self._perform(host, host.core.on_time(self.now))
            if host.core.is_stuck(self.now):  # a broker says then that it is to download it
                host.file, host.early = [right(number) for number in range(self.chunks)], {}
                host.core = FetchCore(self.chunks, self.now, self.chunks)
        if self.chance.random() < 0.002 and name != "h0" and host.alive:
            host.alive = False
            self.later(self.chance.choice((500, 20_000)), lambda: self._come_back(host))

    def _come_back(self, host: SimHost) -> None:
        host.alive, host.early = True, {}
        if not host.fault:
            host.core = FetchCore(self.chunks, self.now, len(host.file), host.core.dropped)

    def _outside(self) -> None:
        first = self.hosts["h0"]
        if len(first.file) < self.chunks:
            first.file.append(right(len(first.file)))
            self.later(self.chance.choice((5, 50, 500)), self._outside)

    def _intrude(self) -> None:
        """A peer without a grant asks, with a ticket that it has seen or made up."""
        host = self.chance.choice(list(self.hosts.values()))
        ticket = self.chance.choice([*self.tickets.values(), self.chance.randbytes(16)])
        if host.grants.ref_for(ticket, "intruder") is not None:
            self.wrong.append("a byte without a grant: another key")
        peer = self.chance.choice(list(self.hosts.values())).name
        if host.grants.ref_for(self.chance.randbytes(16), peer) is not None:
            self.wrong.append("a byte without a grant: another ticket")
        self.later(1_000, self._intrude)

    def _perform(self, host: SimHost, actions: list[FetchAction]) -> None:
        for action in actions:
            match action:
                case AskForSums(name, first):
                    self._ask(host, name, partial(self._sums, host, first))
                case AskForChunk(name, number):
                    self._ask(host, name, partial(self._chunk, host, number))
                case WriteChunk(number):
                    if number != len(host.file) or number not in host.early:
                        self.wrong.append(f"{host.name} writes chunk {number}, which is not the next one")
                        return
                    host.file.append(host.early.pop(number))
                    if len(host.file) == self.chunks and host.file[-1:] and not self._is_right(host):
                        host.core.on_wrong_file()
                        host.file, host.early = [], {}

    def _is_right(self, host: SimHost) -> bool:
        return host.file == [right(number) for number in range(self.chunks)]

    def _ask(self, host: SimHost, name: str, answer: Callable[[SimHost], None]) -> None:
        other = self.hosts[name]
        asked_by = host.core

        def arrive() -> None:
            granted = other.grants.ref_for(self.tickets[name, host.name], host.name)
            if not (other.alive and host.alive) or self.chance.random() < self.loss:
                return
            if granted is None:
                self._perform(host, host.core.on_refused(name, self.now))
            elif host.core is asked_by:
                answer(other)

        self.later(other.delay_ms * self.chance.uniform(0.5, 2.0), arrive)

    def _sums(self, host: SimHost, first: int, other: SimHost) -> None:
        self._perform(host, host.core.on_sums(other.name, first, other.stated()[first:], self.now))

    def _chunk(self, host: SimHost, number: int, other: SimHost) -> None:
        if number >= len(other.file):
            self._perform(host, host.core.on_refused(other.name, self.now))
            return
        data = other.chunk(number)
        counts = next((each.sums[number] for each in host.core.sources.values() if number < len(each.sums)), None)
        keep, actions = host.core.on_chunk(other.name, number, data, self.now)
        if keep and data != counts:
            self.wrong.append(f"{host.name} keeps a chunk of {other.name} that is not what counts")
        if keep:
            host.early[number] = data
        self._perform(host, actions)
