"""Requests per second: submit, dispatch, accept, one chunk, END, and both ends acknowledged, through one broker.

Beside it, in turns, a bare loop: two ROUTERs that forward a request to a worker and its reply to the client,
one message each, nothing read but the route. The mesh bundles messages; the bare loop does not.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from statistics import median
from typing import TypeVar

import zmq

from bench.bare import BarePeers, drain
from bench.peers import BEAT_FRAME_BYTES, BEAT_S, SILENT, FakeClient, FakeWorker, Socket, request_ids
from bench.processes import Meter, Node, Round
from llambo.mesh.wire import messages as m

#: Requests in one control message.
BUNDLE = 64
PROMPT = b"What is the capital of the county of Nowhere?"
#: After the last submit.
LATE_S = 30.0


T = TypeVar("T")


def mesh_round(
    node: Node, client: FakeClient, worker: FakeWorker, seconds: float, flight: int, bundled: bool = True
) -> Round:
    """Keeps `flight` requests going: each END is answered with its acknowledgement and the next request."""
    poller = zmq.Poller()
    for socket in (client.control, client.tokens, worker.control):
        poller.register(socket, zmq.POLLIN)
    send = client.send_all if bundled else client.send_each
    answer = worker.send_all if bundled else worker.send_each
    done = begun = chunks = 0
    meter = Meter(node)
    stop_at = time.perf_counter() + seconds
    beat_at = 0.0
    send(submits(flight))
    begun = flight
    while done < begun or chunks < done:
        readable = dict(poller.poll())
        now = time.perf_counter()
        if now > stop_at + LATE_S:
            raise RuntimeError(f"{begun - done} of {begun} requests have no END")
        if now >= beat_at:
            worker.heartbeat()
            client.send_all([(m.ClientHeartbeat(), None)])
            beat_at = now + BEAT_S
        if worker.control in readable:
            for given in parts([message for message, _ in worker.receive() if type(message) is m.Dispatch]):
                answer([reply for dispatch in given for reply in worker.answer(dispatch)])
        if client.tokens in readable:
            chunks += sum(len(frame) > BEAT_FRAME_BYTES for frame in client.receive_tokens())
        if client.control in readable:
            ended = [message.id for message, _ in client.receive() if type(message) is m.End and message.count == 1]
            for part in parts(ended):
                done += len(part)
                fresh = submits(len(part)) if now < stop_at else []
                begun += len(fresh)
                send([(m.EndAck(part), None), *fresh])
    return meter.round_of(done)


def parts(items: list[T]) -> Iterator[list[T]]:
    """As a real link does: the first part is sent before the last is ready, so both ends have work."""
    for at in range(0, len(items), BUNDLE):
        yield items[at : at + BUNDLE]


def submits(count: int) -> list[tuple[m.Message, bytes | None]]:
    return [(m.InferenceRequest(id, "fake", 16), PROMPT) for id in request_ids(os.urandom(16 * count))]


def bare_round(node: Node, peers: BarePeers, seconds: float, flight: int) -> Round:
    """The same number of requests under way through the bare loop; a request is a message of about the same size."""
    client, worker = peers.client, peers.worker
    poller = zmq.Poller()
    poller.register(client, zmq.POLLIN)
    poller.register(worker, zmq.POLLIN)
    body = bytes(64) + PROMPT
    meter = Meter(node)
    stop_at = time.perf_counter() + seconds
    done, begun = 0, flight
    for _ in range(flight):
        client.send(body)
    while done < begun:
        readable = dict(poller.poll())
        if worker in readable:
            for frame in drain(worker):
                worker.send(frame)
        if client in readable:
            ended = len(drain(client))
            done += ended
            if time.perf_counter() < stop_at:
                begun += ended
                for _ in range(ended):
                    client.send(body)
    return meter.round_of(done)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench requests", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one round")
    parser.add_argument("--flight", type=int, default=512, help="requests under way")
    options = parser.parse_args(arguments)
    context: zmq.Context[Socket] = zmq.Context()
    rows: dict[str, list[Round]] = {"mesh": [], "mesh, unbundled": [], "bare ROUTER loop": []}
    with Node("broker", SILENT) as broker, Node("bare") as bare:
        port = broker.port
        worker, client = FakeWorker(context, port, options.flight), FakeClient(context, port)
        peers = BarePeers(context, bare)

        def one_of_each(seconds: float) -> tuple[Round, Round, Round]:
            return (
                mesh_round(broker, client, worker, seconds, options.flight),
                mesh_round(broker, client, worker, seconds, options.flight, bundled=False),
                bare_round(bare, peers, seconds, options.flight),
            )

        one_of_each(0.3)
        for _ in range(options.rounds):
            for row, result in zip(rows.values(), one_of_each(options.seconds), strict=True):
                row.append(result)
        for peer in (client, worker, peers):
            peer.close()
    context.destroy(linger=0)
    report(rows, options.flight)
    return 0


def report(rows: dict[str, list[Round]], flight: int) -> None:
    bare = rows["bare ROUTER loop"]
    print(f"requests, {flight} under way, {len(bare)} rounds of each in turns; medians; us of processor per request")
    print("                      per s   loop   zmq   generator   of the bare rate   of the bare loop's cost")
    for name, rounds in rows.items():
        rate, main, other, mine = (
            median(values)
            for values in zip(*((r.rate, r.main_us, r.zmq_us, r.generator_us) for r in rounds), strict=True)
        )
        ratio = median(a.rate / b.rate for a, b in zip(rounds, bare, strict=True))
        cost = median(a.main_us / b.main_us for a, b in zip(rounds, bare, strict=True))
        print(f"  {name:<17} {rate:>9,.0f} {main:>6.1f} {other:>5.1f} {mine:>11.1f} {ratio:>18.2f} {cost:>25.2f}")
    print("  aim: 0.35 of the bare rate")
