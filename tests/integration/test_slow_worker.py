"""A worker that is really slow: detected, given nothing new, and shown in the status."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from llambo import Client
from llambo.broker.config import BrokerConfig
from llambo.mesh.wire.reports import EventRow
from llambo.testing.mesh import Mesh, truth
from llambo.worker.config import FakeOptions

FAST = FakeOptions(slots=4, tokens_per_s=200)
#: A twentieth of that.
SLOW = replace(FAST, tokens_per_s=10)
TOKENS = 20


async def test_a_slow_worker_is_ejected_and_what_it_runs_is_finished() -> None:
    with Mesh(workers=1, fake=FAST, config=BrokerConfig.of(heartbeat_ms=50, settle_ms=0), check=True) as mesh:
        mesh.worker_config = replace(mesh.worker_config, fake=SLOW)
        mesh.spawn("slow").first_line()
        async with mesh.client() as client:
            asked = [asyncio.create_task(answer(client, number)) for number in range(4)]
            number, events = 4, list[EventRow]()
            while not events:
                # A request always runs on each, so that both have a pace.
                await answer(client, number)
                number += 1
                events = [event for event in await client.events() if event.kind == "worker slow"]
            assert events[0].text.startswith("slow: ")
            (state,) = [worker for worker in await client.workers() if worker.worker == "slow"]
            assert state.state == "slow"
            assert "tokens/s for each stream" in state.slow
            assert (await client.status()).slow == ["slow"]
            # Nothing new for it, though its slots are free.
            busy = state.busy
            later = [asyncio.create_task(answer(client, number)) for number in range(100, 106)]
            workers = {worker.worker: worker for worker in await client.workers()}
            assert workers["slow"].busy <= busy
            assert set(await asyncio.gather(*later)) == {"w0"}
            # What it has begun it ends.
            assert "slow" in await asyncio.gather(*asked)


async def answer(client: Client, number: int) -> str:
    """The worker that made it."""
    done = await client.generate(f"prompt {number}", max_tokens=TOKENS, seed=number)
    assert done.ids == truth(f"prompt {number}", number, TOKENS)
    return done.worker
