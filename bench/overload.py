"""Five times more than the workers can do, for a minute: does the broker stay small, fast and at its peak rate?

Real broker, real workers with paced fake engines, so that their capacity is known. The clients are lean fakes in
this process. First the peak is measured: as many requests under way as keep every slot busy. Then requests come
at fixed moments, five times as many, whatever happens to them. Those that are refused must be refused at once,
with the time of the next try; the others must all end.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import deque
from dataclasses import dataclass, field
from math import ceil

import zmq

from bench.figures import quantile
from bench.peers import SILENT, FakeClient, Socket
from bench.processes import Node
from llambo.mesh.wire import messages as m

PROMPT = b"How much is too much?"
WORKERS = 2
SLOTS = 20
TOKENS_PER_S = 50.0
TOKENS = 10
#: Requests a second that all slots together can do: the first token of each comes at once.
CAPACITY = WORKERS * SLOTS * TOKENS_PER_S / (TOKENS - 1)
SESSIONS = 8
MIB = 2**20


@dataclass
class Tally:
    """What became of the requests of one phase."""

    asked: int = 0
    done_at: list[float] = field(default_factory=list)
    tokens: int = 0
    failed: int = 0
    without_retry_after: int = 0
    refusals_ms: list[float] = field(default_factory=list)
    retry_after_ms: list[float] = field(default_factory=list)

    @property
    def unfinished(self) -> int:
        return self.asked - len(self.done_at) - self.failed - len(self.refusals_ms)


class Crowd:
    """Some client sessions, and all their requests."""

    def __init__(self, context: zmq.Context[Socket], port: int) -> None:
        self.tally = Tally()
        self._asked_at: dict[bytes, float] = {}
        self._clients = [FakeClient(context, port) for _ in range(SESSIONS)]
        self._turn = 0
        self._poller = zmq.Poller()
        self._by_socket: dict[object, FakeClient] = {}
        for client in self._clients:
            for socket in (client.control, client.tokens):
                self._poller.register(socket, zmq.POLLIN)
                self._by_socket[socket] = client

    def ask(self, due: float) -> None:
        """One request, from the next session. Its time counts from when it was due."""
        self._turn += 1
        id = os.urandom(16)
        self._asked_at[id] = due
        self.tally.asked += 1
        self._clients[self._turn % SESSIONS].send_all([(m.InferenceRequest(id, "fake", TOKENS), PROMPT)])

    def poll(self, wait_s: float) -> None:
        # Rounded up: a loop that never sleeps would take a core from those that are measured.
        for socket, _ in self._poller.poll(max(0, ceil(wait_s * 1000))):
            client = self._by_socket[socket]
            if socket is client.tokens:
                client.receive_tokens()
            else:
                self._receive(client)

    def _receive(self, client: FakeClient) -> None:
        ended: list[bytes] = []
        received = client.receive()
        now = time.perf_counter()
        for message, _ in received:
            if type(message) is m.End:
                ended.append(message.id)
                self._end(message, now)
            elif type(message) is m.Problem:
                self._refused(message, now)
        if ended:
            client.send_all([(m.EndAck(ended), None)])

    def _end(self, end: m.End, now: float) -> None:
        if self._asked_at.pop(end.id, None) is None:
            return  # it was sent twice
        if end.error is None and end.count == TOKENS:
            self.tally.done_at.append(now)
            self.tally.tokens += end.count
        else:
            self.tally.failed += 1

    def _refused(self, problem: m.Problem, now: float) -> None:
        asked_at = self._asked_at.pop(problem.id)
        self.tally.refusals_ms.append((now - asked_at) * 1000)
        self.tally.retry_after_ms.append(problem.error.retry_after_ms)
        self.tally.without_retry_after += not problem.error.retry_after_ms

    def drain(self, timeout_s: float) -> None:
        until = time.perf_counter() + timeout_s
        while self._asked_at and time.perf_counter() < until:
            self.poll(0.1)

    def close(self) -> None:
        for client in self._clients:
            client.close()


def peak(crowd: Crowd, seconds: float) -> float:
    """Requests done a second while as many are under way as there are slots, and a few more that wait."""
    crowd.tally = tally = Tally()
    until = time.perf_counter() + seconds
    flight = int(WORKERS * SLOTS * 1.2)
    while (now := time.perf_counter()) < until:
        while tally.unfinished < flight:
            crowd.ask(now)
        crowd.poll(0.1)
    crowd.drain(30.0)
    return pace(tally.done_at)


def pace(done_at: list[float]) -> float:
    """Over all but the beginning and the end, which are not at full speed."""
    edge = len(done_at) // 10
    inner = done_at[edge : len(done_at) - edge]
    return (len(inner) - 1) / (inner[-1] - inner[0])


def flood(crowd: Crowd, broker: Node, factor: float, seconds: float) -> tuple[Tally, float, deque[int]]:
    """Returns what became of it, the pace of what was done meanwhile, and the broker's memory every second."""
    crowd.tally = tally = Tally()
    gap = 1 / (CAPACITY * factor)
    begun = due = time.perf_counter()
    memory: deque[int] = deque([broker.rss_bytes()])
    while due < begun + seconds:
        now = time.perf_counter()
        while due <= now:
            crowd.ask(due)
            due += gap
        crowd.poll(due - time.perf_counter())
        if now - begun > len(memory):
            memory.append(broker.rss_bytes())
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
            crowd = Crowd(context, port)
            best = peak(crowd, options.peak_seconds)
            tally, goodput, memory = flood(crowd, broker, options.factor, options.seconds)
            crowd.close()
    context.destroy(linger=0)
    return report(options.factor, options.seconds, best, tally, goodput, memory)


def report(factor: float, seconds: float, best: float, tally: Tally, goodput: float, memory: deque[int]) -> int:
    grown = (max(memory) - memory[0]) / MIB
    half, most = quantile(tally.refusals_ms, 0.5), quantile(tally.refusals_ms, 0.99)
    low, high = min(tally.retry_after_ms, default=0), max(tally.retry_after_ms, default=0)
    print(f"overload: {factor:g} times the capacity of {CAPACITY:.0f} requests a second, for {seconds:.0f} s")
    print(f"  {tally.asked} asked, {len(tally.done_at)} done, {len(tally.refusals_ms)} refused, {tally.failed} failed")
    print(f"  {tally.unfinished} of the admitted never ended (aim 0)")
    print(f"  goodput {goodput:.0f} a second, {goodput / best:.0%} of the peak of {best:.0f} (aim 90 %)")
    print(f"  a refusal takes {half:.2f} ms at p50, {most:.2f} ms at p99 (aim: under 10)")
    print(f"  retry-after {low:.0f} to {high:.0f} ms; {tally.without_retry_after} refusals without it (aim 0)")
    print(f"  the broker grew by {grown:.1f} MiB, from {memory[0] / MIB:.0f} (aim: under 64)")
    broken = tally.unfinished or tally.failed or tally.without_retry_after or grown >= 64 or goodput < 0.9 * best
    return 1 if broken else 0
