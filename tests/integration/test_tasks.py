"""Tasks through real processes: results of all sizes, workers that die while they run tasks, cancels and deadlines."""

from __future__ import annotations

import asyncio
import os
import signal

import msgspec
import pytest

from llambo.mesh.client.sync_client import SyncClient
from llambo.mesh.wire import limits, tasks
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.testing.mesh import Mesh
from llambo.worker.config import FakeOptions
from llambo.worker.engine.fake_model import embeddings
from llambo.worker.engine.protocol import Start

SIZE = 2_048
TEXTS = [f"text {number}" for number in range(200)]
#: 1.6 MB of result: a hundred pieces, seven pages, at a pace that takes a second.
FAKE = FakeOptions(slots=2, tokens_per_s=100, embedding_size=SIZE)


def truth(texts: list[str]) -> list[list[float]]:
    start = Start(bytes(24), msgspec.msgpack.encode(texts), 256, 0)
    return tasks.vectors_of(embeddings(b"", start, FAKE))


async def test_results_of_all_sizes_are_whole(steady_mesh: Mesh) -> None:
    async with steady_mesh.client() as client:
        result = await client.tokenize("Grüße")
        assert result.ids == list("Grüße".encode())
        assert await client.detokenize(result.ids) == "Grüße"
        assert await client.tokenize("") == type(result)([], [])
        long = "x" * 120_000
        assert b"".join((await client.tokenize(long)).pieces).decode() == long
        found = await client.embed("one")
        assert (len(found.vectors), found.tokens, found.pooling) == (1, [3], "mean")
        assert (await client.model_info())["model"] == "fake"
        many = await asyncio.gather(*[client.tokenize(f"number {number}") for number in range(50)])
        assert [b"".join(one.pieces) for one in many] == [b"number %d" % number for number in range(50)]
    with SyncClient(steady_mesh.address) as sync:
        assert sync.detokenize(sync.tokenize("abc").ids) == "abc"
        assert sync.embed(["a", "b"]).tokens == [1, 1]
        assert sync.model_info(model="fake")["engine"] == "fake"


@pytest.mark.parametrize("victim", ["agent", "engine"])
async def test_a_worker_that_dies_costs_a_task_only_time(victim: str) -> None:
    with Mesh(workers=2, fake=FAKE, check=True) as mesh:
        async with mesh.client() as client:
            asked = [asyncio.create_task(client.embed(TEXTS)) for _ in range(4)]
            await mesh.aside(
                lambda core: (
                    len(core.state.requests) == 4
                    and all(request.transcript.next_index > 5 for request in core.state.requests.values())
                ),
                "parts of all results are at the broker",
            )
            if victim == "agent":
                mesh.workers[0].send(signal.SIGKILL)
            else:
                os.kill(mesh.workers[0].children()[0], signal.SIGKILL)
            all_found = await asyncio.gather(*asked)
        wanted = truth(TEXTS)
        for found in all_found:
            assert found.vectors == wanted
            assert found.tokens == [len(text) for text in TEXTS]
        assert mesh.counter("moved") == 2
        mesh.until(lambda core: not core.state.archive.owed_bytes and not core.state.reserved, "nothing is left")


async def test_cancels_and_deadlines_end_a_task_with_a_reason() -> None:
    with Mesh(workers=1, fake=FAKE, check=True) as mesh:
        async with mesh.client() as client, mesh.client() as other:
            with pytest.raises(LlamboError) as late:
                await client.embed(TEXTS, deadline_ms=100)
            assert late.value.code is Code.DEADLINE
            # Another client cancels it
            asked = asyncio.create_task(client.embed(TEXTS))
            await mesh.aside(lambda core: len(core.state.requests) == 1, "it runs")
            (request,) = await other.requests()
            assert request.task == "embed"
            with pytest.raises(LlamboError) as no_stream:
                await (await other.attach(request.id)).result()
            assert no_stream.value.code is Code.BAD_REQUEST
            assert await other.cancel(request.id) == "cancelled"
            with pytest.raises(LlamboError) as cancelled:
                await asked
            assert cancelled.value.code is Code.CANCELLED
            # A cancelled call cancels its task, too
            asked = asyncio.create_task(client.embed(TEXTS))
            await mesh.aside(lambda core: len(core.state.requests) == 1, "it runs")
            asked.cancel()
            await mesh.aside(lambda core: not core.state.requests, "it is cancelled")
            mesh_free = await client.tokenize("and goes on")
            assert len(mesh_free.ids) == 11


async def test_what_makes_no_sense_is_refused_by_client_or_worker(steady_mesh: Mesh) -> None:
    async with steady_mesh.client() as client:
        for wrong in (
            client.embed([]),
            client.embed(["x"] * (limits.EMBED_INPUTS + 1)),
            client.detokenize([-1]),
            client.detokenize([2**40]),
            client.embed("x", pooling="max"),  # type: ignore[arg-type]
            client.tokenize("x", form="messages?"),  # type: ignore[arg-type]
            client.tokenize("x", priority="high"),  # type: ignore[arg-type]
        ):
            with pytest.raises(LlamboError) as refused:
                await wrong
            assert refused.value.code is Code.BAD_REQUEST
        with pytest.raises(LlamboError) as unknown:
            await client.model_info(model="other")
        assert unknown.value.code is Code.UNKNOWN_MODEL
        with pytest.raises(LlamboError) as long:
            await client.tokenize("x" * 3_000_000)
        assert long.value.code is Code.TOO_LONG
        assert str(limits.RESULT_BYTES) in long.value.text
