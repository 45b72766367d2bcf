"""`kill -9` of one of three workers in the middle of 200 streams, again and again: the agent and the engine child by
turns. No client may see an error, every token must be the correct one (fake engines compute the same tokens),
and no process may be left over. A client does notice a stall, and that is measured.

Real processes, the real Python client, each token looked at.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from bench.figures import quantile
from bench.processes import Node
from llambo import Client, LlamboError, Piece
from llambo.testing.mesh import truth
from llambo.testing.processes import children, has_ended

WORKERS = 3
KINDS = ("agent", "engine", "both")
#: A stream's usual pace, and how many tokens it has: about as long as a restart of a worker takes.
TOKENS_PER_S = 20.0
TOKENS = 50
#: No round lasts longer.
ROUND_S = 60.0


@dataclass
class Watched:
    """One stream, as its reader saw it."""

    ids: list[int] = field(default_factory=list)
    moves: int = 0
    last_at: float = 0.0
    longest_s: float = 0.0
    wrong: str = ""

    def see(self, piece: Piece) -> None:
        now = time.perf_counter()
        if self.last_at:
            self.longest_s = max(self.longest_s, now - self.last_at)
        self.last_at = now
        if piece.index != len(self.ids):
            self.wrong = f"index {piece.index} after {len(self.ids)} tokens"
        self.ids += piece.ids


@dataclass
class Outcome:
    """What all rounds together gave."""

    streams: int = 0
    errors: list[str] = field(default_factory=list)
    lost: int = 0
    duplicated: int = 0
    wrong: int = 0
    orphans: list[int] = field(default_factory=list)
    #: By what was killed: how much longer than usual a stream that moved stood still.
    stalls_ms: dict[str, list[float]] = field(default_factory=lambda: {what: [] for what in KINDS})
    seconds: float = 0.0

    @property
    def violations(self) -> int:
        return len(self.errors) + self.lost + self.duplicated + self.wrong + len(self.orphans)


class Fleet:
    """The workers' processes, and every process that was ever theirs."""

    def __init__(self, port: int, streams: int) -> None:
        self.seen: set[int] = set()
        # Two workers must be able to carry everything.
        fake = {"slots": streams, "tokens_per_s": TOKENS_PER_S}
        self._options = {"broker": f"tcp://127.0.0.1:{port}", "fake": fake}
        self._stack = ExitStack()
        self.workers = [self._start(number) for number in range(WORKERS)]
        for number in range(WORKERS):
            self._ready(number)

    def _start(self, number: int) -> Node:
        node = self._stack.enter_context(Node("worker", {**self._options, "name": f"w{number}"}, wait=False))
        self.seen.add(node.pid)
        return node

    def _ready(self, number: int) -> None:
        node = self.workers[number]
        node.ready()
        self.seen.update(children(node.pid))

    def kill(self, number: int, what: str) -> int:
        """Returns the engine child, which must not outlive either."""
        node = self.workers[number]
        (engine,) = children(node.pid)
        self.seen.add(engine)
        # The agent is killed, or the engine, or both at once: then neither can react to the end of the other.
        for pid in {"agent": [node.pid], "engine": [engine], "both": [node.pid, engine]}[what]:
            with suppress(ProcessLookupError):  # an engine ends by itself when its agent is gone
                os.kill(pid, signal.SIGKILL)
        return engine

    def restart(self, number: int) -> None:
        """A new process in place of an agent that was killed. It has joined when this returns."""
        self.workers[number].kill()
        self.workers[number] = self._start(number)
        self._ready(number)

    def note_children(self) -> None:
        for node in self.workers:
            self.seen.update(children(node.pid))

    def close(self) -> list[int]:
        """End all of them; returns the processes that still run after that."""
        self.note_children()
        self._stack.close()
        return [pid for pid in self.seen if not has_ended(pid)]


class Middle:
    """Set when all streams together are a third of the way."""

    def __init__(self, tokens: int) -> None:
        self.reached = asyncio.Event()
        self._left = tokens

    def count(self, tokens: int) -> None:
        self._left -= tokens
        if self._left <= 0:
            self.reached.set()


async def watch(client: Client, number: int, middle: Middle) -> Watched:
    """Read one stream to its end, and compare it with the truth."""
    seed, prompt = number + 1, f"stream {number}"
    watched = Watched()
    stream = client.stream(prompt, seed=seed, max_tokens=TOKENS)
    try:
        async for piece in stream:
            watched.see(piece)
            middle.count(len(piece.ids))
    except LlamboError as error:
        watched.wrong = f"{error.code}: {error.text}"
    if stream.answer is not None:
        watched.moves = stream.answer.moves
    expected = truth(prompt, seed, TOKENS)
    if not watched.wrong and watched.ids != expected:
        watched.wrong = difference(watched.ids, expected)
    return watched


def difference(ids: list[int], expected: list[int]) -> str:
    if len(set(ids)) < len(ids):
        return "duplicated"
    return "lost" if set(ids) < set(expected) else "wrong tokens"


async def one_round(client: Client, fleet: Fleet, kill: int, streams: int, outcome: Outcome) -> None:
    """All streams begin, in their middle one worker dies, all streams end, and the worker is there again."""
    victim, what = kill % WORKERS, KINDS[kill % len(KINDS)]
    middle = Middle(streams * TOKENS // 3)
    async with asyncio.timeout(ROUND_S), asyncio.TaskGroup() as tasks:
        watching = [tasks.create_task(watch(client, kill * streams + n, middle)) for n in range(streams)]
        await middle.reached.wait()
        engine = fleet.kill(victim, what)
        if what != "engine":
            await asyncio.to_thread(fleet.restart, victim)
    if not has_ended(engine):
        outcome.orphans.append(engine)
    for task in watching:
        count(outcome, task.result(), what)
    await all_ready(client)


def count(outcome: Outcome, stream: Watched, what: str) -> None:
    outcome.streams += 1
    match stream.wrong:
        case "":
            pass
        case "lost":
            outcome.lost += 1
        case "duplicated":
            outcome.duplicated += 1
        case "wrong tokens":
            outcome.wrong += 1
        case error:
            outcome.errors.append(error)
    if stream.moves:
        outcome.stalls_ms[what].append(max(0.0, stream.longest_s - 1 / TOKENS_PER_S) * 1000)


async def all_ready(client: Client) -> None:
    """An engine that was killed is restarted by its agent: the next round waits until all workers are ready."""
    async with asyncio.timeout(ROUND_S):
        while (await client.status()).ready < WORKERS:  # noqa: ASYNC110  # the broker can only be asked
            await asyncio.sleep(0.05)


async def all_rounds(port: int, kills: int, streams: int, outcome: Outcome, progress: bool) -> None:
    fleet = await asyncio.to_thread(Fleet, port, streams)
    try:
        async with Client(f"tcp://127.0.0.1:{port}") as client:
            await all_ready(client)
            for kill in range(kills):
                await one_round(client, fleet, kill, streams, outcome)
                if progress and (kill + 1) % 10 == 0:
                    print(f"  {kill + 1} kills, {outcome.violations} violations", file=sys.stderr, flush=True)
    finally:
        outcome.orphans += fleet.close()


def run(kills: int, streams: int, *, progress: bool = False) -> Outcome:
    outcome = Outcome()
    begun = time.monotonic()
    with Node("broker") as broker:
        asyncio.run(all_rounds(broker.port, kills, streams, outcome, progress))
    outcome.seconds = time.monotonic() - begun
    return outcome


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--streams", type=int, default=200)
    options = parser.parse_args(arguments)
    outcome = run(options.kills, options.streams, progress=True)
    report(outcome, options.kills, options.streams)
    return 1 if outcome.violations else 0


def report(outcome: Outcome, kills: int, streams: int) -> None:
    print(f"kills: {kills} x kill -9 of one of {WORKERS} workers amid {streams} streams, {', '.join(KINDS)} by turns")
    moved = sum(map(len, outcome.stalls_ms.values()))
    print(f"  {outcome.streams} streams of {TOKENS} tokens, {moved} of them moved; {outcome.seconds:.0f} s")
    print(
        f"  {len(outcome.errors)} client errors, {outcome.lost} lost, {outcome.duplicated} duplicated, "
        f"{outcome.wrong} wrong, {len(outcome.orphans)} orphan processes"
    )
    for what, stalls in outcome.stalls_ms.items():
        half, most = quantile(stalls, 0.5), quantile(stalls, 0.99)
        print(f"  stall of a stream that moved, {what} killed: median {half:.0f} ms, p99 {most:.0f} ms")
    for error in outcome.errors[:10]:
        print(f"  ! {error}")
