"""Waiting for a model that is held: until it is ready, or until it is known why not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.reports import HoldReply, ModelHost, ModelRow, waiting

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client

#: How often the broker is asked how far it is.
ASK_S = 0.25
#: A broker forgets an order that no host has carried out: it is given again.
AGAIN_S = 30.0
#: A failure that was there before is not that of this load, unless it stays for so long.
STALE_S = 5.0
HINT = "`llambo models` shows each model at each host, and what is in their memory"
LOADED = ("loading", "ready", "unloading")


async def load_model(
    client: Client,
    model: str,
    *,
    host: str = "",
    holder: str = "",
    ttl_ms: int = 0,
    pin: bool = False,
    show: Callable[[str], None] = lambda text: None,
) -> HoldReply:
    """As `Client.hold_model`, and wait until it is ready. If it cannot be loaded, that is undone and the reason raised.

    `show` is called with what it waits for, again and again.
    """

    async def hold() -> HoldReply:
        return await client.hold_model(model, host=host, holder=holder, ttl_ms=ttl_ms, pin=pin)

    held = await hold()
    began = again_at = time.monotonic()
    again_s = min(AGAIN_S, (held.ttl_ms or AGAIN_S * 2_000) / 2_000)
    worked = False
    while True:
        row = await row_of(client, model)
        there = _where(row, held)
        if there is not None:
            held = msgspec.structs.replace(held, host=there.host, state=there.state, percent=there.percent)
        note = there.note if there is not None and there.state == "failed" else row.note
        held = msgspec.structs.replace(held, note=note or held.note)
        worked = worked or held.state in LOADED
        if held.state == "ready":
            return held
        fresh = worked or there is None or there.retry_ms > 0 or time.monotonic() - began > STALE_S
        if held.state == "failed" and fresh:
            with suppress(LlamboError):  # why it could not be loaded is what counts
                await client.release_model(model, host=held.host, holder=held.holder)
            raise _failure(row, held)
        show(_progress(row, held))
        await asyncio.sleep(ASK_S)
        if time.monotonic() - again_at > again_s:
            again_at = time.monotonic()
            held = await hold()


async def row_of(client: Client, model: str) -> ModelRow:
    found = next((row for row in await client.models() if row.model == model), None)
    if found is None:
        raise LlamboError(Code.UNKNOWN_MODEL, f"no host has {model!r}", hint="`llambo models` lists what there is")
    return found


def _where(row: ModelRow, held: HoldReply) -> ModelHost | None:
    """Where it is held, or is to be."""
    holding = [there for there in row.hosts if held.holder in there.holders]
    return next((there for there in [*holding, *row.hosts] if held.host in ("", there.host) or there in holding), None)


def _progress(row: ModelRow, held: HoldReply) -> str:
    if held.state == "loading":
        return f"loading {held.model} on {held.host}, {held.percent} %"
    return waiting(row.note or f"until {held.model} is loaded")


def _failure(row: ModelRow, held: HoldReply) -> LlamboError:
    hosts = [there for there in row.hosts if there.state == "failed" and held.host in ("", there.host)]
    reasons = "; ".join(f"on {there.host}: {there.note}" for there in hosts if there.note) or held.note
    retry_ms = min((there.retry_ms for there in hosts if there.retry_ms), default=0)
    return LlamboError(Code.ENGINE_FAILED, f"{held.model!r} could not be loaded {reasons}", retry_ms, hint=HINT)
