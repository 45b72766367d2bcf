"""llambo: a worker mesh for llama.cpp. Its public interface is `from llambo import Client`: docs/python.md.

What is named here is public; it is loaded when it is first used, so that importing llambo costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llambo.mesh.client.answer_stream import Answer, Piece, Stream
    from llambo.mesh.client.client import Client
    from llambo.mesh.client.client_requests import Counters
    from llambo.mesh.client.request_options import ClientSettings, Messages, Options, TaskCall
    from llambo.mesh.client.sync_client import SyncClient, SyncStream
    from llambo.mesh.client.task_results import Embeddings, RankedDocument, Ranking, Tokenized
    from llambo.mesh.wire.errors import Code, LlamboError
    from llambo.mesh.wire.messages import Lease, Usage
    from llambo.mesh.wire.reports import (
        AccountRow,
        DrainReply,
        EndedRow,
        EventRow,
        HoldReply,
        HostRow,
        LeaseReply,
        MemoryRow,
        MeshStatus,
        ModelHost,
        ModelRow,
        ModelVariant,
        PullHost,
        PullReply,
        Recent,
        RequestRow,
        RequestStory,
        SampleRow,
        StoryStep,
        WorkerRow,
    )
    from llambo.mesh.wire.tokens import Logprob, TopToken
    from llambo.mesh.wire.tool_calls import CalledTool

#: pyproject.toml reads it from here. Asking the metadata of the installed package takes a worker a tenth of its start.
__version__ = "0.1.0"

#: The names of each file.
_NAMES = {
    "llambo.mesh.client.answer_stream": "Answer Piece Stream",
    "llambo.mesh.client.client": "Client",
    "llambo.mesh.client.client_requests": "Counters",
    "llambo.mesh.client.request_options": "ClientSettings Messages Options TaskCall",
    "llambo.mesh.client.sync_client": "SyncClient SyncStream",
    "llambo.mesh.client.task_results": "Embeddings RankedDocument Ranking Tokenized",
    "llambo.mesh.wire.errors": "Code LlamboError",
    "llambo.mesh.wire.messages": "Lease Usage",
    "llambo.mesh.wire.reports":
        "AccountRow DrainReply EndedRow EventRow HoldReply HostRow LeaseReply MemoryRow MeshStatus ModelHost ModelRow "
        "ModelVariant PullHost PullReply Recent RequestRow RequestStory SampleRow StoryStep WorkerRow",
    "llambo.mesh.wire.tokens": "Logprob TopToken",
    "llambo.mesh.wire.tool_calls": "CalledTool",
}  # fmt: skip
_HOME = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = [
    "AccountRow", "Answer", "CalledTool", "Client", "ClientSettings", "Code", "Counters", "DrainReply", "Embeddings",
    "EndedRow", "EventRow", "HoldReply", "HostRow", "Lease", "LeaseReply", "LlamboError", "Logprob", "MemoryRow",
    "MeshStatus", "Messages", "ModelHost", "ModelRow", "ModelVariant", "Options", "Piece", "PullHost", "PullReply",
    "RankedDocument", "Ranking", "Recent", "RequestRow", "RequestStory", "SampleRow", "StoryStep", "Stream",
    "SyncClient", "SyncStream", "TaskCall", "Tokenized", "TopToken", "Usage", "WorkerRow", "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llambo' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value
