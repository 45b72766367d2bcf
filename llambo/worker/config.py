"""What a worker is told when it starts."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from pathlib import PurePath

from llambo.mesh.wire import limits
from llambo.mesh.wire.identity import PeerKey
from llambo.worker.engine.engine_options import FakeKnobs, LlamaKnobs


def default_name() -> str:
    """Unique on the host, and tells a person where to look."""
    return f"{socket.gethostname()}-{os.getpid()}"


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    #: One address per broker, `tcp://host:port` with the port clients use.
    brokers: tuple[str, ...] = ("tcp://127.0.0.1:7330",)
    name: str = field(default_factory=default_name)
    engine: str = "fake"
    #: A file, or the name of a model that is installed.
    model: str = "fake"
    fake: FakeKnobs = field(default_factory=FakeKnobs)
    llama: LlamaKnobs = field(default_factory=LlamaKnobs)
    #: A label for groups of equal machines.
    node_class: str = ""
    #: How long a worker that was told to stop waits for what runs.
    drain_ms: int = 30_000
    #: How long what runs goes on without a broker.
    orphan_ms: int = 30_000
    #: An engine that has sequences and is silent for so long is killed. So is one that loads, for `load_ms`.
    stall_ms: int = 10_000
    load_ms: int = 120_000
    #: The longest pause before an engine that died is started again.
    backoff_ms: int = 10_000
    #: Token frames queued for a slow network before they are dropped, and repaired by replay.
    token_hwm: int = 100_000
    #: What it proves itself with; None: the brokers have no keys.
    key: PeerKey | None = None

    @property
    def model_name(self) -> str:
        """What the model is called in the mesh."""
        return mesh_name(self.model)

    @property
    def slots(self) -> int:
        """How many sequences the engine will run, which it says itself once it is ready."""
        return self.llama.slots if self.engine == "llama" else self.fake.slots


def mesh_name(model: str) -> str:
    """A file goes by its last name, a name by itself."""
    return PurePath(model).name.removesuffix(".gguf")[: limits.NAME_CHARS] or "model"
