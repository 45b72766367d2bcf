"""One orchestrator at a time: the one that holds the lease of every broker that answers.

Another orchestrator stands by, asks again every second, and takes over when the lease is free. If the broker belongs to
the fleet itself and does not run yet, there is none to ask; then the lock on the folder (`Site.lock`) separates two
orchestrators of one machine. The orchestrator's events are sent along, into the event feed of the mesh.
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

#: The name of the lease, and the kind of the events that come with it.
LEASE = "fleet"
#: How many events fit into one message, and characters of each.
EVENTS, EVENT_CHARS = 64, 256


class Leadership:
    def __init__(self, connect: Callable[[str], Client]) -> None:
        self._connect = connect
        self._holder = secrets.token_bytes(16)
        self._clients: dict[str, Client] = {}
        self._until = 0.0
        self._unsent: list[str] = []
        #: Why the lease is not ours.
        self.why = ""
        #: How many brokers have answered the last time.
        self.answered = 0

    @property
    def leads(self) -> bool:
        """By our own clock, which started the lease before the brokers did."""
        return time.monotonic() < self._until

    def add_event(self, text: str) -> None:
        self._unsent = [*self._unsent, text[:EVENT_CHARS]][-EVENTS:]

    async def renew(self, address: str, promised: Iterable[str], *, acting: bool) -> None:
        """Ask every broker of this address. `promised`: models whose workers are started when a request asks for them.

        `acting`: we have acted until now, with a lease, or without one because no broker answered.
        """
        began, events = time.monotonic(), self._unsent
        models = sorted(promised)[: limits.PROMISED_MODELS]
        lease = m.Lease(0, LEASE, self._holder, limits.LEASE_MS, acting, models, events)
        answers = []
        for host, port in sockets.split_all(address):
            answer = await self._ask(endpoint(host, port), lease)
            answers += [answer] if answer is not None else []
        self.answered = len(answers)
        denied = [answer.by for answer in answers if not answer.granted]
        if denied:
            self._until = 0.0
            self.why = f"{denied[0]} has the lease" if denied[0] else "a broker that has just started grants none yet"
        elif answers:
            self._until = began + limits.LEASE_MS / 1_000
            self._unsent = self._unsent[len(events) :]
        else:
            self.why = "no broker answers"

    async def give_back(self) -> None:
        for client in self._clients.values():
            # If this fails, the lease expires soon.
            with contextlib.suppress(LlamboError):
                await client.lease(m.Lease(0, LEASE, self._holder, 0, events=self._unsent))
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
                raise  # as for a key that is not an admin's
            lost = self._clients.pop(address, None)
            if lost is not None:
                await lost.close()
            return None
