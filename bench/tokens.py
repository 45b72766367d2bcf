"""Tokens per second, one chunk frame each: from a worker's publisher through a broker, which keeps transcripts, to
a client. Beside it, in turns, a bare loop that puts a topic before each frame and forwards it from SUB to XPUB.

Publisher and subscriber are one loop in this process, the same for both sides.
"""

from __future__ import annotations

import argparse
import os
import time
from itertools import islice
from statistics import median

import zmq

from bench.bare import BarePeers
from bench.peers import BEAT_S, BODY, SILENT, FakeClient, FakeWorker, Socket, request_ids
from bench.processes import Meter, Node, Round
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tokens

PROMPT = b"Tell me everything."
#: Frames under way: enough to keep all parts busy, far from any high-water mark.
WINDOW = 8_000
#: Frames sent before the subscriber is read.
BURST = 1_000
#: Room for the transcripts of a round.
BROKER = {**SILENT, "transcript_bytes": 2**31}


def relay(node: Node, publisher: Socket, subscriber: Socket, frames: list[bytes], beat: FakeWorker | None) -> Round:
    """Publish all frames, as fast as they come back."""
    send, receive, again = publisher.send, subscriber.recv, zmq.Again
    todo = iter(frames)
    sent = got = 0
    meter = Meter(node)
    beat_at = time.perf_counter() + BEAT_S
    while got < len(frames):
        if sent - got <= WINDOW - BURST and sent < len(frames):
            burst = list(islice(todo, BURST))
            for frame in burst:
                send(frame)
            sent += len(burst)
        elif not subscriber.poll(10_000):
            raise RuntimeError(f"{len(frames) - got} of {len(frames)} tokens did not arrive")
        if beat is not None and time.perf_counter() >= beat_at:
            beat.heartbeat()
            beat_at += BEAT_S
        try:
            while True:
                # A client's beat has an empty key; it comes so seldom that it is counted as if it were a token.
                receive(zmq.DONTWAIT)
                got += 1
        except again:
            pass
    return meter.round_of(len(frames))


def chunks(keys: list[bytes], length: int) -> list[bytes]:
    """One token each, all streams in step, as an engine that decodes them in one batch publishes them."""
    heads = [tokens.encode_chunk(bytes(24), i, [1], [b""])[tokens.KEY_END : tokens.HEAD_BYTES] for i in range(length)]
    return [tokens.CHUNK + key + head + BODY for head in heads for key in keys]


def mesh_round(node: Node, client: FakeClient, worker: FakeWorker, streams: int, length: int) -> Round:
    client.send_all(
        [(m.InferenceRequest(id, "fake", length + 1), PROMPT) for id in request_ids(os.urandom(16 * streams))]
    )
    keys: list[bytes] = []
    while len(keys) < streams:
        message = worker.expect(m.Dispatch)
        keys.append(message.id + message.dispatch)
    frames = chunks(keys, length)
    client.receive_tokens()
    result = relay(node, worker.tokens, client.tokens, frames, worker)
    worker.send_all([(m.End(key[:16], length, "stop", key[16:]), None) for key in keys])
    ended: list[bytes] = []
    while len(ended) < streams:
        end = client.expect(m.End)
        assert end.count == length, end
        ended.append(end.id)
    client.send_all([(m.EndAck(ended), None)])
    return result


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench tokens", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--length", type=int, default=1000, help="tokens of each stream in one round")
    options = parser.parse_args(arguments)
    context: zmq.Context[Socket] = zmq.Context()
    meshed: list[Round] = []
    bared: list[Round] = []
    with Node("broker", BROKER) as broker, Node("bare") as bare:
        port = broker.port
        worker, client = FakeWorker(context, port, options.streams), FakeClient(context, port)
        peers = BarePeers(context, bare)
        for number in range(options.rounds + 1):
            length = options.length if number else max(1, options.length // 10)
            a = mesh_round(broker, client, worker, options.streams, length)
            frames = chunks([os.urandom(24) for _ in range(options.streams)], length)
            b = relay(bare, peers.publisher, peers.subscriber, frames, None)
            if number:
                meshed.append(a)
                bared.append(b)
        for peer in (client, worker, peers):
            peer.close()
    context.destroy(linger=0)
    report(meshed, bared, options.streams)
    return 0


def report(meshed: list[Round], bared: list[Round], streams: int) -> None:
    print(f"tokens, {streams} streams, {len(bared)} rounds of each in turns; medians; us of processor per token")
    print("                      per s   loop   zmq   generator")
    for name, rounds in (("mesh", meshed), ("bare SUB-XPUB loop", bared)):
        values = [(r.rate, r.main_us, r.zmq_us, r.generator_us) for r in rounds]
        rate, main_us, zmq_us, mine_us = (median(column) for column in zip(*values, strict=True))
        print(f"  {name:<18} {rate:>8,.0f} {main_us:>6.2f} {zmq_us:>5.2f} {mine_us:>11.2f}")
    ratios = [a.rate / b.rate for a, b in zip(meshed, bared, strict=True)]
    costs = [b.main_us / a.main_us for a, b in zip(meshed, bared, strict=True)]
    print(f"  ratio of rates {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); aim 0.6")
    print(f"  ratio of the loops' own processor time {median(costs):.2f}")
