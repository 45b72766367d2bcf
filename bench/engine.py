"""The engine child alone, on SmolLM2: tokens a second for 1 to 16 streams, and the time to the first one.

python -m bench.engine [--threads N] [--tokens N]
"""

from __future__ import annotations

import argparse
import select
import time

from llambo.mesh.messages import Sampling
from llambo.worker import engine_proto as proto
from llambo.worker.engine_process import EngineProcess
from llambo.worker.knobs import LlamaKnobs
from llambo.worker.models import cores

STREAMS = (1, 2, 4, 8, 16)
#: A step that takes longer is a stall.
PATIENCE_S = 60.0


class Child:
    """An engine child, and what it says."""

    def __init__(self, knobs: LlamaKnobs) -> None:
        self._process = EngineProcess(proto.Configure("llama", "smollm2", llama=knobs))
        self._said: list[proto.ToAgent] = []
        while not isinstance(self.hear(), proto.Ready):
            pass

    def order(self, order: proto.EngineMessage) -> None:
        self._process.order(order)

    def hear(self) -> proto.ToAgent:
        while not self._said:
            self._process.push()
            ready, _, _ = select.select([self._process], [], [], PATIENCE_S)
            said = self._process.read() if ready else None
            if said is None:
                raise SystemExit(f"the engine said nothing more: {self._process.reap()}")
            self._said += said
        return self._said.pop(0)

    def close(self) -> None:
        self._process.reap()


def run(child: Child, streams: int, tokens: int, turn: int) -> tuple[float, float]:
    """Tokens a second of all together, and milliseconds to the first token of the first."""
    options = Sampling(form="user", ignore_eos=True)
    began = time.perf_counter()
    for number in range(streams):
        prompt = f"{turn}.{number}: tell me a story about a llama that crosses the mountains in winter.".encode()
        child.order(proto.Start(bytes([turn, number]) * 12, prompt, tokens, number, sampling=options))
    first, made, ended = 0.0, 0, 0
    while ended < streams:
        message = child.hear()
        for output in message.outputs if isinstance(message, proto.Step) else ():
            first = first or time.perf_counter()
            made += len(output.ids)
            ended += output.end is not None
    return made / (time.perf_counter() - began), (first - began) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    child = Child(LlamaKnobs(slots=max(STREAMS), context=1024, threads=options.threads))
    print(f"SmolLM2-135M Q4_1, {options.threads} threads, {options.tokens} tokens a stream, temperature 0.8, top-k 40")
    for turn, streams in enumerate(STREAMS):
        pace, first_ms = run(child, streams, options.tokens, turn)
        print(f"  {streams:3} streams  {pace:7.1f} tokens/s  first token after {first_ms:6.1f} ms")
    child.close()


if __name__ == "__main__":
    main()
