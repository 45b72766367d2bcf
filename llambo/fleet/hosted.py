"""Nodes that run several models: what the mesh reports about each, as one row, like that of a worker.

A node of a class with `models` is a host (`llambo-worker --models`). It has a session of its own, and a worker for each
loaded model, which come and go. What decides about nodes looks at the rows of workers by the names of nodes. So a host
gets one: it is ready when it has joined, and its slots and requests are those of its workers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from llambo.fleet.model import HostedRow
from llambo.mesh.client.model_loading import LOADED
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.naming import class_of
from llambo.mesh.wire.reports import HostRow, ModelHost, ModelRow, WorkerRow

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client

#: States of workers that get no new requests.
DRAINED = ("draining", "drained")
#: Who holds the model that shows that a host works, and how long at most if it is not given back.
HOLDER, HOLD_MS = "fleet", 120_000
#: Between two looks at it, and how long the model may take to load. After that it counts as good.
LOOK_S, LOAD_S = 0.2, 40.0


def rows_of(
    hosts: Iterable[HostRow], models: Iterable[ModelRow], workers: Mapping[str, WorkerRow]
) -> dict[str, HostedRow]:
    """By the name of the host. `models`, `workers`: as the broker lists them."""
    at: dict[str, dict[str, ModelHost]] = {}
    for row in models:
        for there in row.hosts:
            at.setdefault(there.host, {})[row.model] = there
    return {host.host: _row(host, at.get(host.host, {}), workers) for host in hosts}


def _row(host: HostRow, models: Mapping[str, ModelHost], workers: Mapping[str, WorkerRow]) -> HostedRow:
    own = [workers[name] for name in sorted({there.worker for there in models.values()}) if name in workers]
    return HostedRow(
        worker=host.host,
        state="drained" if any(row.state in DRAINED for row in own) else "ready",
        node_class=host.node_class,
        host=host.machine,
        pid=host.pid,
        models=sorted(models),
        slots=sum(row.slots for row in own),
        busy=sum(row.busy for row in own),
        busy_elsewhere=sum(row.busy_elsewhere for row in own),
        note=f"{len(host.loaded)} of {host.models} models loaded",
        workers=[row.worker for row in own],
        busiest=max((row.busy_slots / max(row.slots, 1) for row in own), default=0.0),
    )


async def ask(client: Client, workers: Mapping[str, WorkerRow]) -> dict[str, HostedRow]:
    try:
        hosts = await client.hosts()
    except LlamboError as error:
        if error.code is not Code.BAD_REQUEST:
            raise
        return {}  # a broker of an older release, which has no hosts
    return rows_of(hosts, await client.models() if hosts else (), workers)


async def prove(client: Client, name: str) -> str:
    """Load the smallest model there, unless one is loaded: its engine tests itself. Returns the problem; empty: it
    works. A large model may take longer than the test."""
    tried, began = "", time.monotonic()
    try:
        while True:
            found = [(row.model, there) for row in await client.models() for there in row.hosts if there.host == name]
            if not found:
                hosts = await client.hosts()
                return "" if any(host.host == name for host in hosts) else "it has left the mesh"
            if any(there.state == "ready" for _, there in found):
                return ""
            failed = {model: there.note for model, there in found if there.state == "failed"}
            if tried in failed:
                return f"{tried}: {failed[tried]}"
            able = [(there.bytes, model) for model, there in found if there.state in ("stored", *LOADED)]
            if not able:
                return "; ".join(f"{model}: {note}" for model, note in sorted(failed.items()) if not class_of(model))
            if not tried:
                # By its plain name: the other one is that of the same model.
                tried = min(able, key=lambda each: (bool(class_of(each[1])), *each))[1]
                await client.hold_model(tried, host=name, holder=HOLDER, ttl_ms=HOLD_MS)
            if time.monotonic() - began > LOAD_S:
                loads = any(there.state == "loading" for model, there in found if model == tried)
                return "" if loads else f"{tried} is not loaded there, although it is held"
            await asyncio.sleep(LOOK_S)
    finally:
        if tried:
            with suppress(LlamboError):  # the verdict counts; it is given back after HOLD_MS in any case
                await client.release_model(tried, host=name, holder=HOLDER)
