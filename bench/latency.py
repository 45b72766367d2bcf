"""What the mesh adds to one request at low load: from submit to the first token, and to END.

Client and worker are one lean loop in this process (fakes, see peers.py). Beside it, in turns, the same messages
through a bare loop: submit and dispatch, chunk, accept and end, acknowledgement. What is added is the difference.
For information, the same with the real Python client, a real worker and its engine child.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import zmq

from bench.bare import BarePeers, drain
from bench.figures import quantile
from bench.peers import BEAT_FRAME_BYTES, BODY, SILENT, FakeClient, FakeWorker, Socket
from bench.processes import Node
from llambo import Client
from llambo.mesh.wire import messages as m

PROMPT = b"What is the capital of the county of Nowhere?"
#: The open loop: a request every so often, whatever happened to the last.
PACE_S = 1 / 50

#: Milliseconds from submit to first token, and to END.
Times = tuple[float, float]
Turn = Callable[[dict[Any, int]], tuple[bool, bool]]


class MeshPair:
    """One request at a time through a real broker."""

    def __init__(self, worker: FakeWorker, client: FakeClient) -> None:
        self.worker, self.client = worker, client
        self.sockets = (self.worker.control, self.client.tokens, self.client.control)

    def submit(self) -> None:
        self.client.send_all([(m.InferenceRequest(os.urandom(16), "fake", 16), PROMPT)])

    def turn(self, readable: dict[Any, int]) -> tuple[bool, bool]:
        """Whether the token came, and the end."""
        token = end = False
        if self.worker.control in readable:
            for message, _ in self.worker.receive():
                if type(message) is m.Dispatch:
                    self.worker.send_all(self.worker.answer(message))
        if self.client.tokens in readable:
            token = any(len(frame) > BEAT_FRAME_BYTES for frame in self.client.receive_tokens())
        if self.client.control in readable:
            for message, _ in self.client.receive():
                if type(message) is m.End:
                    self.client.send_all([(m.EndAck([message.id]), None)])
                    end = True
        return token, end

    def between(self) -> None:
        self.worker.heartbeat()

    def close(self) -> None:
        self.client.close()
        self.worker.close()


class BarePair:
    """The same messages, but they are forwarded unread."""

    def __init__(self, context: zmq.Context[Socket], node: Node) -> None:
        self.peers = BarePeers(context, node)
        self.sockets = (self.peers.worker, self.peers.subscriber, self.peers.client)
        self._submit = bytes(64) + PROMPT
        self._reply = bytes(100)
        self._ack = bytes(40)

    def submit(self) -> None:
        self.peers.client.send(self._submit)

    def turn(self, readable: dict[Any, int]) -> tuple[bool, bool]:
        token = end = False
        if self.peers.worker in readable:
            for frame in drain(self.peers.worker):
                if frame != self._ack:
                    self.peers.publisher.send(bytes(32) + BODY)
                    self.peers.worker.send(self._reply)
        if self.peers.subscriber in readable:
            token = bool(drain(self.peers.subscriber))
        if self.peers.client in readable:
            for _ in drain(self.peers.client):
                self.peers.client.send(self._ack)
                end = True
        return token, end

    def between(self) -> None:
        pass

    def close(self) -> None:
        self.peers.close()


def measure(pair: MeshPair | BarePair, requests: int, pace_s: float) -> list[Times]:
    """One after another, or (with a pace) at fixed moments, and then counted from the moment it was due."""
    poller = zmq.Poller()
    for socket in pair.sockets:
        poller.register(socket, zmq.POLLIN)
    pair.between()
    times: list[Times] = []
    due = time.perf_counter()
    for _ in range(requests):
        due = due + pace_s if pace_s else time.perf_counter()
        while (left := due - time.perf_counter()) > 0:
            pair.turn(dict(poller.poll(int(left * 1000))))
        times.append(one(pair, poller, due))
    return times


def one(pair: MeshPair | BarePair, poller: zmq.Poller, begun: float) -> Times:
    first_at = end_at = 0.0
    pair.submit()
    while not (first_at and end_at):
        token, end = pair.turn(dict(poller.poll()))
        now = time.perf_counter()
        first_at = first_at or (now if token else 0.0)
        end_at = end_at or (now if end else 0.0)
    return (first_at - begun) * 1000, (end_at - begun) * 1000


async def with_real_peers(port: int, requests: int) -> list[Times]:
    """The asyncio client, a worker process and its engine child, one request at a time."""
    times: list[Times] = []
    async with Client(f"tcp://127.0.0.1:{port}") as client:
        for _ in range(requests):
            begun, first_at = time.perf_counter(), 0.0
            async for _piece in client.stream("hello", max_tokens=1):
                first_at = first_at or time.perf_counter()
            times.append(((first_at - begun) * 1000, (time.perf_counter() - begun) * 1000))
    return times


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench latency", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200, help="of each kind in one round")
    options = parser.parse_args(arguments)
    context: zmq.Context[Socket] = zmq.Context()
    found: dict[tuple[str, str], list[Times]] = {}
    with Node("broker", SILENT) as broker, Node("bare") as bare:
        port = broker.port
        mesh = MeshPair(FakeWorker(context, port, 4), FakeClient(context, port))
        pairs: dict[str, MeshPair | BarePair] = {"mesh": mesh, "bare": BarePair(context, bare)}
        for pair in pairs.values():
            measure(pair, 50, 0.0)
        for _ in range(options.rounds):
            for load, pace_s in (("one at a time", 0.0), ("50 a second", PACE_S)):
                count = options.requests // (5 if pace_s else 1)
                for name, pair in pairs.items():
                    found.setdefault((load, name), []).extend(measure(pair, count, pace_s))
        for pair in pairs.values():
            pair.close()
    context.destroy(linger=0)
    with Node("broker") as broker:
        port = broker.port
        with Node("worker", {"broker": f"tcp://127.0.0.1:{port}", "name": "real"}):
            found["real peers", "mesh"] = asyncio.run(with_real_peers(port, options.requests * 2))
    report(found)
    return 0


def report(found: dict[tuple[str, str], list[Times]]) -> None:
    print("latency, milliseconds from submit")
    print("                            first token          END")
    print("                            p50     p99      p50     p99")
    for load in ("one at a time", "50 a second", "real peers"):
        rows = {name: summary(found[load, name]) for name in ("mesh", "bare") if (load, name) in found}
        if "bare" in rows:
            rows["added"] = [a - b for a, b in zip(rows["mesh"], rows["bare"], strict=True)]
        for name, (first50, first99, end50, end99) in rows.items():
            print(f"  {load:<14} {name:<8} {first50:>6.2f}  {first99:>6.2f}   {end50:>6.2f}  {end99:>6.2f}")
    print("  aim: less than 0.5 added at p50")


def summary(times: list[Times]) -> list[float]:
    return [quantile([time[column] for time in times], share) for column in (0, 1) for share in (0.5, 0.99)]
