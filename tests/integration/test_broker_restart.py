"""A real broker process that is killed or stopped in the middle of its streams, and begins again at the same port."""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from llambo import Client
from llambo.broker.config import BrokerConfig
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tasks
from llambo.mesh.wire.identity import PeerKey
from llambo.testing.mesh import Mesh, key_folder, key_of, truth
from llambo.testing.raw_peer import RawPeer
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


FORGED = 100
#: Detached ones, and as many whose client stays.
OWN = 8


def forge(mesh: Mesh, key: PeerKey, ids: list[bytes]) -> None:
    """A worker's key brings runs: of these requests in other names, and others in the name of alice."""
    with RawPeer(mesh.port, 1, key=key) as peer:
        peer.join_as_worker("evil", "fake")
        runs = [
            m.Dispatch(id, number.to_bytes(8, "big"), 1, "fake", 50_000, 0, owner="mallory", seal=bytes(24))
            for number, id in enumerate(ids)
        ]
        for number in range(FORGED - len(ids)):
            id, dispatch = secrets.token_bytes(16), b"\0\0\0\1" + number.to_bytes(4, "big")
            runs.append(
                m.Dispatch(id, dispatch, 1, "fake", 50_000, 0, detached=True, priority="interactive", owner="alice")
            )
        for run in runs:
            peer.send_messages(m.Orphan(run, home=True), blobs=[b"do this for me"])
        for run in runs:
            peer.expect(m.Cancel, id=run.id)
        assert not [message for _, message in peer.received if isinstance(message, m.Adopt)]
        peer.send_messages(m.Goodbye())


async def test_of_what_workers_bring_only_what_was_dispatched_to_them_is_taken_in(tmp_path: Path) -> None:
    """200 forged runs, before and after a restart, beside those of honest workers."""
    folder = key_folder(tmp_path / "keys", alice="client", boss="admin", evil="worker")
    key, fake = key_of(folder, "evil", "worker"), FakeOptions(slots=16, tokens_per_s=100)
    with Mesh(workers=2, fake=fake, broker="process", keys=folder) as mesh:
        async with (
            mesh.client(key=key_of(folder, "alice")) as alice,
            mesh.client(key=key_of(folder, "boss")) as boss,
        ):
            detached = [await alice.submit(f"{n}", max_tokens=TOKENS, seed=n) for n in range(OWN)]
            streams = [alice.stream(f"{n}", max_tokens=TOKENS, seed=n) for n in range(OWN)]
            for stream in streams:
                assert await stream.next_piece() is not None
            ids = [bytes.fromhex(id) for id in (*detached, *(stream.id for stream in streams))]
            await asyncio.to_thread(forge, mesh, key, ids)
            await asyncio.to_thread(mesh.restart_broker, signal.SIGKILL)
            await asyncio.to_thread(forge, mesh, key, ids)
            followed = [await alice.attach(id) for id in detached]
            for stream, number in zip((*streams, *followed), 2 * list(range(OWN)), strict=True):
                assert (await stream.result()).ids == truth(f"{number}", number, TOKENS)
            status, listed = await boss.status(), await boss.requests()
        assert listed == []
        rows = {row.identity: row for row in status.identities}
        assert (rows["evil"].refused_for, rows["evil"].submitted) == ({"forbidden": FORGED}, 0)
        assert (rows["alice"].refused, rows["alice"].submitted) == (0, 2 * OWN)
        # No worker was lost, so nothing had to be computed again.
        assert (status.counters["adopted"], status.counters["dispatched"]) == (2 * OWN, 0)
