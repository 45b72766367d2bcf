"""Real workers and a request that kills every engine that runs it."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from llambo import Client
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.testing.mesh import Mesh, truth
from llambo.testing.processes import TIMEOUT_S, wait_until_gone
from llambo.worker.config import FakeFaults, FakeOptions, WorkerConfig

TOKENS = 60
FAKE = FakeOptions(slots=8, tokens_per_s=100, faults=FakeFaults(poison="arsenic"))


async def answer(client: Client, prompt: str, seed: int, begun: asyncio.Event | None = None) -> None:
    """Every token once, and the right one."""
    ids: list[int] = []
    async with client.stream(prompt, max_tokens=TOKENS, seed=seed) as stream:
        while (piece := await stream.next_piece()) is not None:
            assert piece.index == len(ids), "a token is missing, or came twice"
            ids += piece.ids
            if begun is not None:
                begun.set()
    assert ids == truth(prompt, seed, TOKENS)


async def test_poison_among_seven_innocents() -> None:
    """On the only worker there is, so that its engine has to come back twice."""
    with Mesh(workers=1, fake=FAKE, check=True) as mesh:
        async with mesh.client() as client:
            begun = [asyncio.Event() for _ in range(7)]
            async with asyncio.TaskGroup() as group:
                for number in range(7):
                    group.create_task(answer(client, f"tea {number}", number, begun[number]))
                for event in begun:
                    await event.wait()
                with pytest.raises(LlamboError) as failed:
                    await client.generate("tea with arsenic", max_tokens=TOKENS, seed=7)
            assert failed.value.code is Code.ENGINE_FAILED
            assert "kills engines" in failed.value.text
            assert "SIGSEGV" in failed.value.text
            assert (await client.status()).counters["convicted"] == 1
            # Every engine is back, and works.
            await asyncio.gather(*(answer(client, f"more {n}", n) for n in range(8)))
            back = await client.workers()
        assert sum(worker.engine_restarts for worker in back) == 2
        assert {worker.state for worker in back} == {"ready"}


async def test_engines_that_are_killed_from_outside_are_charged_to_no_request() -> None:
    with Mesh(workers=2, fake=FAKE, check=True) as mesh:
        async with mesh.client() as client:
            begun = [asyncio.Event() for _ in range(4)]
            async with asyncio.TaskGroup() as group:
                for number in range(4):
                    group.create_task(answer(client, f"tea {number}", number, begun[number]))
                for event in begun:
                    await event.wait()
                for worker in mesh.workers:
                    (engine,) = worker.children()
                    os.kill(engine, signal.SIGKILL)
                    await asyncio.to_thread(wait_until_gone, engine, TIMEOUT_S)
            counters = (await client.status()).counters
            assert counters["engine_deaths"] == 2
            assert counters["suspected"] == 0


async def test_a_hung_decode_is_an_engine_death() -> None:
    """The answer goes on at another worker, as a suspect until it is past that token."""
    fake = FakeOptions(slots=2, tokens_per_s=100, faults=FakeFaults(hang_at=20))
    with Mesh(workers=1, fake=fake, worker=WorkerConfig(stall_ms=500), check=True) as mesh:
        async with mesh.client() as client:
            task = asyncio.create_task(answer(client, "tea", 1))
            mesh.worker_config = WorkerConfig(fake=FAKE)
            await asyncio.to_thread(mesh.spawn("healthy").first_line)
            await task
            counters = (await client.status()).counters
            # Once for each engine that hung: the first worker may have been back sooner than the other was there.
            assert counters["suspected"] == counters["engine_deaths"] > 0
            assert counters["convicted"] == 0
