"""What the benchmarks start as processes of their own: `python -m bench.node KIND OPTIONS PARENT`.

The options are JSON. Each process ends with its parent, and prints one line of JSON when it is ready. The bare kind
is what the mesh is compared with: the same sockets, with the same options, and a loop that forwards.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import zmq

from llambo.broker.config import BrokerConfig
from llambo.broker.server import run_broker
from llambo.mesh.link import sockets
from llambo.mesh.security.keyring import Folder
from llambo.mesh.service.host import end_with_parent
from llambo.worker.agent.agent import run_worker
from llambo.worker.config import FakeOptions, LlamaOptions, WorkerConfig

#: As in the broker: messages taken from one socket before the others get a turn.
DRAIN = 512
DRAIN_TOKENS = 4_096

Socket = zmq.Socket[bytes]


def broker(options: dict[str, Any]) -> None:
    keys = options.pop("keys", "")
    folder = Folder(Path(keys)) if keys else None
    run_broker(BrokerConfig.of(**options), "127.0.0.1", 0, lambda port: report(ports=[port]), keys=folder)


def worker(options: dict[str, Any]) -> None:
    fake = msgspec.convert(options.pop("fake", {}), FakeOptions)
    llama = msgspec.convert(options.pop("llama", {}), LlamaOptions)
    config = WorkerConfig(brokers=(options.pop("broker"),), fake=fake, llama=llama, **options)
    run_worker(config, lambda: report(pid=os.getpid()))


def gateway(options: dict[str, Any]) -> None:
    from llambo.gateway.access import Access  # noqa: PLC0415  # no other benchmark waits for it
    from llambo.gateway.config import GatewayConfig  # noqa: PLC0415
    from llambo.gateway.server import run_gateway  # noqa: PLC0415

    access = Access(options.pop("broker"))
    run_gateway(GatewayConfig(**options), access, lambda port: report(ports=[port]))


def crowd(options: dict[str, Any]) -> None:
    from bench.crowd import run  # noqa: PLC0415  # no other kind imports it

    run(options)


def traced_broker(options: dict[str, Any]) -> None:
    from bench.trace import trace_broker  # noqa: PLC0415  # no other kind imports it

    trace_broker()
    broker(options)


def traced_worker(options: dict[str, Any]) -> None:
    from bench.trace import trace_worker  # noqa: PLC0415

    trace_worker()
    worker(options)


def bare(options: dict[str, Any]) -> None:
    """Two ROUTERs and a SUB/XPUB pair, forwarding between one client and one worker."""
    context: zmq.Context[Socket] = zmq.Context()
    clients, workers = sockets.control(context, zmq.ROUTER), sockets.control(context, zmq.ROUTER)
    tokens_in, tokens_out = sockets.token(context, zmq.SUB), sockets.token(context, zmq.XPUB)
    tokens_in.setsockopt(zmq.SUBSCRIBE, b"")
    all_sockets = (clients, workers, tokens_in, tokens_out)
    report(ports=[socket.bind_to_random_port("tcp://127.0.0.1") for socket in all_sockets])
    poller = zmq.Poller()
    for socket in all_sockets:
        poller.register(socket, zmq.POLLIN)
    # Each side sends one message first, so that its route is known.
    client, worker = clients.recv_multipart()[0], workers.recv_multipart()[0]
    topic = tokens_out.recv()[1:]
    tokens_out.send(topic)
    while True:
        readable = dict(poller.poll())
        if tokens_in in readable:
            forward_tokens(tokens_in, tokens_out, topic)
        if workers in readable:
            forward(workers, clients, client)
        if clients in readable:
            forward(clients, workers, worker)


def forward(source: Socket, target: Socket, route: bytes) -> None:
    receive, send = source.recv_multipart, target.send_multipart
    try:
        for _ in range(DRAIN):
            frames = receive(zmq.DONTWAIT)
            frames[0] = route
            send(frames, zmq.DONTWAIT)
    except zmq.Again:
        pass


def forward_tokens(source: Socket, target: Socket, topic: bytes) -> None:
    receive, send = source.recv, target.send
    try:
        for _ in range(DRAIN_TOKENS):
            send(topic + receive(zmq.DONTWAIT), zmq.DONTWAIT)
    except zmq.Again:
        pass


def report(**what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    end_with_parent(int(sys.argv[3]))
    logging.disable(logging.WARNING)  # faults here are intended
    kinds = (broker, worker, crowd, gateway, bare, traced_broker, traced_worker)
    {kind.__name__: kind for kind in kinds}[sys.argv[1]](json.loads(sys.argv[2]))
