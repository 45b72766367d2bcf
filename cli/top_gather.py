"""One look at the mesh for `llambo top`: everything that is shown is asked for here, and nowhere else."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from llambo.cli.top_core import Snapshot
from llambo.mesh.errors import Code, LlamboError

if TYPE_CHECKING:
    from llambo.mesh.client import Client

#: So many events are kept for the screen.
EVENTS = 200


class Gatherer:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._since = 0
        self._sampled = 0
        self._forbidden = ""

    async def look(self) -> Snapshot:
        client = self._client
        status, workers, requests, recent, events = await asyncio.gather(
            client.status(), client.workers(), client.requests(), client.recent(self._sampled), self._new_events()
        )
        samples = recent["samples"]
        self._sampled = max([self._sampled, *(sample["number"] for sample in samples)])
        return Snapshot(status, workers, requests, samples, events, self._forbidden)

    def forget(self) -> None:
        """Another broker counts its events and samples anew."""
        self._since, self._sampled, self._forbidden = 0, 0, ""

    async def _new_events(self) -> list[dict[str, Any]]:
        """Those since the last look. Only an admin may read them, where there are keys."""
        if self._forbidden:
            return []
        try:
            found = await self._client.events(self._since)
        except LlamboError as error:
            if error.code is not Code.FORBIDDEN:
                raise
            self._forbidden = error.text
            return []
        self._since = max([self._since, *(event["number"] for event in found)])
        return found[-EVENTS:]
