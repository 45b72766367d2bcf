"""What a broker takes of its machine does not grow with what it has served.

`LLAMBO_TEST_REQUESTS=40000` makes it a measurement; by itself it is short.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from llambo.broker.config import BrokerConfig
from llambo.mesh.client.client import Client
from llambo.testing.mesh import Mesh
from llambo.worker.config import FakeOptions

REQUESTS = int(os.environ.get("LLAMBO_TEST_REQUESTS", "3000"))
AT_A_TIME = 48
#: Of the broker, from a third of the way on: an allocator rounds, and its fragments settle slowly.
GROWTH_BYTES = 1024 * 1024


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_a_broker_grows_no_more_once_its_archive_is_full() -> None:
    config = BrokerConfig.of(tombstones=300, events=50)
    with Mesh(workers=1, fake=FakeOptions(slots=AT_A_TIME, burst=4), config=config, broker="process") as mesh:
        assert mesh.process is not None
        pid = mesh.process.pid
        sizes: list[tuple[int, int]] = []
        left = iter(range(REQUESTS))

        async def ask(client: Client) -> None:
            for number in left:
                # Of every fate: read, detached and never asked for, with a deadline that is far away.
                deadline_ms = 3_600_000 if number % 3 else 0
                if number % 7:
                    await client.generate(f"request {number}", max_tokens=8, deadline_ms=deadline_ms)
                else:
                    await client.submit(f"request {number}", max_tokens=8, deadline_ms=deadline_ms)
                if number % (REQUESTS // 30) == 0:
                    sizes.append((mesh.broker_rss_bytes(), descriptors(pid)))

        async def crowd() -> None:
            async with mesh.client() as client, asyncio.TaskGroup() as group:
                for _ in range(AT_A_TIME):
                    group.create_task(ask(client))

        mesh.run(crowd(), 30 + REQUESTS / 50)
    settled = sizes[len(sizes) // 3 :]
    grown = max(size for size, _ in settled[-5:]) - max(size for size, _ in settled[:5])
    print(f"\n{REQUESTS} requests: {[size >> 10 for size, _ in sizes]} KiB; {grown >> 10} KiB in the last two thirds")
    assert grown < GROWTH_BYTES
    assert len({count for _, count in settled}) == 1, [count for _, count in sizes]
