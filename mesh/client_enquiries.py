"""What a client can ask about the mesh, and order of it; each is one question and one answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from llambo.mesh import client_events as e
from llambo.mesh import messages as m

T = TypeVar("T")


class Enquiries:
    """The part of a client that asks."""

    async def status(self) -> dict[str, Any]:
        """The mesh in numbers."""
        return await self._map("status")

    async def workers(self, name: str = "") -> list[dict[str, Any]]:
        """Those that are there; with `name`, that one if it is."""
        return await self._list("workers", name)

    async def models(self) -> list[dict[str, Any]]:
        return await self._list("models")

    async def requests(self) -> list[dict[str, Any]]:
        """Those that wait or run."""
        return await self._list("requests")

    async def events(self, since: int = 0) -> list[dict[str, Any]]:
        """What happened in the mesh after event number `since`."""
        return await self._list("events", str(since))

    async def recent(self, since: int = 0) -> dict[str, Any]:
        """How the mesh was in each second after sample number `since`, five minutes at the most, and what has ended."""
        return await self._map("recent", str(since))

    async def metrics(self) -> str:
        """The broker's page for Prometheus; with keys for an admin alone."""
        return str((await self._map("metrics"))["page"])

    async def why(self, id: str) -> dict[str, Any]:
        """The story of one request. A unique prefix of its id will do."""
        return await self._map("why", id)

    async def drain(self, worker: str, undo: bool = False, *, move: bool = False) -> dict[str, Any]:
        """Give a worker no new work (or, with `undo`, work again). `move`: what it runs goes on elsewhere."""
        return await self._question(lambda n: e.Order(m.DrainWorker(n, worker, undo, move)), "drain", dict[str, Any])

    async def lease(self, lease: m.Lease) -> dict[str, Any]:
        """Ask to be the only one who does something: `granted`, `by`, `left_ms`. Its `query` is chosen here."""
        return await self._question(lambda n: e.Order(msgspec.structs.replace(lease, query=n)), "lease", dict[str, Any])

    async def _map(self, what: str, argument: str = "") -> dict[str, Any]:
        return await self._question(lambda number: e.Ask(number, what, argument), what, dict[str, Any])

    async def _list(self, what: str, argument: str = "") -> list[dict[str, Any]]:
        return await self._question(lambda number: e.Ask(number, what, argument), what, list[dict[str, Any]])

    @abstractmethod
    async def _question(self, ask: Callable[[int], e.Event], what: str, kind: type[T]) -> T: ...
