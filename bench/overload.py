"""Five times more than the workers can do, for a minute: does the broker stay small, fast and at its peak rate?

Real broker, real workers with paced fake engines, so that their capacity is known. The clients are lean fakes in this
process (bench/askers.py). First the peak is measured: as many requests under way as keep every slot busy. Then requests
come at fixed moments, five times as many, whatever happens to them. Those that are refused must be refused at once,
with the time of the next try; the others must all end.
"""

from __future__ import annotations

import argparse
import time
from collections import deque

import zmq

from bench.askers import Askers, Tally
from bench.figures import quantile
from bench.peers import SILENT, Socket
from bench.processes import Node

WORKERS = 2
SLOTS = 20
TOKENS_PER_S = 50.0
TOKENS = 10
#: Requests a second that all slots together can do: the first token of each comes at once.
CAPACITY = WORKERS * SLOTS * TOKENS_PER_S / (TOKENS - 1)
MIB = 2**20


def peak(crowd: Askers, seconds: float) -> float:
    """Requests done a second while as many are under way as there are slots, and a few more that wait."""
    crowd.tally = tally = Tally()
    until = time.monotonic() + seconds
    flight = int(WORKERS * SLOTS * 1.2)
    while (now := time.monotonic()) < until:
        while tally.unfinished < flight:
            crowd.ask(1, TOKENS, now, "fake")
        crowd.poll(0.1)
    crowd.drain(30.0)
    return pace(tally.done_at)


def pace(done_at: list[float]) -> float:
    """Over all but the beginning and the end, which are not at full speed."""
    edge = len(done_at) // 10
    inner = done_at[edge : len(done_at) - edge]
    return (len(inner) - 1) / (inner[-1] - inner[0])


def flood(crowd: Askers, broker: Node, factor: float, seconds: float) -> tuple[Tally, float, deque[int]]:
    """Returns what became of it, the pace of what was done meanwhile, and the broker's memory every second."""
    begun = time.monotonic()
    memory: deque[int] = deque([broker.rss_bytes()])

    def look() -> None:
        if time.monotonic() - begun > len(memory):
            memory.append(broker.rss_bytes())

    tally = crowd.flow(CAPACITY * factor, seconds, TOKENS, "fake", each=look)
    goodput = pace([at for at in tally.done_at if at < begun + seconds])
    crowd.drain(120.0)
    memory.append(broker.rss_bytes())
    return tally, goodput, memory


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--peak-seconds", type=float, default=10.0)
    parser.add_argument("--factor", type=float, default=5.0)
    options = parser.parse_args(arguments)
    context: zmq.Context[Socket] = zmq.Context()
    with Node("broker", SILENT) as broker:
        port = broker.port
        worker = {"broker": f"tcp://127.0.0.1:{port}", "fake": {"slots": SLOTS, "tokens_per_s": TOKENS_PER_S}}
        with Node("worker", {**worker, "name": "w0"}), Node("worker", {**worker, "name": "w1"}):
            crowd = Askers(context, broker)
            best = peak(crowd, options.peak_seconds)
            tally, goodput, memory = flood(crowd, broker, options.factor, options.seconds)
            crowd.close()
    context.destroy(linger=0)
    return report(options.factor, options.seconds, best, tally, goodput, memory)


def report(factor: float, seconds: float, best: float, tally: Tally, goodput: float, memory: deque[int]) -> int:
    grown = (max(memory) - memory[0]) / MIB
    half, most = quantile(tally.refused_ms, 0.5), quantile(tally.refused_ms, 0.99)
    low, high = min(tally.retry_after_ms, default=0), max(tally.retry_after_ms, default=0)
    print(f"overload: {factor:g} times the capacity of {CAPACITY:.0f} requests a second, for {seconds:.0f} s")
    print(f"  {tally.asked} asked, {tally.done} done, {tally.refused} refused, {tally.failed} failed")
    print(f"  {tally.unfinished} of the admitted never ended (aim 0)")
    print(f"  goodput {goodput:.0f} a second, {goodput / best:.0%} of the peak of {best:.0f} (aim 90 %)")
    print(f"  a refusal takes {half:.2f} ms at p50, {most:.2f} ms at p99 (aim: under 10)")
    print(f"  retry-after {low:.0f} to {high:.0f} ms; {tally.without_retry_after} refusals without it (aim 0)")
    print(f"  the broker grew by {grown:.1f} MiB, from {memory[0] / MIB:.0f} (aim: under 64)")
    broken = tally.unfinished or tally.failed or tally.without_retry_after or grown >= 64 or goodput < 0.9 * best
    return 1 if broken else 0
