"""What keys cost: the same requests, tokens and round trips through a broker with CURVE on every socket, and through
one without, in turns. Peers are the fakes of `requests`, `tokens` and `latency`; both ends encrypt on the same machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import zmq

from bench import latency, requests, tokens
from bench.figures import quantile
from bench.peers import FakeClient, FakeWorker, Socket
from bench.processes import Node
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire.identity import Identity, PeerKey

#: Connections that come and go, to see what a handshake costs.
HANDSHAKES = 50
STREAMS = 200


class Side:
    """A broker with keys or without, and its two peers."""

    def __init__(self, context: zmq.Context[Socket], node: Node, flight: int, folder: Folder | None) -> None:
        self.node = node
        self._context = context
        self._port = node.port
        self._key = folder.export("client") if folder else None
        worker_key: PeerKey | None = folder.export("bench") if folder else None
        self.worker = FakeWorker(context, self._port, flight, key=worker_key)
        self.client = FakeClient(context, self._port, self._key)

    def requests(self, seconds: float, flight: int) -> float:
        return requests.mesh_round(self.node, self.client, self.worker, seconds, flight).rate

    def tokens(self, length: int) -> float:
        return tokens.mesh_round(self.node, self.client, self.worker, STREAMS, length).rate

    def latency(self, count: int) -> list[latency.Times]:
        return latency.measure(latency.MeshPair(self.worker, self.client), count, 0.0)

    def join_ms(self) -> float:
        """From nothing to a client that is served: two connections, hello and welcome, the first beat."""
        begun = time.perf_counter()
        for _ in range(HANDSHAKES):
            FakeClient(self._context, self._port, self._key).close()
        return (time.perf_counter() - begun) / HANDSHAKES * 1e3

    def close(self) -> None:
        self.client.close()
        self.worker.close()


@contextmanager
def keys() -> Iterator[Folder]:
    with tempfile.TemporaryDirectory() as place:
        folder = Folder(Path(place, "keys"))
        folder.begin("tcp://127.0.0.1:7330")
        folder.add(Identity("client", "client"), int(time.time()))
        folder.add(Identity("bench", "worker"), int(time.time()))
        yield folder


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench keys", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one round of requests")
    parser.add_argument("--flight", type=int, default=512, help="requests under way")
    parser.add_argument("--length", type=int, default=1_000, help="tokens of each stream in one round")
    parser.add_argument("--requests", type=int, default=300, help="one after another, in one round")
    options = parser.parse_args(arguments)
    context: zmq.Context[Socket] = zmq.Context()
    rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("requests", "tokens", "joins")}
    times: tuple[list[latency.Times], list[latency.Times]] = ([], [])
    with (
        keys() as folder,
        Node("broker", tokens.BROKER) as plain,
        Node("broker", {**tokens.BROKER, "keys": str(folder.path)}) as curve,
    ):
        sides = (Side(context, plain, options.flight, None), Side(context, curve, options.flight, folder))
        for side in sides:
            side.requests(0.2, options.flight)
        for _ in range(options.rounds):
            for number, side in enumerate(sides):
                rates["requests"][number].append(side.requests(options.seconds, options.flight))
                rates["tokens"][number].append(side.tokens(options.length))
                rates["joins"][number].append(1e3 / side.join_ms())
                times[number].extend(side.latency(options.requests))
        for side in sides:
            side.close()
    context.destroy(linger=0)
    report(rates, times)
    return 0


def report(
    rates: dict[str, tuple[list[float], list[float]]], times: tuple[list[latency.Times], list[latency.Times]]
) -> None:
    rounds = len(rates["requests"][0])
    print(f"keys, {rounds} rounds of each in turns; medians; pid {os.getpid()} is both client and worker")
    print("                        without       with   ratio")
    for name, (without, with_keys) in rates.items():
        ratio = median(b / a for a, b in zip(without, with_keys, strict=True))
        print(f"  {name + ' a second':<20} {median(without):>10,.0f} {median(with_keys):>10,.0f} {ratio:>7.2f}")
    for column, what in enumerate(("first token", "END")):
        for share in (0.5, 0.99):
            a, b = (quantile([time[column] for time in side], share) for side in times)
            print(f"  {what + f' p{share * 100:.0f}, ms':<20} {a:>10.2f} {b:>10.2f}   {b - a:+.2f}")
