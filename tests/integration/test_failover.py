"""Real worker processes that are killed, drained, refused or gone, and clients that leave or are slow."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Literal

import pytest

from llambo import Client
from llambo.broker.config import BrokerConfig
from llambo.broker.core import BrokerCore
from llambo.mesh.client.client import Answer, Stream
from llambo.mesh.client.sync_client import SyncClient
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.testing.mesh import Mesh, truth
from llambo.testing.processes import wait_until_gone
from llambo.worker.config import FakeFaults, FakeOptions
from llambo.worker.engine.fake_model import logprob_of

TOKENS = 200
#: A pace at which a stream takes a second, so that there is a middle of it.
FAKE = FakeOptions(slots=4, tokens_per_s=200)


async def read(stream: Stream, until: int | None = None) -> list[int]:
    """The ids up to the end, or until so many are here; each index once and in order."""
    ids: list[int] = []
    while (until is None or len(ids) < until) and (piece := await stream.next_piece()) is not None:
        assert piece.index == len(ids), "a token is missing, or came twice"
        ids += piece.ids
    return ids


async def stream_through(client: Client, streams: int, disturb: Callable[[], Awaitable[None]]) -> list[Answer]:
    """Some streams, and something that happens when each of them has begun."""
    begun = [asyncio.Event() for _ in range(streams)]

    async def one(number: int) -> Answer:
        prompt = f"stream {number}"
        ids: list[int] = []
        async with client.stream(prompt, max_tokens=TOKENS, seed=number) as stream:
            while (piece := await stream.next_piece()) is not None:
                assert piece.index == len(ids), "a token is missing, or came twice"
                ids += piece.ids
                if len(ids) > 10:
                    begun[number].set()
        assert ids == truth(prompt, number, TOKENS)
        assert stream.answer is not None
        return stream.answer

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number)) for number in range(streams)]
        for event in begun:
            await event.wait()
        await disturb()
    return [task.result() for task in tasks]


# --- workers that die --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_logprobs_survive_a_kill_exactly(stream: bool) -> None:
    with Mesh(workers=2, fake=FAKE, check=True) as mesh:

        async def one(client: Client, number: int, count: int | None) -> Answer:
            prompt = f"logprobs {number}"
            async with client.stream(prompt, max_tokens=TOKENS, seed=number, logprobs=count, stream=stream) as asked:
                answer = await asked.result()
            assert answer.ids == truth(prompt, number, TOKENS)
            expected = (
                [logprob_of(token, index, count) for index, token in enumerate(answer.ids)] if count is not None else []
            )
            assert answer.logprobs == expected
            return answer

        async with mesh.client() as client:
            asked = [asyncio.create_task(one(client, n, count)) for n, count in enumerate((0, 5, 20, None))]
            await mesh.aside(
                lambda core: (
                    all(r.transcript.next_index > 20 for r in core.state.requests.values())
                    and len(core.state.requests) == 4
                ),
                "all have begun",
            )
            mesh.workers[0].send(signal.SIGKILL)
            answers = await asyncio.gather(*asked)
        assert sum(answer.moves for answer in answers) == 2


@pytest.mark.parametrize("victim", ["agent", "engine", "both"])
async def test_killed_in_the_middle_of_its_streams(victim: str) -> None:
    # Given three workers that share some streams
    with Mesh(workers=3, fake=FAKE, check=True) as mesh:
        worker = mesh.workers[0]
        (engine,) = worker.children()

        async def kill() -> None:
            if victim != "agent":
                os.kill(engine, signal.SIGKILL)
            if victim != "engine":
                worker.send(signal.SIGKILL)

        # When one of them, or its engine, is killed
        async with mesh.client() as client:
            answers = await stream_through(client, 6, kill)
        # Then every answer is whole and right, and those of the victim have moved
        assert {answer.reason for answer in answers} == {"length"}
        assert sum(answer.moves for answer in answers) == 2
        assert mesh.counter("failed") == 0
        # And nothing is left of the killed processes
        wait_until_gone(engine, 10)
        assert worker.running == (victim == "engine")
        if victim == "engine":
            mesh.until(lambda core: mesh_ready(core) == 3, "its next engine is ready")


def mesh_ready(core: BrokerCore) -> int:
    return sum(worker.dispatchable for worker in core.state.registry.workers.values())


async def test_a_frozen_worker_is_given_up_and_its_late_tokens_do_not_count() -> None:
    with Mesh(workers=2, fake=FAKE, config=BrokerConfig.of(lease_ms=600), check=True) as mesh:
        frozen = mesh.workers[0]

        async def freeze() -> None:
            frozen.send(signal.SIGSTOP)
            await mesh.aside(lambda core: core.state.counters.peers.workers_lost, "the frozen one given up")
            frozen.send(signal.SIGCONT)

        async with mesh.client() as client:
            answers = await stream_through(client, 4, freeze)
        assert sum(answer.moves for answer in answers) >= 1
        # It comes back by itself, as a worker that runs nothing
        mesh.until(lambda core: mesh_ready(core) == 2, "the frozen one has joined again")


async def test_all_workers_gone_and_one_comes_back_in_time() -> None:
    with Mesh(workers=1, fake=FAKE, check=True) as mesh:

        async def replace() -> None:
            mesh.workers[0].send(signal.SIGKILL)
            await mesh.aside(lambda core: core.state.queue.count == 2, "both requests wait")
            mesh.spawn("w1")

        async with mesh.client() as client:
            answers = await stream_through(client, 2, replace)
        assert [(answer.worker, answer.moves) for answer in answers] == [("w1", 1)] * 2


async def test_all_workers_gone_and_none_comes_back() -> None:
    with Mesh(workers=1, fake=FAKE, config=BrokerConfig.of(hold_ms=500), check=True) as mesh:

        async def kill() -> None:
            mesh.workers[0].send(signal.SIGKILL)

        async with mesh.client() as client:
            with pytest.raises(ExceptionGroup) as raised:
                await stream_through(client, 1, kill)
        (error,) = raised.value.exceptions
        assert isinstance(error, LlamboError)
        assert (error.code, error.retryable) == (Code.NO_WORKER, True)


def test_the_same_name_from_two_processes() -> None:
    with Mesh(workers=1, check=True) as mesh:
        second = mesh.spawn("w0")
        mesh.until(lambda core: core.state.counters.peers.problems > 0, "the second refused")
        # The first dies, and then the name is free for the second
        mesh.workers[0].send(signal.SIGKILL)
        assert second.first_line() == "ready"


# --- workers that take no work ---------------------------------------------------------------------------------


async def test_a_drained_worker_finishes_and_gets_nothing_new() -> None:
    with Mesh(workers=2, fake=FAKE, check=True) as mesh:
        async with mesh.client() as client:

            async def drain() -> None:
                assert (await client.drain("w0")).draining
                answers = [await client.generate(f"next {number}", max_tokens=2) for number in range(4)]
                assert {answer.worker for answer in answers} == {"w1"}

            await mesh.aside(lambda core: mesh_ready(core) == 2, "both take requests")
            answers = await stream_through(client, 4, drain)
            assert {answer.worker for answer in answers} == {"w0", "w1"}
            assert {answer.moves for answer in answers} == {0}
            assert not (await client.drain("w0", undo=True)).draining
            await mesh.aside(lambda core: mesh_ready(core) == 2, "the drained one back")


async def test_a_worker_that_gets_sigterm_finishes_what_it_has() -> None:
    with Mesh(workers=2, fake=FAKE, check=True) as mesh:

        async def stop() -> None:
            mesh.workers[0].send(signal.SIGTERM)

        async with mesh.client() as client:
            answers = await stream_through(client, 4, stop)
        assert {answer.moves for answer in answers} == {0}
        assert mesh.workers[0].end() == 0


async def test_a_worker_that_is_busy_for_another_broker_gets_nothing_and_another_worker_does_it() -> None:
    """Two brokers share a worker: each counts the slots that the other uses."""
    with Mesh(workers=1, fake=FakeOptions(slots=1, tokens_per_s=200), check=True) as mesh, Mesh(workers=0) as other:
        both = mesh.spawn("both", mesh.address, other.address)
        both.first_line()
        other.until(lambda core: mesh_ready(core) == 1, "it has joined the other broker as well")
        async with mesh.client() as client, other.client() as blocker:
            # Given a worker that is busy for another broker
            stream = blocker.stream("elsewhere", max_tokens=10_000, seed=1)
            await read(stream, 1)
            # When more comes than the only other one can do at a time
            asked = [client.generate(f"ask {n}", max_tokens=20, seed=n) for n in range(4)]
            answers = list(await asyncio.gather(*asked))
        # Then it is done all the same
        assert [answer.ids for answer in answers] == [truth(f"ask {n}", n, 20) for n in range(4)]
        assert {answer.worker for answer in answers} == {"w0"}
        # At most once was it tried in vain: a refusal comes with how much the worker can take.
        assert mesh.counter("dispatched") <= len(answers) + 1


# --- clients -----------------------------------------------------------------------------------------------------


async def test_a_detached_request_is_fetched_later_by_another_client() -> None:
    with Mesh(workers=1, fake=FAKE, check=True) as mesh:
        async with mesh.client() as client:
            running = await client.submit("long", max_tokens=TOKENS, seed=1)
            done = await client.submit("short", max_tokens=3, seed=2)
        await mesh.aside(lambda core: bytes.fromhex(done) in core.state.archive.ended, "the short one done")
        async with mesh.client() as client:
            # One runs still, one is over; the beginning of an id will do
            assert await read(await client.attach(running)) == truth("long", 1, TOKENS)
            assert await read(await client.attach(done[:12])) == truth("short", 2, 3)
            # And both can be had again
            assert await read(await client.attach(running)) == truth("long", 1, TOKENS)


@pytest.mark.parametrize("how", ["leaves", "closes its stream", "vanishes"])
async def test_a_request_without_a_reader_is_cancelled_on_the_worker(how: str) -> None:
    with Mesh(workers=1, fake=FAKE, config=BrokerConfig.of(client_lease_ms=700), check=True) as mesh:
        client = mesh.client()
        await client.connect()
        stream = client.stream("hello", max_tokens=100_000)
        await read(stream, 5)
        if how == "closes its stream":
            await stream.aclose()
        elif how == "vanishes":
            # As after kill -9: its sockets are closed without a GOODBYE.
            assert client._shell is not None
            client._shell.close()
        else:
            await client.close()
        await mesh.aside(lambda core: core.state.counters.requests.cancelled == 1, "the request cancelled")
        await mesh.aside(idle, "the worker free of it")
        await client.close()


def idle(core: BrokerCore) -> bool:
    """No worker holds a run, as its own last word says."""
    workers = core.state.registry.workers.values()
    return not core.state.requests and all(not worker.claims and not worker.last.claims for worker in workers)


async def test_a_reader_that_takes_its_time() -> None:
    """It does not read while 80,000 tokens come: more than a client buffers."""
    count = 80_000
    with Mesh(workers=1, fake=FakeOptions(slots=1, burst=64), check=True) as mesh:
        async with mesh.client() as client, client.stream("slow", max_tokens=count, seed=1) as stream:
            await mesh.aside(lambda core: core.state.counters.requests.ended == 1, "the answer made")
            assert (await read(stream)) == truth("slow", 1, count)


async def test_two_clients_follow_one_request() -> None:
    with Mesh(workers=1, fake=FAKE, check=True) as mesh:
        async with mesh.client() as client, mesh.client() as other:
            stream = client.stream("hello", max_tokens=TOKENS, seed=1)
            ids = await read(stream, 20)
            # Another client follows the same request, and leaves again
            follower = await other.attach(stream.id)
            assert (await read(follower, 50))[:50] == truth("hello", 1, TOKENS)[:50]
            await follower.aclose()
            while (piece := await stream.next_piece()) is not None:
                ids += piece.ids
            assert ids == truth("hello", 1, TOKENS)
        assert mesh.counter("dispatched") == 1


async def test_a_sync_client_where_an_event_loop_runs_already() -> None:
    """As in a notebook: all it does happens on a thread of its own."""
    with Mesh(workers=1) as mesh, SyncClient(mesh.address) as client:
        assert client.generate("hello", max_tokens=5, seed=1).ids == truth("hello", 1, 5)


async def test_a_request_waits_for_a_model_that_is_loading() -> None:
    fake = FakeOptions(load_ms=1_500)
    with Mesh(0, fake=fake, check=True) as mesh:
        mesh.spawn("slow")
        mesh.until(lambda core: any(w.last.percent > 30 for w in core.state.registry.workers.values()), "30 % loaded")
        async with mesh.client() as client:
            status = await client.status()
            assert (status.ready, status.workers, list(status.loading)) == (0, 1, ["slow"])
            assert (await client.generate("Hello", max_tokens=5, seed=1)).ids == truth("Hello", 1, 5)


@pytest.mark.parametrize("when", ["careless", "always"])
def test_an_engine_that_dies_while_it_loads(when: Literal["careless", "always"]) -> None:
    """Careful it may live; if not, the worker ends and says why."""
    with Mesh(0, fake=FakeOptions(faults=FakeFaults(load_crash=when)), check=True) as mesh:
        worker = mesh.spawn("w")
        if when == "careless":
            worker.first_line()
        else:
            assert worker.end() == 1
            assert "cannot serve fake: the engine was ended by SIGSEGV while loading, with safe" in worker.log()
        assert "SIGSEGV while loading; trying again with safe settings" in worker.log()
