"""Clients that stand still for longer than their lease, and clients that come back for what went on without them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llambo.broker.config import BrokerConfig
from llambo.testing.mesh import Mesh, truth
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import FakeOptions

TOKENS = 200
#: A client process: reads one stream, says so when it has begun, and then what it was given.
READER = f"""
import asyncio, json, sys
from llambo import Client
async def main():
    async with Client(sys.argv[1]) as client, client.stream("away", max_tokens={TOKENS}, seed=7) as stream:
        ids = []
        while (piece := await stream.next_piece()) is not None:
            assert piece.index == len(ids), "a token is missing, or came twice"
            if not ids:
                print("begun", flush=True)
            ids += piece.ids
        print(json.dumps([ids, stream.answer.reason]), flush=True)
asyncio.run(main())
"""


@contextmanager
def reader(mesh: Mesh) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", READER, mesh.address], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            yield process
        finally:
            process.kill()


def test_a_client_that_is_frozen_beyond_its_lease_gets_the_whole_answer() -> None:
    # Given a client that is stopped in the middle of its answer
    config = BrokerConfig.of(client_lease_ms=600)
    with Mesh(workers=1, fake=FakeOptions(tokens_per_s=100), config=config, check=True) as mesh, reader(mesh) as client:
        client.send_signal(signal.SIGSTOP)
        # When its lease is over, and its request was ended because it had no reader any more
        mesh.until(lambda core: core.state.counters.peers.clients_lost == 1, "its lease to be over")
        mesh.until(lambda core: not core.state.requests, "the end of its request")
        client.send_signal(signal.SIGCONT)
        # Then it gets all of it, and each token once
        output, _ = client.communicate(timeout=TIMEOUT_S)
        assert json.loads(output) == [truth("away", 7, TOKENS), "length"]


async def test_what_runs_for_a_client_that_vanishes_ends_and_what_is_detached_goes_on() -> None:
    config = BrokerConfig.of(client_lease_ms=600)
    with Mesh(workers=1, fake=FakeOptions(tokens_per_s=100), config=config, check=True) as mesh:
        async with mesh.client() as client:
            id = await client.submit("later", max_tokens=TOKENS, seed=3)
        with reader(mesh) as gone:
            gone.kill()
            # Only a request without a reader that is not detached is ended.
            mesh.until(lambda core: core.state.counters.peers.clients_lost == 1, "its lease to be over")
            mesh.until(lambda core: len(core.state.requests) < 2, "the end of its request")
        async with mesh.client() as later, await later.attach(id) as stream:
            assert (await stream.result()).ids == truth("later", 3, TOKENS)
        ended = mesh.look(lambda core: {record.end.reason for record in core.state.archive.ended.values()})
        assert ended == {"cancelled", "length"}
