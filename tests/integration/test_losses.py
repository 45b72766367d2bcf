"""Token planes that lose most of what they are given, and a reader that stalls: every token arrives all the same."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import zmq

from llambo import Client
from llambo.broker.config import BrokerConfig
from llambo.mesh.client.client import Stream
from llambo.mesh.client.sync_client import SyncClient
from llambo.mesh.link import sockets
from llambo.mesh.link.link import Link
from llambo.mesh.wire import limits, tokens
from llambo.testing.mesh import Mesh, timed, truth
from llambo.testing.processes import rss_bytes
from llambo.worker.config import FakeOptions, WorkerConfig

#: Frames that a socket of a token plane queues.
HWM = 10
#: What the kernel may keep for a reader. Left to itself it keeps up to 32 MiB, which is a whole stall.
KERNEL_BYTES = 64 * 2**10
REQUESTS = 8
#: After so many tokens the reader stalls until the mesh has made so many more.
READ_TOKENS = 25_000
STALL_TOKENS = 400_000
STALL_S = 30.0
#: ... which a client's lease has to allow, since its whole loop is blocked.
CONFIG = BrokerConfig.of(client_lease_ms=60_000)
TIMEOUT_S = 180.0
#: What the broker and the client may grow by while this goes through them: the answers themselves are 50 MB.
GROWTH_BYTES = 256 * 2**20


@dataclass
class Watch:
    """What came over the token plane of a client, and how its reader fared."""

    #: Tokens of each request.
    each: int
    live: int = 0
    stalls: int = 0
    read: int = 0
    stall_at: int = READ_TOKENS
    wrong: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return REQUESTS * self.each

    def on_client(self, link: Link) -> None:
        """Count what the link receives, before all other code."""
        receive = link.receive_tokens

        def receive_and_count() -> list[bytes]:
            frames = receive()
            self.live += count_tokens(frames, limits.TOPIC_BYTES)
            return frames

        link.receive_tokens = receive_and_count  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    make = sockets.token

    def make_small(*args: Any, **options: Any) -> zmq.Socket[bytes]:
        socket = make(*args, **options)
        socket.setsockopt(zmq.RCVBUF, KERNEL_BYTES)
        return socket

    monkeypatch.setattr(sockets, "token", make_small)


def count_tokens(frames: list[bytes], at: int) -> int:
    """Tokens in chunks that begin at this byte of their frames."""
    heads = (tokens.head(frame, at + tokens.KEY_END) for frame in frames if frame[at : at + 1] == tokens.CHUNK)
    return sum(count for _, count, _ in heads)


class Observer:
    """Asks the broker how far it is, from a thread of its own: the reader's whole loop is blocked meanwhile."""

    def __init__(self, address: str, total: int) -> None:
        self._address = address
        self._total = total
        self._thread = ThreadPoolExecutor(1)

    def until_made(self, more: int, timeout_s: float) -> None:
        """Until the mesh has made so many tokens more, or is done. Each look is a round trip to the broker."""
        self._thread.submit(self._watch, more, timeout_s).result()

    def _watch(self, more: int, timeout_s: float) -> None:
        with SyncClient(self._address) as client:
            target = min(made(client) + more, self._total)
            deadline = time.monotonic() + timeout_s
            while made(client) < target:
                assert time.monotonic() < deadline, f"{made(client)} tokens were made, {target} should be"

    def close(self) -> None:
        self._thread.shutdown()


def made(client: SyncClient) -> int:
    """Tokens that the broker has so far."""
    return int(client.status().counters["tokens"]) + sum(int(one.tokens) for one in client.requests())


async def read(stream: Stream, prompt: str, seed: int, observer: Observer, watch: Watch) -> None:
    ids: list[int] = []
    while (piece := await stream.next_piece()) is not None:
        ids += piece.ids
        watch.read += len(piece.ids)
        if watch.read >= watch.stall_at:
            watch.stall_at = watch.read + READ_TOKENS
            watch.stalls += 1
            observer.until_made(STALL_TOKENS, STALL_S)
    if ids != truth(prompt, seed, watch.each):
        watch.wrong.append(prompt)


async def lossy(client: Client, watch: Watch) -> None:
    observer = Observer(client.address, watch.total)
    async with client, asyncio.TaskGroup() as group:
        assert client._shell is not None
        watch.on_client(client._shell._link)
        for number in range(REQUESTS):
            stream = client.stream(f"prompt {number}", max_tokens=watch.each, seed=number)
            group.create_task(read(stream, f"prompt {number}", number, observer, watch))
    observer.close()


def test_a_million_tokens_most_of_them_dropped() -> None:
    # Given a token plane towards clients that queues next to nothing
    fake = FakeOptions(slots=REQUESTS // 2, burst=2)
    with Mesh(workers=2, fake=fake, config=CONFIG, broker="process", token_hwm=HWM) as mesh:
        before = mesh.broker_rss_bytes(), rss_bytes(os.getpid())
        watch, client = Watch(limits.MAX_TOKENS), mesh.client(token_hwm=HWM)
        # When a reader stalls again and again
        with timed() as seconds:
            mesh.run(lossy(client, watch), TIMEOUT_S)
            took_s = seconds()
        grown = mesh.broker_rss_bytes() - before[0], rss_bytes(os.getpid()) - before[1]
    # Then every token is there, most of them by replay, and no process has grown
    dropped = 1 - watch.live / watch.total
    print(
        f"\n{watch.total} tokens in {took_s:.1f} s, HWM {HWM}, {watch.stalls} stalls: {dropped:.1%} dropped; "
        f"{client.counters.replays} replays, {client.counters.pages} pages; "
        f"RSS grew by {grown[0] / 2**20:.0f} MiB at the broker and {grown[1] / 2**20:.0f} MiB at the client"
    )
    assert (watch.wrong, watch.read) == ([], watch.total)
    assert watch.total >= 1_000_000
    assert dropped >= 0.5
    assert max(grown) < GROWTH_BYTES


def test_losses_at_every_end_at_a_time() -> None:
    # Given token planes that queue next to nothing, from the workers and towards the client
    fake, worker = FakeOptions(slots=REQUESTS // 2, burst=2), WorkerConfig(token_hwm=HWM)
    with Mesh(workers=2, fake=fake, worker=worker, config=CONFIG, token_hwm=HWM) as mesh:
        watch, client, at_broker = Watch(limits.MAX_TOKENS // 4), mesh.client(token_hwm=HWM), [0]
        count_at_broker(mesh, at_broker)
        mesh.run(lossy(client, watch), TIMEOUT_S)
        asked = mesh.counter("replays_asked")
    # Then what the broker missed and what the client missed has been sent again, each by its own neighbour
    lost = [1 - live / watch.total for live in (at_broker[0], watch.live)]
    print(
        f"\n{watch.total} tokens: {lost[0]:.1%} dropped by the workers ({asked} replays), "
        f"{lost[1]:.1%} by the broker ({client.counters.replays} replays)"
    )
    assert (watch.wrong, watch.read) == ([], watch.total)
    assert min(asked, client.counters.replays) > 0


def count_at_broker(mesh: Mesh, live: list[int]) -> None:
    assert mesh.thread is not None
    server = mesh.thread.server
    drain = server._drain_tokens

    def drain_and_count() -> list[bytes]:
        frames = drain()
        live[0] += count_tokens(frames, 0)
        return frames

    server._drain_tokens = drain_and_count  # type: ignore[method-assign]
