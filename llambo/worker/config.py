"""The configuration of a worker process, and the settings of its two engines.

Those of the fake engine make a worker slow, faulty or irregular, for tests.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import Any, Literal

from llambo.mesh.wire import limits
from llambo.mesh.wire.identity import PeerKey
from llambo.mesh.wire.messages import Kind

#: The memory of the host, among the kinds of memory that models are loaded into.
RAM = "ram"

Style = Literal["plain", "wander"]
LoadCrash = Literal["never", "careless", "always"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter of a model, and its name in the mesh (`model+name`)."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class FakeFaults:
    """What goes wrong in a fake engine. Token counts are per engine process, over all sequences; 0 means never."""

    #: After this many tokens the process dies by a segmentation fault.
    crash_at: int = 0
    #: After this many tokens the process stays alive and does nothing.
    hang_at: int = 0
    #: After this many tokens each chunk takes `slow_factor` times as long.
    slow_at: int = 0
    slow_factor: float = 10.0
    #: The process dies while it loads: `always`, or `careless`: unless it was started with safe settings. The latter
    #: is what happens on a machine without the instructions that a fast engine uses.
    load_crash: LoadCrash = "never"
    #: Loading fails unless this file exists; empty: no file is needed. `{model}` in it is the name of the model.
    load_file: str = ""
    #: A prompt that contains this text kills the process, always at the same token; empty: no prompt does.
    poison: str = ""


@dataclass(frozen=True, slots=True)
class FakeOptions:
    """The defaults are a healthy engine without any delay."""

    #: `plain`: every disturbed run can be compared with the truth. `wander`: a wrong continuation is visible.
    style: Style = "plain"
    #: Sequences at a time.
    slots: int = 4
    #: Milliseconds from the start of a sequence to its first token.
    ttft_ms: float = 0
    #: Pace of each sequence; 0 gives a chunk of every sequence in every step.
    tokens_per_s: float = 0
    #: Up to this many milliseconds more before each chunk, decided by a hash.
    jitter_ms: int = 0
    #: Tokens in a chunk: 1 to this many, decided by a hash.
    burst: int = 1
    #: Some characters are split across tokens, as real tokenizers do.
    utf8_split: bool = False
    #: Mean length of an answer that ends by itself; 0: every answer runs to `max_tokens`.
    answer_tokens: int = 0
    #: The longest prompt + answer; 0: no limit.
    context_tokens: int = 0
    #: Numbers in an embedding.
    embedding_size: int = 8
    #: What its model is for.
    kind: Kind = "generate"
    #: How long the model takes to load.
    load_ms: int = 0
    #: The memory that it takes when it is loaded.
    memory_bytes: int = 0
    #: Their files are not read: other words are made up for each path.
    adapters: tuple[Adapter, ...] = ()
    faults: FakeFaults = FakeFaults()


def fake_options(**values: Any) -> FakeOptions:
    """From settings, which have options and faults in one section."""
    names = {field.name for field in fields(FakeFaults)}
    faults = FakeFaults(**{name: value for name, value in values.items() if name in names})
    return FakeOptions(faults=faults, **{name: value for name, value in values.items() if name not in names})


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """How llama.cpp serves a model. 0 means: chosen to suit the machine."""

    slots: int = 4
    #: Fewer slots may be used if memory is short: their number is a default, not the user's.
    fewer_slots: bool = False
    #: Longest prompt + answer, in tokens, of each slot.
    context: int = 0
    threads: int = 0
    #: The most tokens in one step.
    batch: int = 512
    #: Layers computed by GPUs; -1: all; auto: as many as fit.
    gpu_layers: int | Literal["auto"] = "auto"
    #: The most memory of each GPU to use; 0: what is free.
    gpu_bytes: int = 0
    kv_type: Literal["f16", "q8_0", "q4_0", "f32", "bf16"] = "f16"
    flash_attn: Literal["auto", "on", "off"] = "auto"
    #: The library of llama.cpp, or its folder; empty: that of an installed package.
    library: str = ""
    adapters: tuple[Adapter, ...] = ()


def default_name(key: str = "") -> str:
    """Unique, and shows a person where the worker runs.

    With a key it begins with the name of that, as it must, and is the same after a restart: the same key may serve on
    several machines.
    """
    host = socket.gethostname().partition(".")[0]
    return f"{key}-{host}"[: limits.NAME_CHARS] if key else f"{socket.gethostname()}-{os.getpid()}"


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    #: One address per broker, `tcp://host:port` with the port clients use.
    brokers: tuple[str, ...] = ("tcp://127.0.0.1:7330",)
    name: str = field(default_factory=default_name)
    engine: str = "fake"
    #: A file, or the name of a model that is installed.
    model: str = "fake"
    #: Its name in the mesh; empty: `mesh_name`.
    served_as: str = ""
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
        return self.served_as or mesh_name(self.model)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        return self.llama.adapters if self.engine == "llama" else self.fake.adapters

    @property
    def slots(self) -> int:
        """The number of sequences at a time, as configured. An engine that is ready reports its own number."""
        return self.llama.slots if self.engine == "llama" else self.fake.slots


@dataclass(frozen=True, slots=True)
class HostConfig:
    """A host: a process that runs workers on demand, one for each loaded model."""

    brokers: tuple[str, ...] = ("tcp://127.0.0.1:7330",)
    name: str = field(default_factory=default_name)
    node_class: str = ""
    key: PeerKey | None = None
    #: What all loaded models may take together, by kind of memory: `RAM`, and the devices of llama.cpp.
    budget: dict[str, int] = field(default_factory=dict)
    #: A model is unloaded when nothing has used it for so long; 0: never.
    model_ttl_ms: int = 0
    #: A model stays so long at least, once it is ready; or a few times as long as its load took, if that is less.
    min_loaded_ms: int = 30_000
    #: Where other hosts can fetch files of its models, as they reach it; empty: it gives none away.
    share: str = ""
    #: The part of the budget that models for embeddings and reranking can have for themselves.
    helper_percent: int = 20


def mesh_name(model: str) -> str:
    """The name of a model in the mesh: for a file its last part without the suffix, otherwise the name itself."""
    return shown_name(PurePath(model).name.removesuffix(".gguf")) or "model"


def shown_name(text: str) -> str:
    """A file may be called anything; what is no text, or moves a cursor, becomes an underscore."""
    return "".join(char if char.isprintable() else "_" for char in text)[: limits.NAME_CHARS]
