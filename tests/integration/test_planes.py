"""Each plane of a link spoilt alone, in the middle of a stream: it goes on, and each token arrives once."""

from __future__ import annotations

from typing import get_args

import pytest

from llambo import Client
from llambo.mesh.client.client import Stream
from llambo.testing.mesh import Mesh, truth
from llambo.testing.proxy import Plane, ThreadedProxy
from llambo.worker.config import FakeOptions

TOKENS = 300
TOKENS_PER_S = 200
#: What has arrived when the fault begins, and what has to arrive while it lasts.
BEFORE, DURING = 20, 100


class Reader:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.ids: list[int] = []

    async def until(self, count: int) -> None:
        """Read on until so many tokens are here, or the end."""
        while len(self.ids) < count and (piece := await self.stream.next_piece()) is not None:
            assert piece.index == len(self.ids), "a token is missing, or came twice"
            self.ids += piece.ids


@pytest.mark.parametrize("fault", ["cut", "hold", "refuse"])
@pytest.mark.parametrize("plane", get_args(Plane))
async def test_a_stream_goes_on(plane: Plane, fault: str) -> None:
    # Given a worker and a client that reach the broker through a proxy
    with (
        Mesh(workers=0, fake=FakeOptions(tokens_per_s=TOKENS_PER_S), check=True) as mesh,
        ThreadedProxy(mesh.port) as proxy,
    ):
        mesh.spawn("w0", proxy.address).first_line()
        client = Client(proxy.address)
        # When one plane fails in the middle of a stream, and later works again
        async with client, client.stream("hello", max_tokens=TOKENS, seed=7) as stream:
            reader = Reader(stream)
            await reader.until(BEFORE)
            proxy.inject_fault(plane, fault)
            if plane != "worker control":
                await reader.until(BEFORE + DURING)
            elif fault != "cut":
                await mesh.aside(lambda core: core.state.counters.peers.workers_lost, "the worker given up")
            proxy.heal(plane)
            await reader.until(TOKENS + 1)
            ids = reader.ids
        # Then nothing is missing, and nothing came twice
        assert ids == truth("hello", 7, TOKENS)
        assert proxy.connections(plane) > (fault == "cut")
        if fault == "cut":
            assert mesh.counter("workers_lost") == mesh.counter("moved") == 0, "a blip is no reason to give up a worker"
        elif plane == "client tokens":
            assert client.counters.replays > 0
        elif plane == "worker tokens":
            assert mesh.counter("replays_asked") > 0
