"""llambo: a worker mesh for llama.cpp. Its public interface is `from llambo import Client`.

What is named here is public; it is loaded when it is first used, so that importing llambo costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llambo.mesh.client.client import Answer, Client, Piece, Stream
    from llambo.mesh.client.sync_client import SyncClient, SyncStream
    from llambo.mesh.wire.errors import LlamboError

    __version__: str

_HOME = {
    "Answer": "llambo.mesh.client.client",
    "Client": "llambo.mesh.client.client",
    "LlamboError": "llambo.mesh.wire.errors",
    "Piece": "llambo.mesh.client.client",
    "Stream": "llambo.mesh.client.client",
    "SyncClient": "llambo.mesh.client.sync_client",
    "SyncStream": "llambo.mesh.client.sync_client",
}

__all__ = ["Answer", "Client", "LlamboError", "Piece", "Stream", "SyncClient", "SyncStream", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'llambo' has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    metadata = import_module("importlib.metadata")  # late: it takes longer to import than all the rest of this
    try:
        return str(metadata.version("llambo"))
    except metadata.PackageNotFoundError:
        return "0+unknown"  # run from a checkout that was never installed
