"""Limits and shares of real keys over real sockets, through deaths of a worker and of the broker."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from llambo import Client
from llambo.broker.core import BrokerCore
from llambo.mesh.client.answer_stream import Answer, Stream
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.identity import Identity
from llambo.testing.mesh import Mesh, key_folder, key_of, truth
from llambo.worker.config import FakeOptions

TOKENS = 60
#: More than any test reads.
LONG = 50_000
FAKE = FakeOptions(slots=4, tokens_per_s=200)
LIMITED = Identity("alice", "client", max_in_flight=2, max_queued=3, priority_max="normal")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = key_folder(tmp_path / "keys", boss="admin")
    folder.add(LIMITED, int(time.time()))
    folder.add(Identity("slow", "client", per_minute=1), int(time.time()))
    folder.add(Identity("stranger", "client", models=("other*",)), int(time.time()))
    return folder


async def refusal(stream: Stream) -> LlamboError:
    with pytest.raises(LlamboError) as raised:
        await stream.result()
    return raised.value


async def right(client: Client, number: int, **options: object) -> Answer:
    answer = await client.generate(f"prompt {number}", max_tokens=TOKENS, seed=number, **options)  # type: ignore[arg-type]
    assert answer.ids == truth(f"prompt {number}", number, TOKENS)
    return answer


def at_rest(mesh: Mesh, name: str) -> None:
    """Nothing of this identity is left on its account."""
    mesh.until(lambda core: core.state.access.accounts.of(name).idle, f"nothing of {name} is left")


async def test_each_limit_and_its_error(folder: Folder) -> None:
    with Mesh(workers=1, fake=FAKE, check=True, keys=folder) as mesh:
        async with (
            mesh.client(key=key_of(folder, "alice")) as alice,
            mesh.client(key=key_of(folder, "stranger")) as stranger,
            mesh.client(key=key_of(folder, "slow")) as slow,
            mesh.client(key=key_of(folder, "bob")) as bob,
            mesh.client(key=key_of(folder, "boss")) as boss,
        ):
            long = [alice.stream("long", max_tokens=LONG, seed=1) for _ in range(2)]
            for stream in long:
                assert await stream.next_piece() is not None
            # Two are at work, and that is all: the next wait, though two slots are free for others
            waiting = [asyncio.create_task(right(alice, number)) for number in range(3)]
            await mesh.aside(lambda core: core.state.access.accounts.of("alice").queued == 3, "three wait")
            await right(bob, 9)

            error = await refusal(alice.stream("one too many", max_tokens=5))
            assert (error.code, error.text) == (Code.OVER_LIMIT, "alice has 3 requests waiting, at most 3 may")
            assert 100 <= error.retry_after_ms <= 30_000
            error = await refusal(alice.stream("before all", max_tokens=5, priority="interactive"))
            assert error.code is Code.FORBIDDEN and "'normal'" in error.text
            error = await refusal(stranger.stream("whatever there is", max_tokens=5))
            assert (error.code, error.text) == (Code.NO_WORKER, "no worker serves a model that stranger may use")
            error = await refusal(stranger.stream("that one", max_tokens=5, model="fake"))
            assert error.code is Code.FORBIDDEN
            assert await stranger.models() == []

            (own,) = (await alice.status()).identities
            shown = {
                name: getattr(own, name) for name in ("identity", "in_flight", "queued", "submitted", "refused_for")
            }
            assert shown == {
                "identity": "alice",
                "in_flight": 2,
                "queued": 3,
                "submitted": 5,
                "refused_for": {"max_queued": 1, "priority_max": 1},
            }
            listed = (await boss.status()).identities
            assert [one.identity for one in listed] == [
                "alice",
                "bob",
                "boss",
                "stranger",
            ]  # slow has not asked yet

            for stream in long:
                await stream.cancel()
            await asyncio.gather(*waiting)
            await right(slow, 1)
            error = await refusal(slow.stream("the second in a minute", max_tokens=5))
            assert (error.code, error.text) == (Code.OVER_LIMIT, "slow may begin 1 request in a minute")
            assert 30_000 < error.retry_after_ms <= 60_000
        at_rest(mesh, "alice")


async def test_one_with_many_waiting_delays_another_by_a_turn(folder: Folder) -> None:
    """One slot; a hundred of one identity wait. Those of another are served in between, one after the other."""
    fake = FakeOptions(slots=1, tokens_per_s=2_000)
    with Mesh(workers=1, fake=fake, check=True, keys=folder) as mesh:
        async with (
            mesh.client(key=key_of(folder, "many")) as many,
            mesh.client(key=key_of(folder, "few")) as few,
        ):
            long = many.stream("long", max_tokens=LONG)
            assert await long.next_piece() is not None
            flood = [asyncio.create_task(many.generate(f"{number}", max_tokens=20)) for number in range(100)]
            await mesh.aside(lambda core: core.state.queue.count == 100, "a hundred wait")
            others = [asyncio.create_task(few.generate(f"{number}", max_tokens=20)) for number in range(5)]
            await mesh.aside(lambda core: core.state.queue.count == 105, "all wait")
            assert await asyncio.to_thread(mesh.look, ahead_of_few) == [1, 3, 5, 7, 9]
            await long.cancel()
            await asyncio.gather(*flood, *others)
        order = mesh.look(lambda core: [ended.owner for ended in core.state.archive.ended.values()])
        assert order == ["many"] + 5 * ["many", "few"] + 95 * ["many"]
        at_rest(mesh, "many")


def ahead_of_few(core: BrokerCore) -> list[int]:
    """How many are served before each, as its client is notified."""
    return sorted(core.state.queue.ahead(each) for each in core.state.requests.values() if each.owner == "few")


async def test_a_worker_that_dies_takes_nothing_from_an_account(folder: Folder) -> None:
    with Mesh(workers=2, fake=FakeOptions(slots=1, tokens_per_s=50), check=True, keys=folder) as mesh:
        async with mesh.client(key=key_of(folder, "alice")) as alice:
            asked = [asyncio.create_task(right(alice, number)) for number in range(5)]
            await mesh.aside(
                lambda core: (
                    core.state.access.accounts.of("alice").in_flight == 2 and core.state.counters.tokens.chunks > 5
                ),
                "two are at work",
            )
            mesh.workers[0].send(signal.SIGKILL)
            answers = await asyncio.gather(*asked)
        assert sum(answer.moves for answer in answers) >= 1
        at_rest(mesh, "alice")


async def test_what_the_last_broker_had_admitted_comes_back_whatever_the_limits(folder: Folder) -> None:
    """All of them wait at first, twice as many as may. Not more than two are at work, and all end well."""
    folder.add(Identity("carol", "client", max_in_flight=2, max_queued=2), int(time.time()))
    with Mesh(workers=1, fake=FakeOptions(slots=4, tokens_per_s=60), broker="process", keys=folder) as mesh:
        async with mesh.client(key=key_of(folder, "carol")) as carol:
            streams = [carol.stream(f"prompt {n}", max_tokens=TOKENS, seed=n) for n in range(4)]
            for stream in streams[:2]:
                assert await stream.next_piece() is not None
            await asyncio.to_thread(mesh.restart_broker, signal.SIGKILL)
            for number, answer in enumerate(await asyncio.gather(*(stream.result() for stream in streams))):
                assert answer.ids == truth(f"prompt {number}", number, TOKENS)
            (own,) = (await carol.status()).identities
        assert (own.in_flight, own.queued, own.bytes, own.submitted, own.refused) == (0, 0, 0, 4, 0)
