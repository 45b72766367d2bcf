"""A real broker process that is killed or stopped in the middle of its streams, and begins again at the same port."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import replace

import msgspec
import pytest

from llambo import Client
from llambo.broker.config import BrokerConfig
from llambo.mesh.wire import tasks
from llambo.testing.mesh import Mesh, truth
from llambo.worker.config import FakeOptions
from llambo.worker.engine.fake_model import embeddings, logprob_of
from llambo.worker.engine.protocol import Start

FAKE = FakeOptions(slots=16, tokens_per_s=150)
STREAMS = 24
TOKENS = 300


async def one(client: Client, number: int, begun: asyncio.Event) -> float:
    """The longest silence of a stream whose every token is right, once and in order."""
    ids: list[int] = []
    longest, last_at = 0.0, time.monotonic()
    async with client.stream(f"stream {number}", max_tokens=TOKENS, seed=number) as stream:
        while (piece := await stream.next_piece()) is not None:
            assert piece.index == len(ids), "a token is missing, or came twice"
            ids += piece.ids
            longest, last_at = max(longest, time.monotonic() - last_at), time.monotonic()
            if len(ids) > 20:
                begun.set()
    assert ids == truth(f"stream {number}", number, TOKENS)
    assert stream.answer is not None and stream.answer.reason == "length"
    return longest


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_streams_go_on_over_a_restart(how: signal.Signals) -> None:
    with Mesh(workers=2, fake=FAKE, broker="process") as mesh:
        async with mesh.client() as client, asyncio.TaskGroup() as group:
            begun = [asyncio.Event() for _ in range(STREAMS)]
            asked = [group.create_task(one(client, number, event)) for number, event in enumerate(begun)]
            for event in begun:
                await event.wait()
            await asyncio.to_thread(mesh.restart_broker, how)
            stalls = [await task for task in asked]
            counters = (await client.status()).counters
        print(f"longest silence {max(stalls) * 1000:.0f} ms, {counters['adopted']} of {STREAMS} adopted")
        # No worker was lost, so nothing had to be computed again.
        assert counters["adopted"] == STREAMS
        assert counters["dispatched"] == 0


async def test_a_stream_whose_worker_dies_with_the_broker_goes_on_elsewhere() -> None:
    with Mesh(workers=2, fake=FAKE, broker="process") as mesh:
        async with mesh.client() as client, asyncio.TaskGroup() as group:
            begun = [asyncio.Event() for _ in range(STREAMS)]
            asked = [group.create_task(one(client, number, event)) for number, event in enumerate(begun)]
            for event in begun:
                await event.wait()
            mesh.workers[0].send(signal.SIGKILL)
            await asyncio.to_thread(mesh.restart_broker, signal.SIGKILL)
            for task in asked:
                await task
            counters = dict((await client.status()).counters)
        assert counters["adopted"] > 0 and counters["dispatched"] > 0
        assert counters["adopted"] + counters["dispatched"] == STREAMS


async def test_logprobs_and_results_come_through_whole() -> None:
    texts = [f"text {number}" for number in range(120)]
    fake = replace(FAKE, embedding_size=2_048)

    async def answer(client: Client, number: int, begun: asyncio.Event) -> None:
        prompt = f"stream {number}"
        async with client.stream(prompt, max_tokens=TOKENS, seed=number, logprobs=number) as stream:
            while (piece := await stream.next_piece()) is not None:
                if piece.index > 20:
                    begun.set()
        assert stream.answer is not None
        ids = truth(prompt, number, TOKENS)
        assert stream.answer.ids == ids
        assert stream.answer.logprobs == [logprob_of(token, index, number) for index, token in enumerate(ids)]

    async def embedded(client: Client) -> None:
        start = Start(bytes(24), msgspec.msgpack.encode(texts), 256, 0)
        assert (await client.embed(texts)).vectors == tasks.vectors_of(embeddings(b"", start, fake))

    with Mesh(workers=2, fake=fake, broker="process") as mesh:
        async with mesh.client() as client, asyncio.TaskGroup() as group:
            begun = [asyncio.Event() for _ in range(4)]
            for number, event in enumerate(begun):
                group.create_task(answer(client, number, event))
            for event in begun:
                await event.wait()
            wanted = [group.create_task(embedded(client)) for _ in range(4)]
            while sum(request.task == "embed" for request in await client.requests()) < 4:
                pass
            mesh.workers[0].send(signal.SIGKILL)
            await asyncio.to_thread(mesh.restart_broker, signal.SIGKILL)
            await asyncio.gather(*wanted)
        async with mesh.client() as client:
            counters = dict((await client.status()).counters)
        assert counters["adopted"] + counters["dispatched"] == 8


async def test_a_detached_request_that_waited_is_submitted_again_by_who_attaches_to_it() -> None:
    """Only its client has its prompt: it was dispatched to no worker before the broker was killed."""
    fake, config = replace(FAKE, slots=1), BrokerConfig.of(startup_grace_ms=300)
    with Mesh(workers=1, fake=fake, broker="process", config=config) as mesh:
        async with mesh.client() as client:
            async with client.stream("first", max_tokens=TOKENS, seed=1) as first:
                assert await first.next_piece() is not None
                id = await client.submit("second", max_tokens=20, seed=2)
                await asyncio.to_thread(mesh.restart_broker, signal.SIGKILL)
                assert (await first.result()).ids == truth("first", 1, TOKENS)
            assert (await (await client.attach(id)).result()).ids == truth("second", 2, 20)
