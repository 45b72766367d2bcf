"""The two ends of the bare loop that the mesh is compared with. Its middle is `bench.node bare`."""

from __future__ import annotations

import zmq

from bench.peers import JOIN_MS, Socket
from bench.processes import Node
from llambo.mesh.link import sockets
from llambo.mesh.wire import limits

#: As long as a client's topic.
TOPIC = bytes(limits.TOPIC_BYTES)


class BarePeers:
    """A client and a worker: two DEALERs, and PUB to SUB for tokens."""

    def __init__(self, context: zmq.Context[Socket], node: Node) -> None:
        self.client = sockets.control(context, zmq.DEALER)
        self.worker = sockets.control(context, zmq.DEALER)
        self.publisher = sockets.token(context, zmq.PUB)
        self.subscriber = sockets.token(context, zmq.SUB)
        self.subscriber.setsockopt(zmq.SUBSCRIBE, TOPIC)
        self._all = (self.client, self.worker, self.publisher, self.subscriber)
        for socket, port in zip(self._all, node.facts["ports"], strict=True):
            socket.connect(f"tcp://127.0.0.1:{port}")
        # One message from each gives the node its route; one back shows that everything is connected.
        self.client.send(b"")
        self.worker.send(b"")
        if not self.subscriber.poll(JOIN_MS):
            raise RuntimeError(f"the bare loop did not answer within {JOIN_MS} ms")
        self.subscriber.recv()

    def close(self) -> None:
        for socket in self._all:
            socket.close(linger=0)


def drain(socket: Socket) -> list[bytes]:
    """All single frames that are here."""
    frames: list[bytes] = []
    receive, keep = socket.recv, frames.append
    try:
        while True:
            keep(receive(zmq.DONTWAIT))
    except zmq.Again:
        return frames
