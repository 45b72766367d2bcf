"""`/v1/models`: what can be asked here."""

from __future__ import annotations

from typing import Any

from llambo.mesh.client.client import Client
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.reports import ModelRow


async def listed(client: Client) -> dict[str, Any]:
    return {"object": "list", "data": [_told(model) for model in await client.models()]}


async def one(client: Client, name: str) -> dict[str, Any]:
    for model in await client.models():
        if model.model == name:
            return _told(model)
    raise LlamboError(Code.UNKNOWN_MODEL, f"no model is called {name!r} here")


def _told(model: ModelRow) -> dict[str, Any]:
    """With what the mesh knows of it beside. When it was made nobody knows."""
    more = {"workers": model.workers, "loading": model.loading, "slots": model.slots, "waiting": model.waiting}
    return {"id": model.model, "object": "model", "created": 0, "owned_by": "llambo", "llambo": more}
