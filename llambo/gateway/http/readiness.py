"""Whether somebody would be answered: asked of the mesh once for all who want to know at about the same time.

Anybody may ask, and as often as he likes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from llambo.mesh.client.client import Client
from llambo.mesh.wire.errors import LlamboError

#: An answer is given out again for so long.
FRESH_S = 0.25


class Readiness:
    def __init__(self, connect: Callable[[], Awaitable[Client]]) -> None:
        self._connect = connect
        self._known, self._known_until = "", 0.0
        self._asking: asyncio.Task[str] | None = None

    async def why_not(self) -> str:
        """Empty: somebody would be."""
        if time.monotonic() < self._known_until:
            return self._known
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> str:
        try:
            status = await (await self._connect()).status()
            self._known = "" if status.ready else "no worker is ready"
        except LlamboError as error:
            # Without the text: where the broker is concerns those who run it.
            self._known = f"the mesh does not answer: {error.code.value}"
        finally:
            self._asking = None
        self._known_until = time.monotonic() + FRESH_S
        return self._known
