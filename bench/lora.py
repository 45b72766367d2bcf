"""Adapters (LoRA) for tests and measurements: real files with random matrices, which change what a model writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bench.tiny_model import ALIGNMENT, F32, STRING, Entry, File, Tensor
from llambo.worker.models import gguf

#: Enough to change the words of SmolLM2 from the first on, and not to make it a noise.
STRENGTH = 0.6


def file_for(base: str | Path, seed: int, *, rank: int = 4, strength: float = STRENGTH) -> File:
    """An adapter of the queries of all layers of this model."""
    model, chance = gguf.read(str(base)), np.random.default_rng(seed)
    entries = [
        Entry(b"general.architecture", STRING, model.architecture.encode()),
        Entry(b"general.type", STRING, b"adapter"),
        Entry(b"adapter.type", STRING, b"lora"),
        Entry(b"adapter.lora.alpha", F32, float(rank)),
    ]
    tensors, data = [], bytearray()
    for name, (shape, _) in model.shapes.items():
        if not name.endswith("attn_q.weight"):
            continue
        width, height = shape
        for suffix, size, spread in (("a", (rank, width), strength / width**0.5), ("b", (height, rank), strength)):
            matrix = chance.normal(0, spread, size).astype("<f4")
            tensors.append(Tensor(f"{name}.lora_{suffix}".encode(), list(reversed(size)), 0, len(data)))
            data += matrix.tobytes()
            data += bytes(-len(data) % ALIGNMENT)
    return File(entries, tensors, data)


def write(path: Path, base: str | Path, seed: int, more: Mapping[str, str] | None = None) -> Path:
    """`more`: further entries of the metadata."""
    file = file_for(base, seed)
    file.entries += [Entry(key.encode(), STRING, value.encode()) for key, value in (more or {}).items()]
    path.write_bytes(file.encode())
    return path
