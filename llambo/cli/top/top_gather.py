"""One look at the mesh for `llambo top`: everything that is shown is asked for here, and nowhere else."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from llambo.cli.top.top_core import Snapshot
from llambo.mesh.wire.errors import Code, LlamboError

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client

#: So many events are kept for the screen.
EVENTS = 200


class Gatherer:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._events_seen = 0
        self._samples_seen = 0
        self._forbidden = ""
        #: Of which broker it is, if there was another one before.
        self._broker = 0

    async def look(self) -> Snapshot:
        client, broker = self._client, self._broker
        status, workers, requests, recent, events = await asyncio.gather(
            client.query("status"),
            client.query("workers"),
            client.query("requests"),
            client.query("recent", str(self._samples_seen)),
            self._events(),
        )
        samples = recent["samples"]
        if broker != self._broker:
            # One broker was asked for what it has beyond a number, and another has answered: the next look has it all.
            samples, events = [], []
        self._samples_seen = max([self._samples_seen, *(sample["number"] for sample in samples)])
        self._events_seen = max([self._events_seen, *(event["number"] for event in events)])
        return Snapshot(status, workers, requests, samples, events[-EVENTS:], self._forbidden)

    def forget(self) -> None:
        """Another broker counts its events and samples anew."""
        self._broker += 1
        self._events_seen, self._samples_seen, self._forbidden = 0, 0, ""

    async def _events(self) -> list[dict[str, Any]]:
        """Those since the last look. Only an admin may read them, where there are keys."""
        if self._forbidden:
            return []
        try:
            return list(await self._client.query("events", str(self._events_seen)))
        except LlamboError as error:
            if error.code is not Code.FORBIDDEN:
                raise
            self._forbidden = error.text
            return []
