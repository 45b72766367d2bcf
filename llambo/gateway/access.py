"""Callers of the gateway, and the client of the mesh that each of them has.

An API token stands for a name of the keyring. The gateway holds one client for each name, with the key of that name:
the broker decides what a name may do and how much of it, and no name sees the requests of another.
Without keys all callers share one client.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
import zmq

from llambo.mesh.client.client import Client
from llambo.mesh.link import sockets
from llambo.mesh.security import api_tokens
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.identity import ANYONE, Identity, PeerKey
from llambo.mesh.wire.reports import FoundRequest

log = logging.getLogger(__name__)

#: Clients that are open at a time; the one that was idle longest makes room for the next.
CALLERS = 256
#: How long to wait for the first answer of a broker.
CONNECT_MS = 2_000
#: The same, where a broker is asked only whether it has a request; and how long its answer may take.
ELSEWHERE_MS = 1_000


@dataclass(slots=True, eq=False)
class Caller:
    """A name that may use the gateway, and its client of the mesh."""

    identity: Identity
    address: str
    key: PeerKey | None
    context: zmq.Context[zmq.Socket[bytes]]
    #: Open requests. The client is not closed while there are any.
    open: int = 0
    used_at: float = 0.0
    _client: Client | None = None
    _connecting: asyncio.Future[Client] | None = None
    #: Clients for requests that another gateway has submitted, by the broker they were connected to; and those that
    #: have left that broker since.
    _elsewhere: dict[str, Client] = field(default_factory=dict)
    _moved: list[Client] = field(default_factory=list)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        return self.identity.name

    async def client(self) -> Client:
        """Connected at the first call; later it reconnects by itself."""
        if self._client is not None:
            return self._client
        if self._connecting is None:
            self._connecting = asyncio.ensure_future(self._connect())
        # All calls until then share this attempt, and its failure; a later call starts another one.
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> Client:
        try:
            self._client = await self._connected()
            return self._client
        finally:
            self._connecting = None

    async def client_with(self, requests: Sequence[str]) -> Client:
        """A client at the broker that has one of these requests; the usual one if no broker has any.

        With several brokers that may be another one than the usual client is at: another gateway has submitted them.
        """
        client = await self.client()
        places = await asyncio.get_running_loop().run_in_executor(None, sockets.resolve_all, self.address)
        if len(places) < 2 or await _has(client, requests):
            return client
        others = [place for place in (sockets.endpoint(*each) for each in places) if place != client.broker]
        asked = await asyncio.gather(*(self._client_at(place, requests) for place in others))
        return next((found for found in asked if found is not None), client)

    async def _client_at(self, place: str, requests: Sequence[str]) -> Client | None:
        """A client that is at this broker, if that has one of the requests. It leaves a broker that is lost."""
        async with self._lock:
            found = self._elsewhere.pop(place, None)
            if found is None or found.broker != place:
                self._moved += [found] if found is not None else []
                idle = [other for other in self._moved if not other.busy]
                self._moved = [other for other in self._moved if other.busy]
                await asyncio.gather(*(other.close() for other in idle))
                try:
                    found = await self._connected(first=place, connect_ms=ELSEWHERE_MS)
                except LlamboError:
                    return None
            self._elsewhere[place] = found
        return found if found.broker == place and await _has(found, requests) else None

    async def _connected(self, *, first: str = "", connect_ms: int = CONNECT_MS) -> Client:
        name = f"gateway/{self.name}" if self.name else "gateway"
        client = Client(
            self.address, key=self.key or "", context=self.context, name=name, connect_ms=connect_ms, first=first
        )
        await client.connect()
        return client

    async def close(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        clients = [*self._elsewhere.values(), *self._moved, *([self._client] if self._client is not None else [])]
        await asyncio.gather(*(client.close() for client in clients))


async def _has(client: Client, requests: Sequence[str]) -> bool:
    """Whether the broker of this client has one of these requests."""
    for id in requests:
        with suppress(LlamboError, TimeoutError, msgspec.ValidationError):
            async with asyncio.timeout(ELSEWHERE_MS / 1_000):
                if msgspec.convert(await client.query("find", id), FoundRequest).stored:
                    return True
    return False


class Access:
    def __init__(self, address: str, folder: Folder | None = None, key: PeerKey | None = None) -> None:
        """`folder`: keys and API tokens. Without it all callers are admitted, with `key` if caller is one."""
        sockets.split_all(address)
        self.address, self._folder = address, folder
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._anyone = Caller(ANYONE, address, key, self._context)
        self._callers: dict[str, Caller] = {}
        self._tokens: dict[str, api_tokens.ApiToken] = {}
        self._identities: dict[str, tuple[Identity, str]] = {}
        self._stamp = (0, 0, 0, 0)

    @property
    def requires_tokens(self) -> bool:
        return self._folder is not None

    @property
    def own(self) -> Caller:
        """The gateway itself, for queries that belong to no caller."""
        return self._anyone

    def caller(self, token: str) -> Caller:
        """The caller that has this token. Raises LlamboError if caller is none."""
        if self._folder is None:
            return self._anyone
        self._reload(self._folder)
        known = self._tokens.get(api_tokens.sha256_of(token)) if token else None
        if known is None or not known.valid(time.time()) or known.name not in self._identities:
            text = "an API token is required: Authorization: Bearer sk-llambo-..." if not token else "no such API token"
            raise LlamboError(Code.UNAUTHORIZED, text)
        return self._of(self._folder, known.name)

    def _of(self, folder: Folder, name: str) -> Caller:
        identity, public = self._identities[name]
        caller = self._callers.pop(name, None)
        if caller is None or caller.key is None or caller.key.pair.public != public:
            if caller is not None:  # its key was changed
                self._drop(caller)
            caller = Caller(identity, self.address, folder.issued(name), self._context)
            self._make_room()
        caller.identity = identity
        caller.used_at = time.monotonic()
        self._callers[name] = caller  # the order is that of the last use
        return caller

    def _make_room(self) -> None:
        if len(self._callers) < CALLERS:
            return
        idle = next((name for name, caller in self._callers.items() if not caller.open), None)
        if idle is None:
            raise LlamboError(Code.BUSY, f"{CALLERS} names have open requests on this gateway", 1_000)
        self._drop(self._callers.pop(idle))

    def _drop(self, caller: Caller) -> None:
        closing = asyncio.get_running_loop().create_task(caller.close())
        _CLOSING.add(closing)
        closing.add_done_callback(_CLOSING.discard)

    def _reload(self, folder: Folder) -> None:
        """Read the files again if they were changed. If they cannot be read, the old tokens stay valid."""
        path = folder.path / api_tokens.FILE
        tokens_at = path.stat().st_mtime_ns if path.exists() else 0
        stamp = (*folder.stamp(), tokens_at)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            tokens, ring = api_tokens.read(folder), folder.ring()
        except LlamboError as error:
            log.warning("the keys could not be read again, the old ones stay in use: %s", error.text)
            return
        self._tokens = {token.sha256: token for token in tokens}
        now = time.time()
        self._identities = {
            entry.identity.name: (entry.identity, entry.public) for entry in ring.entries if entry.valid(now)
        }

    async def close(self) -> None:
        await asyncio.gather(*[caller.close() for caller in (self._anyone, *self._callers.values())])
        await asyncio.gather(*_CLOSING)
        # It waits until the last messages are sent, for a moment at most.
        await asyncio.get_running_loop().run_in_executor(None, self._context.term)


#: Tasks that close clients; asyncio itself references tasks only weakly.
_CLOSING: set[asyncio.Task[None]] = set()
