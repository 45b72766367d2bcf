"""Models on demand over the whole mesh: real brokers, a real host whose models are fake, clients that ask by name."""

from __future__ import annotations

import asyncio

import pytest

from llambo import Client
from llambo.mesh.wire import reports
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.testing.mesh import Mesh, truth
from llambo.testing.processes import TIMEOUT_S

#: Each takes 40 MiB of 100, and a while to load.
MODELS = "a:40:100ms,b:40:100ms,c:40:100ms"
BUDGET = ("--memory-bytes", "100MiB", "--min-loaded-ms", "0")


async def hosted(client: Client) -> None:
    """A host has joined, and has reported what it has."""
    async with asyncio.timeout(TIMEOUT_S):
        while not await client.models():
            pass


async def at_host(client: Client, model: str) -> reports.ModelHost:
    row = next(row for row in await client.models() if row.model == model)
    return row.hosts[0]


async def becomes(client: Client, model: str, state: str) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while (await at_host(client, model)).state != state:
            pass


async def test_three_models_in_the_memory_of_two() -> None:
    with Mesh(0, check=True) as mesh:
        mesh.spawn_host("box", MODELS, *BUDGET)
        async with mesh.client() as client:
            await hosted(client)
            # Given a request for a model that is not loaded: it is sent what it waits for
            noted = []
            stream = client.stream("hi", model="a", seed=1, max_tokens=5)
            stream.on_place = lambda: noted.append(stream.note)
            answer = await stream.result()
            assert answer.ids == truth("hi", 1, 5)
            assert any(note.startswith(("loading a on box", "box is about to load a")) for note in noted), noted
            # When requests for more models than fit come at the same time, each is answered
            order = "abcaabcbacab"
            answers = await asyncio.gather(
                *(client.generate("hi", model=model, seed=number, max_tokens=5) for number, model in enumerate(order))
            )
            assert [answer.ids for answer in answers] == [truth("hi", number, 5) for number in range(len(order))]
            assert [answer.worker for answer in answers] == [f"box-{model}" for model in order]
            (host,) = await client.hosts()
            assert host.memory["ram"].used <= host.memory["ram"].budget
            # A model that is held stays, and the others take turns in the rest
            reply = await client.hold_model("a", holder="test")
            assert (reply.host, reply.holder) == ("box", "test")
            await becomes(client, "a", "ready")
            loads = (await at_host(client, "a")).loads
            for model in "bcbc":
                await client.generate("hi", model=model, max_tokens=2)
            assert (await at_host(client, "a")).holders == ["test"]
            assert (await at_host(client, "a")).loads == loads
            # An operator unloads it, although it is held
            await client.release_model("a")
            await becomes(client, "a", "stored")


async def test_a_model_that_cannot_be_loaded_ends_its_requests_and_no_others() -> None:
    with Mesh(0, check=True) as mesh:
        mesh.spawn_host("box", "a:40,large:200", *BUDGET)
        async with mesh.client() as client:
            await hosted(client)
            good = asyncio.create_task(client.generate("hi", model="a", seed=1, max_tokens=3))
            with pytest.raises(
                LlamboError, match="'large' could not be loaded on box: it needs 200 MiB of ram"
            ) as found:
                await client.generate("hi", model="large", max_tokens=3)
            assert found.value.code is Code.ENGINE_FAILED
            assert (await good).ids == truth("hi", 1, 3)


async def test_two_brokers_that_want_different_models() -> None:
    """Memory for one model, and each broker has requests for another one: both end in answers."""
    with Mesh(0, check=True) as one, Mesh(0, check=True) as other:
        one.spawn_host("box", "a:60,b:60", *BUDGET, addresses=(one.address, other.address))
        async with one.client() as here, other.client() as there:
            await hosted(here)
            await hosted(there)
            asked = [
                client.generate("hi", model=model, seed=seed, max_tokens=3)
                for seed in range(4)
                for client, model in ((here, "a"), (there, "b"))
            ]
            answers = await asyncio.gather(*asked)
            assert [answer.ids for answer in answers] == [truth("hi", seed, 3) for seed in range(4) for _ in range(2)]
