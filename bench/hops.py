"""What the mesh adds to the first token: the sum of its hops, from client to engine and back, one request at a time.

Each process notes when a request passes it (see trace.py). The engine's own time is shown, but
not added. A prompt of some 32 tokens, new each time. The engine goes on with the second token while the first one
travels, as it does in real life, so that all cores are busy then.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

from bench import trace
from bench.figures import quantile
from bench.mesh import mesh
from bench.streams import CHANCE, prompt
from llambo import Client
from llambo.mesh.service.host import physical_cores
from llambo.worker.config import LlamaOptions


@dataclass(frozen=True, slots=True)
class Passage:
    """One request: when it was asked and read, and microseconds of each hop between."""

    hops: list[float]

    @property
    def added(self) -> float:
        return sum(self.hops) - self.hops[trace.ENGINE - 1]


async def ask(address: str, warm: int, requests: int, tokens: int) -> list[tuple[int, int]]:
    """When each was asked, and its first piece read."""
    asked: list[tuple[int, int]] = []
    options = {**CHANCE, "ignore_eos": True}
    async with Client(address) as client:
        for turn in range(warm + requests):
            begun, read = time.monotonic_ns(), 0
            async for _ in client.stream(prompt(turn, 0), max_tokens=tokens, form="text", sampling=options, seed=turn):
                read = read or time.monotonic_ns()
            asked.append((begun, read))
    return asked[warm:]


def passages(asked: list[tuple[int, int]], noted: list[tuple[int, int]]) -> list[Passage]:
    """Of each point its first note since the request was asked, or since the engine began with it.

    One process may note the receipt before the other has noted the sending: then a hop is negative by some
    microseconds, and its neighbour as much longer.
    """
    times: dict[int, list[int]] = {}
    for at, point in noted:
        times.setdefault(point, []).append(at)
    found = []
    for (begun, read), (following, _) in zip(asked, [*asked[1:], (2**63, 0)], strict=True):
        path = [begun]
        for point in range(1, len(trace.POINTS) - 1):
            since = begun if point <= trace.BEGAN else path[trace.BEGAN]
            number = bisect_left(times[point], since)
            if number == len(times[point]) or times[point][number] > following:
                raise SystemExit(f"a request was not seen at the point {list(trace.POINTS)[point]!r}")
            path.append(times[point][number])
        path.append(read)
        found.append(Passage([(after - before) / 1_000 for before, after in pairwise(path)]))
    return found


def report(found: list[Passage]) -> None:
    print("  hop                                                     p50       p99, us")
    for number, (name, words) in enumerate(list(trace.POINTS.items())[1:]):
        values = [passage.hops[number] for passage in found]
        print(f"  {name:<15}{words:<38}{quantile(values, 0.5):>9.0f} {quantile(values, 0.99):>9.0f}")
    added = [passage.added for passage in found]
    print(f"  {'added by the mesh: all but the ENGINE':<53}{quantile(added, 0.5):>9.0f} {quantile(added, 0.99):>9.0f}")
    print("  aim: at most 1,000 at p50")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench hops", description=__doc__)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--warm", type=int, default=20, help="requests before those that count")
    parser.add_argument("--tokens", type=int, default=4, help="of each answer")
    parser.add_argument("--threads", type=int, default=physical_cores())
    options = parser.parse_args(arguments)
    engine_options = LlamaOptions(slots=4, context=1024, threads=options.threads)
    with tempfile.TemporaryDirectory() as folder:
        tracing = trace.trace_client(folder)
        os.environ[trace.FOLDER] = folder
        try:
            with mesh(engine_options, traced=True) as ours:
                asked = asyncio.run(ask(ours.address, options.warm, options.requests, options.tokens))
        finally:
            del os.environ[trace.FOLDER]
            tracing.close()
        found = passages(asked, trace.read(folder))
    print(f"hops: {len(found)} requests one after another, {options.threads} threads, {options.tokens} tokens each")
    report(found)
    return 0
