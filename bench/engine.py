"""The engine child alone, on SmolLM2: tokens a second for 1 to 16 streams, the time to the first one, and between."""

from __future__ import annotations

import argparse
import os
import select
import time
from pathlib import Path

from msgspec import convert

from bench.streams import CHANCE, Timed, prompt, summary
from llambo.mesh.service.host import physical_cores
from llambo.mesh.wire.messages import Sampling
from llambo.worker.agent.agent import EngineProcess
from llambo.worker.config import LlamaOptions
from llambo.worker.engine import protocol as proto

STREAMS = (1, 2, 4, 8, 16)
#: A step that takes longer is a stall.
LIMIT_S = 60.0


class Child:
    """An engine child, and its messages."""

    def __init__(self, engine_options: LlamaOptions) -> None:
        self._process = EngineProcess(proto.Configure("llama", "smollm2", llama=engine_options))
        self._messages: list[proto.ToAgent] = []
        while not isinstance(self.receive(), proto.Ready):
            pass

    def order(self, order: proto.EngineMessage) -> None:
        self._process.order(order)

    def receive(self) -> proto.ToAgent:
        while not self._messages:
            self._process.push()
            ready, _, _ = select.select([self._process], [], [], LIMIT_S)
            messages = self._process.read() if ready else None
            if messages is None:
                raise SystemExit(f"no further message of the engine: {self._process.reap()[0]}")
            self._messages += messages
        return self._messages.pop(0)

    def processor_s(self) -> float:
        """What it has used so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._process.reap()


def round_of(child: Child, streams: int, tokens: int, turn: int) -> list[Timed]:
    """So many streams at once."""
    options = convert({**CHANCE, "ignore_eos": True}, Sampling)
    timed: dict[bytes, Timed] = {}
    for number in range(streams):
        key = number.to_bytes(24, "big")
        child.order(proto.Start(key, prompt(turn, number).encode(), tokens, number + 1, sampling=options))
        timed[key] = Timed(time.perf_counter())
    ended = 0
    while ended < streams:
        message = child.receive()
        now = time.perf_counter()
        for output in message.outputs if isinstance(message, proto.Step) else ():
            timed[output.key].arrivals.append(now)
            timed[output.key].tokens += len(output.ids)
            ended += output.end is not None
    return list(timed.values())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench engine", description=__doc__)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    options = parser.parse_args(arguments)
    child = Child(LlamaOptions(slots=max(options.streams), context=1024, threads=options.threads))
    print(f"engine: SmolLM2-135M Q4_1, {options.threads} threads, {options.tokens} tokens a stream")
    for turn, streams in enumerate(options.streams):
        found = summary(round_of(child, streams, options.tokens, turn))
        first, between = (f"{p50:6.1f}, {p99:6.1f}" for p50, p99 in (found.first_ms, found.gap_ms))
        print(f"  {streams:3} streams  {found.per_s:7.1f} tokens/s  first token {first} ms  between {between} ms")
    child.close()
    return 0
