"""Two real brokers that know nothing of each other, workers with a link to both, and clients that take either."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llambo import Client
from llambo.testing.mesh import Mesh, truth
from llambo.worker.config import FakeOptions
from tests.integration.test_broker_restart import FAKE, STREAMS, TOKENS, one

Brokers = tuple[Mesh, Mesh]


@contextmanager
def two_brokers(workers: int, fake: FakeOptions) -> Iterator[Brokers]:
    with Mesh(workers=0, fake=fake, broker="process") as one, Mesh(workers=0, broker="process") as other:
        started = [one.spawn(f"w{number}", one.address, other.address) for number in range(workers)]
        for worker in started:
            worker.first_line()
        yield one, other


async def both_know(brokers: Brokers, workers: int) -> None:
    """A worker is ready when one broker can use it; here each of them shall."""
    for mesh in brokers:
        async with mesh.client() as client:
            while (await client.status()).ready < workers:
                pass


async def settled_on(brokers: Brokers, broker: int) -> Client:
    """A client that has the addresses of both brokers, and is connected to this one."""
    addresses = [mesh.address for mesh in brokers]
    while True:
        client = Client(",".join(addresses), name="wanderer")
        await client.connect()
        # Its session there is what tells: both are called alike.
        async with Client(addresses[broker]) as watcher:
            if (await watcher.status()).clients == 2:
                return client
        await client.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
async def test_streams_go_on_at_the_other_broker(how: signal.Signals) -> None:
    """Killed, stopped by SIGTERM, or frozen: the broker is away, and no request waits until it is back."""
    with two_brokers(2, FAKE) as brokers:
        await both_know(brokers, 2)
        client = await settled_on(brokers, 0)
        try:
            async with asyncio.TaskGroup() as group:
                begun = [asyncio.Event() for _ in range(STREAMS)]
                asked = [group.create_task(one(client, number, event)) for number, event in enumerate(begun)]
                for event in begun:
                    await event.wait()
                assert brokers[0].process is not None
                brokers[0].process.send(how)
                stalls = [await task for task in asked]
            async with brokers[1].client() as there:
                counters = (await there.status()).counters
        finally:
            await client.close()
        print(f"longest silence {max(stalls) * 1000:.0f} ms, {counters['adopted']} of {STREAMS} adopted")
        assert counters["submitted"] == STREAMS
        if how is not signal.SIGSTOP:  # workers know at once that it is gone; of a frozen one they learn by its silence
            assert counters["adopted"] == STREAMS
            assert counters["dispatched"] == 0


async def test_a_slot_is_leased_once_by_whichever_broker() -> None:
    """More than all workers can take, from both brokers at once: what is refused is done elsewhere, or later."""
    fake = FakeOptions(slots=2, tokens_per_s=400)
    asked, tokens = 12, 20
    with two_brokers(3, fake) as brokers:

        async def answers(mesh: Mesh, half: int) -> list[list[int]]:
            async with mesh.client() as client:
                numbers = [2 * number + half for number in range(asked)]
                found = [client.generate(f"q {n}", max_tokens=tokens, seed=n, stream=True) for n in numbers]
                return [answer.ids for answer in await asyncio.gather(*found)]

        async def watch(over: asyncio.Event) -> list[tuple[int, int]]:
            """What each broker believes of the other's share, and its own, of all slots."""
            seen = []
            async with brokers[0].client() as client:
                while not over.is_set():
                    status = await client.status()
                    seen.append((status.busy, status.busy_elsewhere))
            return seen

        await both_know(brokers, 3)
        over = asyncio.Event()
        watching = asyncio.create_task(watch(over))
        found = await asyncio.gather(*(answers(mesh, half) for half, mesh in enumerate(brokers)))
        over.set()
        seen = await watching
        counters = []
        for mesh in brokers:
            async with mesh.client() as client:
                counters.append((await client.status()).counters)
        for half, ids in enumerate(found):
            assert ids == [truth(f"q {n}", n, tokens) for n in (2 * number + half for number in range(asked))]
        assert [(c["failed"], c["moved"], c["ended"]) for c in counters] == [(0, 0, asked), (0, 0, asked)]
        assert any(elsewhere for _, elsewhere in seen), "a broker never saw what the other has given out"
        # A refusal is a dispatch more, and nothing else.
        print("dispatched", [c["dispatched"] for c in counters], "most busy", max(seen))


async def test_a_drain_through_one_is_known_to_the_other_and_undone_by_either() -> None:
    with two_brokers(1, FAKE) as brokers:
        await both_know(brokers, 1)
        async with brokers[0].client() as here, brokers[1].client() as there:
            await here.drain("w0")
            while (await there.workers())[0].state != "drained":
                pass
            await there.drain("w0", undo=True)
            while (await here.workers())[0].state != "ready":
                pass
            assert (await here.generate("hello", max_tokens=5, seed=1)).ids == truth("hello", 1, 5)


async def test_a_client_finds_a_broker_that_lives() -> None:
    with Mesh(workers=1, fake=FAKE) as mesh:
        # The discard port of this host: no process listens there.
        async with Client(f"tcp://127.0.0.1:9,{mesh.address},tcp://127.0.0.1:13") as client:
            assert (await client.generate("hello", max_tokens=TOKENS, seed=3)).ids == truth("hello", 3, TOKENS)
