"""The configuration of a worker process."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from pathlib import PurePath

from llambo.mesh.wire import limits
from llambo.mesh.wire.identity import PeerKey
from llambo.worker.engine.engine_options import FakeOptions, LlamaOptions


def default_name() -> str:
    """Unique, and shows a person where the worker runs."""
    return f"{socket.gethostname()}-{os.getpid()}"


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    #: One address per broker, `tcp://host:port` with the port clients use.
    brokers: tuple[str, ...] = ("tcp://127.0.0.1:7330",)
    name: str = field(default_factory=default_name)
    engine: str = "fake"
    #: A file, or the name of a model that is installed.
    model: str = "fake"
    fake: FakeOptions = field(default_factory=FakeOptions)
    llama: LlamaOptions = field(default_factory=LlamaOptions)
    #: A label for groups of equal machines.
    node_class: str = ""
    #: How long a stopping worker waits for its runs to end.
    drain_ms: int = 30_000
    #: How long runs go on without a broker.
    orphan_ms: int = 30_000
    #: An engine that has sequences and is silent for so long is killed. So is one that loads, for `load_ms`.
    stall_ms: int = 10_000
    load_ms: int = 120_000
    #: The longest pause before an engine that died is started again.
    backoff_ms: int = 10_000
    #: Token frames queued for a slow network before frames are dropped; replay repairs the loss.
    token_hwm: int = 100_000
    #: The key pair of this worker; None: the brokers do not use keys.
    key: PeerKey | None = None

    @property
    def model_name(self) -> str:
        """What the model is called in the mesh."""
        return mesh_name(self.model)

    @property
    def slots(self) -> int:
        """The number of sequences at a time, as configured. An engine that is ready reports its own number."""
        return self.llama.slots if self.engine == "llama" else self.fake.slots


def mesh_name(model: str) -> str:
    """The name of a model in the mesh: for a file its last part without the suffix, otherwise the name itself."""
    return PurePath(model).name.removesuffix(".gguf")[: limits.NAME_CHARS] or "model"
