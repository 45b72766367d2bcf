"""Token planes that lose most of what they are given, and a reader that stalls: every token arrives all the same."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from llambo import Client
from llambo.mesh import limits, tokens
from llambo.mesh.client import Stream
from llambo.mesh.link import Link
from llambo.mesh.sync_client import SyncClient
from llambo.worker.config import WorkerConfig
from llambo.worker.knobs import FakeKnobs
from tests.integration.harness import Mesh, rss_bytes, truth

#: Frames that a socket of a token plane queues, at each of its four ends.
HWM = 10
REQUESTS = 8
TOKENS = limits.MAX_TOKENS
#: After so many tokens the reader stalls until the mesh has made so many more.
READ_TOKENS = 50_000
STALL_TOKENS = 120_000
#: ... and within this, or the client's lease would be out.
STALL_S = 8.0
TIMEOUT_S = 180.0
#: What the broker and the client may grow by while this goes through them: the answers themselves are 50 MB.
GROWTH_BYTES = 256 * 2**20


@dataclass
class Watch:
    """What came over the token plane of a client, and how its reader fared."""

    live_tokens: int = 0
    frames: int = 0
    stalls: int = 0
    read: int = 0
    stall_at: int = READ_TOKENS
    wrong: list[str] = field(default_factory=list)

    def on(self, link: Link) -> None:
        """Count what the link is given before anybody else sees it."""
        receive = link.receive_tokens

        def receive_and_count() -> list[bytes]:
            frames = receive()
            for frame in frames:
                if frame[limits.TOPIC_BYTES : limits.TOPIC_BYTES + 1] == tokens.CHUNK:
                    self.frames += 1
                    self.live_tokens += tokens.head(frame, limits.TOPIC_BYTES + tokens.KEY_END)[1]
            return frames

        link.receive_tokens = receive_and_count  # type: ignore[method-assign]


class Observer:
    """Asks the broker how far it is, from a thread of its own: the reader's whole loop stands still meanwhile."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._thread = ThreadPoolExecutor(1)

    def until_made(self, more: int, timeout_s: float) -> None:
        """Until the mesh has made so many tokens more, or is done. Each look is a round trip to the broker."""
        self._thread.submit(self._watch, more, timeout_s).result()

    def _watch(self, more: int, timeout_s: float) -> None:
        with SyncClient(self._address) as client:
            target = min(made(client) + more, REQUESTS * TOKENS)
            deadline = time.monotonic() + timeout_s
            while made(client) < target:
                assert time.monotonic() < deadline, f"{made(client)} tokens were made, {target} should be"

    def close(self) -> None:
        self._thread.shutdown()


def made(client: SyncClient) -> int:
    """Tokens that the broker has so far."""
    return int(client.status()["counters"]["tokens"]) + sum(int(one["tokens"]) for one in client.requests())


async def read(stream: Stream, prompt: str, seed: int, observer: Observer, watch: Watch) -> None:
    ids: list[int] = []
    while (piece := await stream.next_piece()) is not None:
        ids += piece.ids
        watch.read += len(piece.ids)
        if watch.read >= watch.stall_at:
            watch.stall_at = watch.read + READ_TOKENS
            watch.stalls += 1
            observer.until_made(STALL_TOKENS, STALL_S)
    if ids != truth(prompt, seed, TOKENS):
        watch.wrong.append(prompt)


async def lossy(client: Client, watch: Watch) -> None:
    observer = Observer(client.address)
    async with client, asyncio.TaskGroup() as group:
        assert client._shell is not None
        watch.on(client._shell._link)
        for number in range(REQUESTS):
            stream = client.stream(f"prompt {number}", max_tokens=TOKENS, seed=number)
            group.create_task(read(stream, f"prompt {number}", number, observer, watch))
    observer.close()


def test_a_million_tokens_most_of_them_dropped() -> None:
    # Given token planes that queue next to nothing at any end
    knobs, worker = FakeKnobs(slots=REQUESTS // 2, burst=8), WorkerConfig(token_hwm=HWM)
    with Mesh(workers=2, knobs=knobs, worker=worker, broker="process", token_hwm=HWM) as mesh:
        before = mesh.broker_rss_bytes(), rss_bytes(os.getpid())
        watch = Watch()
        client = mesh.client(token_hwm=HWM)
        # When a reader stalls again and again
        began = time.monotonic()
        mesh.run(lossy(client, watch), TIMEOUT_S)
        took_s = time.monotonic() - began
        with SyncClient(mesh.address) as observer:
            counters = observer.status()["counters"]
        grown = mesh.broker_rss_bytes() - before[0], rss_bytes(os.getpid()) - before[1]
    # Then every token is there, most of them by replay, and nobody has swollen
    total = REQUESTS * TOKENS
    print(
        f"\n{total} tokens in {took_s:.1f} s, HWM {HWM}, {watch.stalls} stalls: {1 - watch.live_tokens / total:.1%} "
        f"of the tokens dropped towards the client ({watch.frames} frames came); {client.counters.replays} replays, "
        f"{client.counters.pages} pages; worker to broker: {counters['gaps']} gaps, "
        f"{counters['replays_asked']} replays; RSS grew by {grown[0] / 2**20:.0f} MiB at the broker "
        f"and {grown[1] / 2**20:.0f} MiB at the client"
    )
    assert total >= 1_000_000
    assert watch.wrong == []
    assert watch.read == total
    assert watch.live_tokens <= total / 2
    assert max(grown) < GROWTH_BYTES
