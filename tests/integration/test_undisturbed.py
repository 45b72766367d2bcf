"""Real sockets and nothing that disturbs: everything arrives, and hardly anything has to be sent again."""

from __future__ import annotations

import asyncio
import itertools
import time

from llambo import Client
from llambo.testing.mesh import Mesh, truth
from llambo.worker.config import FakeOptions

REQUESTS = 10_000
#: Requests at a time: more than there are slots, so that the queue is part of it.
CONCURRENT = 64
TOKENS = 8
TIMEOUT_S = 240.0
#: Of the requests, how many may have needed a repair anywhere.
REPAIRED = 0.01


async def ask(client: Client, numbers: itertools.count[int], wrong: list[int]) -> None:
    while (number := next(numbers)) < REQUESTS:
        prompt = f"request {number}"
        async with client.stream(prompt, max_tokens=TOKENS, seed=number) as stream:
            answer = await stream.result()
        if answer.ids != truth(prompt, number, TOKENS) or answer.reason != "length":
            wrong.append(number)


async def storm(mesh: Mesh) -> tuple[list[int], dict[str, int], int, float]:
    wrong: list[int] = []
    async with mesh.client() as client:
        began = time.monotonic()
        numbers = itertools.count()
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENT):
                group.create_task(ask(client, numbers, wrong))
        took_s = time.monotonic() - began
        status = await client.status()
        return wrong, status.counters, client.counters.replays, took_s


def test_ten_thousand_requests_arrive_whole_and_hardly_anything_is_sent_again() -> None:
    # Given a broker and workers as processes
    with Mesh(workers=2, fake=FakeOptions(slots=16), broker="process") as mesh:
        # When many requests run at a time
        wrong, counters, replays, took_s = mesh.run(storm(mesh), TIMEOUT_S)
    # Then all tokens are right, and repairs were the exception
    repairs = counters["repaired"] + replays
    print(
        f"\n{REQUESTS} requests of {TOKENS} tokens in {took_s:.1f} s ({REQUESTS / took_s:.0f}/s): {len(wrong)} wrong; "
        f"repaired: {counters['repaired']} at the broker, {replays} at the client = {repairs / REQUESTS:.2%}"
    )
    assert wrong == []
    assert (counters["submitted"], counters["ended"], counters["failed"]) == (REQUESTS, REQUESTS, 0)
    assert (counters["tokens"], counters["moved"]) == (REQUESTS * TOKENS, 0)
    assert repairs < REPAIRED * REQUESTS
