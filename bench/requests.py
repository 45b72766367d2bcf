"""Requests per second: submit, dispatch, accept, one chunk, END, and both ends acknowledged, through one broker.

Beside it, in turns, a bare loop: two ROUTERs that forward a request to a worker and its reply to the client,
one message each, nothing read but the route. The mesh bundles what is said at once; the bare loop does not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass

import zmq

from bench.peers import BEAT_S, FakeClient, FakeWorker, Socket, request_ids
from bench.processes import Meter, Node
from llambo.mesh import messages as m
from llambo.mesh import sockets

PROMPT = b"What is the capital of the county of Nowhere?"


@dataclass
class Round:
    """What one round gave; times in microseconds per request."""

    rate: float
    main_us: float
    zmq_us: float
    generator_us: float


def mesh_round(node: Node, client: FakeClient, worker: FakeWorker, seconds: float, flight: int) -> Round:
    """Keeps `flight` requests going: each END is answered with its acknowledgement and the next request."""
    poller = zmq.Poller()
    for socket in (client.control, client.tokens, worker.control):
        poller.register(socket, zmq.POLLIN)
    done = begun = chunks = 0
    meter = Meter(node)
    stop_at = time.perf_counter() + seconds
    beat_at = 0.0
    client.say(submits(flight))
    begun = flight
    while done < begun:
        readable = dict(poller.poll())
        now = time.perf_counter()
        if now >= beat_at:
            worker.heartbeat()
            client.say([(m.ClientHeartbeat(), None)])
            beat_at = now + BEAT_S
        if worker.control in readable:
            said = []
            for message, _ in worker.hear():
                if type(message) is m.Dispatch:
                    said += worker.answer(message)
            worker.say(said) if said else None
        if client.tokens in readable:
            chunks += len(client.hear_tokens())
        if client.control in readable:
            ended = [message.id for message, _ in client.hear() if type(message) is m.End]
            if ended:
                done += len(ended)
                fresh = submits(len(ended)) if now < stop_at else []
                begun += len(fresh)
                client.say([(m.EndAck(ended), None), *fresh])
    assert chunks >= done, f"{chunks} chunks for {done} requests"
    return _round(done, meter)


def submits(count: int) -> list[tuple[m.Message, bytes | None]]:
    return [(m.InferenceRequest(id, "fake", 16), PROMPT) for id in request_ids(os.urandom(16 * count))]


def bare_round(node: Node, client: Socket, worker: Socket, seconds: float, flight: int) -> Round:
    """The same number of requests under way through the bare loop; a request is a message of about the same size."""
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
    return _round(done, meter)


def drain(socket: Socket) -> list[bytes]:
    frames: list[bytes] = []
    try:
        while True:
            frames.append(socket.recv(zmq.DONTWAIT))
    except zmq.Again:
        return frames


def _round(done: int, meter: Meter) -> Round:
    wall, main, other, mine = meter.read()
    return Round(done / wall, main / done * 1e6, other / done * 1e6, mine / done * 1e6)


def bare_peers(context: zmq.Context[Socket], node: Node) -> tuple[Socket, Socket, Socket, Socket]:
    """Client, worker, publisher and subscriber, connected to a bare node and known to it."""
    kinds = (zmq.DEALER, zmq.DEALER, zmq.PUB, zmq.SUB)
    makers = (sockets.control, sockets.control, sockets.token, sockets.token)
    client, worker, publisher, subscriber = (make(context, kind) for make, kind in zip(makers, kinds, strict=True))
    for socket, port in zip((client, worker, publisher, subscriber), node.told["ports"], strict=True):
        socket.connect(f"tcp://127.0.0.1:{port}")
    client.send(b"")
    worker.send(b"")
    subscriber.setsockopt(zmq.SUBSCRIBE, bytes(16))
    return client, worker, publisher, subscriber


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench requests", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one round")
    parser.add_argument("--flight", type=int, default=256, help="requests under way")
    options = parser.parse_args(arguments)
    context: zmq.Context[Socket] = zmq.Context()
    meshed: list[Round] = []
    bared: list[Round] = []
    with Node("broker") as broker, Node("bare") as bare:
        port = broker.told["ports"][0]
        worker = FakeWorker(context, port, options.flight)
        client = FakeClient(context, port)
        peers = bare_peers(context, bare)
        mesh_round(broker, client, worker, 0.3, options.flight)
        bare_round(bare, peers[0], peers[1], 0.3, options.flight)
        for _ in range(options.rounds):
            meshed.append(mesh_round(broker, client, worker, options.seconds, options.flight))
            bared.append(bare_round(bare, peers[0], peers[1], options.seconds, options.flight))
        for socket in (client, worker, *peers):
            socket.close()
    context.destroy(linger=0)
    report(meshed, bared, options.flight)
    return 0


def report(meshed: list[Round], bared: list[Round], flight: int) -> None:
    print(f"requests, {flight} under way, {len(meshed)} rounds of each in turns; medians")
    print("                    per s   broker us   zmq us   generator us")
    for name, rounds in (("mesh", meshed), ("bare ROUTER loop", bared)):
        rate, main, other, mine = (
            statistics.median(x)
            for x in zip(*((r.rate, r.main_us, r.zmq_us, r.generator_us) for r in rounds), strict=True)
        )
        print(f"  {name:<17} {rate:>7,.0f} {main:>10.1f} {other:>8.1f} {mine:>13.1f}")
    ratios = [a.rate / b.rate for a, b in zip(meshed, bared, strict=True)]
    costs = [b.main_us / a.main_us for a, b in zip(meshed, bared, strict=True)]
    print(f"  ratio of rates {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); aim 0.35")
    print(f"  ratio of the loops' own processor time {statistics.median(costs):.2f}")
