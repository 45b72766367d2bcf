"""What connections hold of models: renewed while a connection lives, and given back when it is gone.

Each connection is a holder of its own, which counts for `HOLD_MS`: what a bridge that was killed held, runs out.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from itertools import count

from llambo.mesh.client.client import Client
from llambo.mesh.client.model_loading import load_model
from llambo.mesh.wire.errors import LlamboError

log = logging.getLogger(__name__)

#: How long a holder counts without being renewed, and how often it is renewed.
HOLD_MS, RENEW_S = 30_000, 10.0
#: How long a bridge that stops waits until what it held is given back. What is not, runs out.
CLOSE_S = 2.0


class Holds:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._name, self._numbers = f"bridge-{secrets.token_hex(4)}", count(1)
        #: Model and holder.
        self._held: set[tuple[str, str]] = set()
        self._renewing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def holder(self) -> str:
        """The name of another connection as a holder."""
        return f"{self._name}-{next(self._numbers)}"

    async def load(self, model: str, holder: str) -> None:
        """Hold it, and wait until it is ready. Raises the reason if it cannot be loaded; then nothing is held."""
        self._held.add((model, holder))
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())
        try:
            await load_model(self._client, model, holder=holder, ttl_ms=HOLD_MS)
        except LlamboError:
            self._held.discard((model, holder))
            raise

    def give_back(self, model: str, holder: str) -> None:
        if (model, holder) in self._held:
            self._held.remove((model, holder))
            self._begin(self._given_back(model, holder))

    async def close(self) -> None:
        for model, holder in list(self._held):
            self.give_back(model, holder)
        if self._renewing is not None:
            self._renewing.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)

    async def _given_back(self, model: str, holder: str) -> None:
        try:
            await self._client.release_model(model, holder=holder)
        except LlamboError as error:
            log.info("%s was not given back, and runs out: %s", model, error.text)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            for model, holder in list(self._held):
                try:
                    await self._client.hold_model(model, holder=holder, ttl_ms=HOLD_MS)
                except LlamboError as error:
                    log.info("%s could not be held again: %s", model, error.text)

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
