"""One orchestrator at a time: whoever has the lease of every broker that answers.

Another one stands by, asks again every second, and goes on when the lease is free. Where a broker is kept by the fleet
itself and is not there yet, there is nobody to ask; then the lock on the folder (`Site.alone`) is what keeps two of one
machine apart. What the orchestrator has to tell goes along, into the events feed of the mesh.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterable

from llambo.mesh.client.client import Client
from llambo.mesh.link import sockets
from llambo.mesh.link.sockets import endpoint
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.reports import LeaseReply

#: What the lease is called, and so the events that come with it.
LEASE = "fleet"
#: As many events as one message takes, and characters of each.
EVENTS, EVENT_CHARS = 64, 256


class Leadership:
    def __init__(self, connect: Callable[[str], Client]) -> None:
        self._connect = connect
        self._holder = secrets.token_bytes(16)
        self._clients: dict[str, Client] = {}
        self._until = 0.0
        self._untold: list[str] = []
        #: Why it is not ours.
        self.why = ""
        #: Brokers that have answered the last time.
        self.asked = 0

    @property
    def leads(self) -> bool:
        """By our own clock, which began before the brokers'."""
        return time.monotonic() < self._until

    def tell(self, text: str) -> None:
        self._untold = [*self._untold, text[:EVENT_CHARS]][-EVENTS:]

    async def renew(self, address: str, promised: Iterable[str], *, acting: bool) -> None:
        """Ask every broker of this address. `promised`: models whose workers are begun when they are asked for.

        `acting`: we have acted until now, with a lease or because nobody was there to give one.
        """
        began, said = time.monotonic(), self._untold
        models = sorted(promised)[: limits.PROMISED_MODELS]
        lease = m.Lease(0, LEASE, self._holder, limits.LEASE_MS, acting, models, said)
        answers = []
        for host, port in sockets.split_all(address):
            answer = await self._ask(endpoint(host, port), lease)
            answers += [answer] if answer is not None else []
        self.asked = len(answers)
        denied = [answer.by for answer in answers if not answer.granted]
        if denied:
            self._until = 0.0
            self.why = f"{denied[0]} keeps it" if denied[0] else "a broker that has just begun gives nobody a lease yet"
        elif answers:
            self._until = began + limits.LEASE_MS / 1_000
            self._untold = self._untold[len(said) :]
        else:
            self.why = "no broker answers"

    async def give_back(self) -> None:
        for client in self._clients.values():
            # It is over soon anyway.
            with contextlib.suppress(LlamboError):
                await client.lease(m.Lease(0, LEASE, self._holder, 0, events=self._untold))
            await client.close()
        self._clients.clear()
        self._until = 0.0

    async def _ask(self, address: str, lease: m.Lease) -> LeaseReply | None:
        """None: that broker does not answer."""
        client = self._clients.get(address)
        try:
            if client is None:
                client = self._connect(address)
                await client.connect()
                self._clients[address] = client
            return await client.lease(lease)
        except LlamboError as error:
            if not error.retryable:
                raise  # a key that is no admin's will not become one
            there = self._clients.pop(address, None)
            if there is not None:
                await there.close()
            return None
