"""Workers that are emptied, restarted one after the other, and brokers that are stopped: real processes, real load."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace

from llambo.broker.config import BrokerConfig
from llambo.broker.core import BrokerCore
from llambo.mesh.client.client import Client
from llambo.testing.mesh import Mesh, truth
from llambo.worker.config import FakeOptions
from tests.integration.test_failover import FAKE, stream_through

#: Slow enough that no answer ends by chance before the time to finish is over.
SLOW = replace(FAKE, tokens_per_s=70)


async def test_an_emptied_worker_gives_away_what_it_runs() -> None:
    with Mesh(workers=2, fake=replace(FAKE, slots=8), check=True) as mesh:
        async with mesh.client() as client:
            there: list[str] = []

            async def empty() -> None:
                there.extend(line.id for line in await client.requests() if line.worker == "w0")
                assert (await client.drain("w0", move=True)).moving
                await mesh.aside(lambda core: not core.state.registry.worker_names["w0"].claims, "w0 empty")

            answers = await stream_through(client, 6, empty)
            moved = [answer for answer in answers if answer.moves]
            assert {answer.worker for answer in moved} == {"w1"}
            assert 1 <= len(moved) <= len(there)
            assert (await client.workers("w0"))[0].state == "drained"
            assert not (await client.drain("w0", undo=True)).draining
            await client.generate("more", max_tokens=2)
        assert mesh.look(lambda core: core.state.counters.peers.workers_lost) == 0


async def test_what_is_not_done_when_its_time_is_over_goes_on_elsewhere() -> None:
    with Mesh(workers=2, fake=SLOW, check=True) as mesh:
        # A worker without time to finish anything, stopped in the middle.
        mesh.worker_config = replace(mesh.worker_config, drain_ms=100)
        hurried = mesh.spawn("hurried")
        hurried.first_line()
        await mesh.aside(lambda core: core.state.registry.worker_names["hurried"].dispatchable, "hurried serves")
        async with mesh.client() as client:

            async def stop() -> None:
                hurried.send(signal.SIGTERM)
                assert await asyncio.to_thread(hurried.end) == 0

            answers = await stream_through(client, 6, stop)
            moved = [answer for answer in answers if answer.moves]
            assert moved and {answer.worker for answer in moved} <= {"w0", "w1"}


async def test_without_another_worker_it_finishes_and_what_it_cannot_finish_waits() -> None:
    with Mesh(workers=1, fake=SLOW, check=True) as mesh:
        async with mesh.client() as client:

            async def empty_and_stop() -> None:
                # Emptied: no other worker could take it, so it runs on where it is.
                await client.drain("w0", move=True)
                before = [request.tokens for request in await client.requests()]
                await mesh.aside(lambda core: progress(core) > sum(before), "tokens from the emptied worker")
                # Stopped, with a second signal at once: the request waits for the next worker.
                mesh.workers[0].send(signal.SIGTERM)
                mesh.workers[0].send(signal.SIGTERM)
                assert await asyncio.to_thread(mesh.workers[0].end) == 0
                assert {request.state for request in await client.requests()} == {"waiting"}
                mesh.spawn("w1").first_line()

            answers = await stream_through(client, 3, empty_and_stop)
            assert ("w1", 1) in {(answer.worker, answer.moves) for answer in answers}


async def test_a_rolling_restart_of_a_fleet_under_load_fails_nothing() -> None:
    with Mesh(workers=4, fake=FakeOptions(tokens_per_s=200, burst=2, slots=16), check=True) as mesh:
        over = asyncio.Event()

        async def one(client: Client, number: int) -> int:
            """Asks again and again, as a user would; every answer is compared with the truth."""
            asked = 0
            while not over.is_set() or not asked:
                prompt = f"rolling {number} {asked}"
                answer = await client.generate(prompt, max_tokens=80, seed=number)
                assert answer.ids == truth(prompt, number, 80), f"{prompt}: {answer}"
                asked += 1
            return asked

        mesh.worker_config = replace(mesh.worker_config, drain_ms=200)
        async with mesh.client() as client, asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(client, number)) for number in range(20)]
            try:
                for number in range(4):
                    old = mesh.workers[number]
                    old.send(signal.SIGTERM)
                    assert await asyncio.to_thread(old.end) == 0
                    await asyncio.to_thread(mesh.spawn(f"w{number}").first_line)
            finally:
                over.set()
        assert sum([task.result() for task in tasks]) > 40
        state = mesh.look(lambda core: (core.state.counters.requests.failed, len(core.state.registry.workers)))
        assert state == (0, 4)


async def test_a_broker_that_is_stopped_says_so() -> None:
    # Given leases so long that no end is noticed by them
    config = BrokerConfig.of(lease_ms=600_000, client_lease_ms=600_000)
    with Mesh(workers=1, broker="process", config=config) as mesh:
        async with mesh.client() as client:
            reports: asyncio.Queue[str] = asyncio.Queue()
            client.on_link = reports.put_nowait
            await client.status()
            assert mesh.process is not None
            mesh.process.send(signal.SIGTERM)
            assert await asyncio.to_thread(mesh.process.end) == 0
            assert "the broker left: it was stopped" in (await reports.get())
        # And the worker, which looks for another broker now, leaves without waiting.
        mesh.workers[0].send(signal.SIGTERM)
        assert mesh.workers[0].end() == 0


def progress(core: BrokerCore) -> int:
    return sum(request.transcript.next_index for request in core.state.requests.values())
