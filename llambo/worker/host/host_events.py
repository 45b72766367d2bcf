"""Events of the host core: what has happened. And its actions: what is to be done.

Those that a worker has as well (`Ticked`, `ControlArrived`, `StopRequested`, `Log`, `Exit`) are in
`worker.agent.events`, the actions of a link in `mesh.link.link_core`.
"""

from __future__ import annotations

import msgspec

from llambo.mesh.link.link_core import LinkAction
from llambo.mesh.wire.messages import FileGrant, FileOrder, HostedFile, Kind
from llambo.worker.agent.events import (
    ConnectionChanged,
    ControlArrived,
    Exit,
    Log,
    NotifyReady,
    StopRequested,
    Ticked,
)


class StoredModel(msgspec.Struct, frozen=True):
    """A model that this host can load, or why it cannot (`refusal`)."""

    name: str
    kind: Kind = "generate"
    #: Bytes of each kind of memory that it takes when it is loaded.
    needs: dict[str, int] = {}
    refusal: str = ""
    #: Names of the adapters that are loaded with it.
    adapters: tuple[str, ...] = ()


class ModelsFound(msgspec.Struct, frozen=True):
    """All models that the host has, at the start and whenever they have changed."""

    models: list[StoredModel]
    #: Names of models at their sources that this host is to serve, and that are not here.
    missing: tuple[str, ...] = ()


class FileChanged(msgspec.Struct, frozen=True):
    """How far the files of a model are that `FetchModel` is about."""

    file: HostedFile


class WorkerChanged(msgspec.Struct, frozen=True):
    """The state of the worker of this model has changed."""

    model: str
    #: Its engine is ready. After that it may start again, because it died.
    ready: bool
    #: Requests that it runs.
    active: int = 0
    #: How much is loaded.
    percent: int = 0
    #: How often it has refused `UnloadWorker` because it was busy.
    refusals: int = 0
    #: Of `RAM`: what its engine takes and may come to take, measured when it was ready; 0: not measured.
    memory_bytes: int = 0


class WorkerEnded(msgspec.Struct, frozen=True):
    """The worker of this model has left the mesh, and its engine process is gone: its memory is free.

    `problem`: why it ended, if it was not asked to. `out_of_memory`: because there was not enough memory.
    """

    model: str
    problem: str = ""
    out_of_memory: bool = False


HostEvent = (
    Ticked
    | ControlArrived
    | ConnectionChanged
    | StopRequested
    | ModelsFound
    | FileChanged
    | WorkerChanged
    | WorkerEnded
)


class StartWorker(msgspec.Struct, frozen=True):
    """Start a worker of this name that loads this model. `WorkerEnded` will follow."""

    model: str
    worker: str


class UnloadWorker(msgspec.Struct, frozen=True):
    """Stop the worker of this model, unless it is busy. `WorkerEnded` will follow, or a refusal in `WorkerChanged`."""

    model: str


class StopWorker(msgspec.Struct, frozen=True):
    """Stop it when its runs have ended; the second time at once. `WorkerEnded` will follow."""

    model: str


class FetchModel(msgspec.Struct, frozen=True):
    """Report about the files of this model, and get them if that is wanted; or go on by this order from now on."""

    order: FileOrder


class StopFetching(msgspec.Struct, frozen=True):
    ref: str


class GrantFiles(msgspec.Struct, frozen=True):
    """What other hosts may fetch here from now on."""

    grants: tuple[FileGrant, ...]


HostAction = (
    LinkAction
    | StartWorker
    | UnloadWorker
    | StopWorker
    | FetchModel
    | StopFetching
    | GrantFiles
    | NotifyReady
    | Log
    | Exit
)
