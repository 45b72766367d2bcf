"""A whole mesh with one real worker: broker, agent and engine child as processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from bench.processes import Node, children, process_cpu_s
from llambo.worker.knobs import LlamaKnobs

#: Where SmolLM2 comes from, for those who have no model to name.
MODEL = "smollm2"


@dataclass(frozen=True)
class Mesh:
    broker: Node
    worker: Node

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.broker.told['ports'][0]}"

    def cpu_s(self) -> dict[str, float]:
        """Processor time so far, of each process."""
        (engine,) = children(self.worker.pid)
        return {"broker": process_cpu_s(self.broker.pid), "agent": process_cpu_s(self.worker.pid),
                "engine": process_cpu_s(engine)}  # fmt: skip


@contextmanager
def mesh(knobs: LlamaKnobs, model: str = MODEL, **options: Any) -> Iterator[Mesh]:
    """Ready, with a model loaded and proved."""
    with Node("broker") as broker:
        told = {"broker": f"tcp://127.0.0.1:{broker.told['ports'][0]}", "name": "real", "engine": "llama"}
        with Node("worker", {**told, "model": model, "llama": asdict(knobs), **options}) as worker:
            yield Mesh(broker, worker)
