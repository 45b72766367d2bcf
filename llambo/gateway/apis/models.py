"""The models of the mesh: the lists of OpenAI's API and of llama.cpp's server, whose calls load and unload them.

llama-server calls it its router mode: `GET /models`, `POST /models/load` and `POST /models/unload`. What a caller may
load and unload, the broker decides by the name behind its API token.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from llambo.gateway.answers.api import JsonObject
from llambo.mesh.client.client import Client
from llambo.mesh.wire import limits, naming
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.reports import ModelRow

#: Paths beside those below `/v1`.
MORE_PATHS = ("/models", "/models/load", "/models/unload")
#: A model that was loaded by a call stays for so long, if neither the call nor a request says more.
LOADED_MS = 600_000
#: Our states in the words of llama-server.
_STATUS = {"ready": "loaded", "loading": "loading"}
Name = Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]


class LoadRequest(msgspec.Struct):
    model: Name
    # What llama-server does not have: at which host, for how long, and whether it is never unloaded for another one.
    host: Annotated[str, Meta(max_length=limits.NAME_CHARS)] = ""
    ttl_ms: Annotated[int, Meta(ge=0, le=2**40)] = 0
    pin: bool = False


class UnloadRequest(msgspec.Struct):
    model: Name
    host: Annotated[str, Meta(max_length=limits.NAME_CHARS)] = ""


async def listed(client: Client) -> JsonObject:
    """smollm2@tiny is not another model than smollm2, so it is one of the classes of that."""
    rows = await client.models()
    names = {row.model for row in rows}
    return {"object": "list", "data": [shown(row, rows) for row in rows if not naming.is_in_class(row.model, names)]}


async def one(client: Client, name: str) -> JsonObject:
    rows = await client.models()
    for row in rows:
        if row.model == name:
            return shown(row, rows)
    raise LlamboError(Code.UNKNOWN_MODEL, f"no model has the name {name!r}")


def shown(row: ModelRow, rows: list[ModelRow]) -> JsonObject:
    """The mesh does not know when a model was created."""
    classes = [naming.class_of(each.model) for each in rows if naming.is_in_class(each.model, {row.model})]
    mesh: JsonObject = {"workers": row.workers, "loading": row.loading, "slots": row.slots, "waiting": row.waiting}
    mesh |= ({"classes": classes} if classes else {}) | ({"fake": True} if row.fake else {})
    mesh |= {"kind": row.kind} if row.kind else {}
    mesh["state"] = _STATUS.get(row.state, row.state)
    if row.hosts:
        mesh["hosts"] = [
            {"host": there.host, "state": _STATUS.get(there.state, there.state), "bytes": there.bytes}
            | ({"percent": there.percent} if there.state == "loading" else {})
            | ({"note": there.note} if there.note else {})
            for there in row.hosts
        ]
    status: JsonObject = {"value": _STATUS.get(row.state, "unloaded")}
    status |= {"failed": True} if row.state == "failed" else {}
    return {
        "id": row.model, "object": "model", "created": 0, "owned_by": "llambo", "status": status, "llambo": mesh,
    }  # fmt: skip


async def load(client: Client, body: LoadRequest) -> JsonObject:
    """It is loaded after the answer, as llama-server does: the list shows how far it is."""
    ttl_ms = body.ttl_ms or (0 if body.pin else LOADED_MS)
    held = await client.hold_model(body.model, host=body.host, ttl_ms=ttl_ms, pin=body.pin)
    if held.state == "failed":
        raise LlamboError(Code.ENGINE_FAILED, held.note or f"{body.model!r} could not be loaded")
    return {"success": True, "llambo": {"state": _STATUS.get(held.state, held.state), "host": held.host}}


async def unload(client: Client, body: UnloadRequest) -> JsonObject:
    """What the caller has loaded, it gives back; for an admin the model is unloaded as soon as nothing runs on it."""
    given = await client.release_model(body.model, host=body.host)
    return {"success": True, "llambo": {"state": _STATUS.get(given.state, given.state), "host": given.host}}
