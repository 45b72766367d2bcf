"""Random cancels on the real engine, and whether everything that a request held is free again afterwards.

python -m bench.cancels [--cancels N] [--seed N] [--threads N]

Three parts, each with so many cancels:

    accounts   the engine, driven by hand: requests are stopped before their first step, in their prompt, in their
               answer, or by a deadline. After each, llama.cpp is asked what its cache holds for every slot, and that
               has to be what our own account says; in the end nothing may be left.
    engine     an engine child with all slots taken: the time from the order to stop one until its slot is free.
               Orders are carried out in turn, so the answer to the next order shows it.
    mesh       a client, a broker and a worker: cancels while queued, in the prompt, in the answer, and deadlines;
               the time until the client has the END, and the slots that are busy afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from bench.engine import Child
from bench.figures import quantile
from bench.processes import Node
from llambo import Client, LlamboError
from llambo.mesh.service.host import physical_cores
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.messages import Sampling
from llambo.worker.config import LlamaOptions
from llambo.worker.engine import protocol as proto
from llambo.worker.llama.llama_engine import LlamaEngine
from llambo.worker.llama.loading import load

SLOTS, CONTEXT, BATCH = 8, 1024, 128
TALE = "the llama crosses a mountain in winter and sings of snow while seven birds listen to it"
WORDS = TALE.split()
#: The clock of a hand-driven engine moves on so far with each step.
STEP_MS = 10
OPTIONS = (
    Sampling(form="user", ignore_eos=True),
    Sampling(form="user", temperature=0.0, ignore_eos=True),
    Sampling(form="user", repeat_penalty=1.2, dry_multiplier=0.8, ignore_eos=True),
    Sampling(form="user", grammar='root ::= [a-z ]+ "." '),
)
#: A mesh is asked for so many answers at a time: some of them wait.
ASKED = 12
#: No cancel takes longer, and no part ends later than so long after its last.
LIMIT_S = 60.0


class AccountError(AssertionError):
    """The account is wrong."""


def prompt(chance: random.Random) -> bytes:
    """Mostly short, sometimes of many steps; many begin alike, so that prefixes are shared and copied."""
    length = chance.choice((3, 3, 10, 10, 30, 30, 100, 400))
    opening = WORDS * chance.choice((0, 0, 5)) + WORDS
    return " ".join([*opening[: chance.choice((0, len(opening)))], *chance.choices(WORDS, k=length)]).encode()


# --- accounts -----------------------------------------------------------------------------------------------


@dataclass
class Storm:
    """Counts the requests by the phase in which they ended."""

    ended: Counter[str] = field(default_factory=Counter)
    checks: int = 0
    most_cells: int = 0


def check(engine: LlamaEngine, running: int) -> int:
    """Returns the cells that running requests hold. Raises AccountError."""
    batcher = engine.batcher
    taken = [slot for slot in batcher.slots if slot.key is not None]
    if len(taken) != running or batcher.running != running:
        raise AccountError(f"{running} requests run, {len(taken)} slots are taken, {batcher.running} are counted")
    for slot in batcher.slots:
        if engine.cells(slot.number) != slot.cells:
            raise AccountError(
                f"slot {slot.number}: llama.cpp holds {engine.cells(slot.number)} cells, not {slot.cells}"
            )
    if batcher.cells != sum(slot.cells for slot in taken):
        raise AccountError(f"{batcher.cells} cells are counted for running requests")
    return batcher.cells


def storm(engine: LlamaEngine, cancels: int, seed: int) -> Storm:
    """Requests come, run for a random while and are stopped; after each the account is compared with llama.cpp's."""
    chance, result, now_ms, number = random.Random(seed), Storm(), 0, 0
    slots = len(engine.batcher.slots)
    live: dict[bytes, str] = {}
    while result.ended.total() < cancels:
        while len(live) < slots and chance.random() < 0.7:
            number += 1
            key = number.to_bytes(24, "big")
            deadline_ms = chance.randrange(1, 40) * STEP_MS if chance.random() < 0.25 else 0
            start = proto.Start(
                key, prompt(chance), 200, number, sampling=chance.choice(OPTIONS), deadline_ms=deadline_ms
            )
            refused = engine.start(start, now_ms)
            if refused is not None:
                raise AccountError(f"a slot was free, and yet: {refused.error.text}")
            live[key] = "queued"
        for key in chance.sample(sorted(live), min(len(live), chance.choice((0, 0, 0, 1, 1, 2, 4)))):
            engine.stop(key)
            result.ended[live.pop(key)] += 1
            result.most_cells = max(result.most_cells, check(engine, len(live)))
            result.checks += 1
        for _ in range(chance.choice((1, 2, 5, 10))):
            now_ms += STEP_MS
            for key, phase in live.items():
                live[key] = "in its prompt" if phase == "queued" else phase
            for output in engine.step(now_ms) if live else ():
                live[output.key] = "in its answer"
                if output.end is not None:
                    del live[output.key]
                    result.ended["by its deadline" if output.end == "deadline" else "by itself"] += 1
            check(engine, len(live))
            result.checks += 1
    for key in live:
        engine.stop(key)
    check(engine, 0)
    engine.forget()
    for slot in engine.batcher.slots:
        if engine.cells(slot.number) or slot.tokens:
            raise AccountError(f"slot {slot.number} still holds {engine.cells(slot.number)} cells when all is over")
    return result


def accounts(cancels: int, seed: int, threads: int) -> None:
    engine_options = LlamaOptions(slots=SLOTS, context=CONTEXT, batch=BATCH, threads=threads)
    engine = load(proto.Configure("llama", "smollm2", llama=engine_options), lambda progress: None)
    assert isinstance(engine, LlamaEngine)
    engine.forget()
    before = answer(engine)
    began = time.monotonic()
    result = storm(engine, cancels, seed)
    how = ", ".join(f"{count} {phase}" for phase, count in sorted(result.ended.items()))
    print(f"accounts: {result.ended.total()} requests ended ({how}), {time.monotonic() - began:.0f} s")
    print(
        f"  {result.checks} comparisons with llama.cpp's cache, no difference; at most {result.most_cells} cells in use"
    )
    same = "the same answer as before" if answer(engine) == before else "ANOTHER answer than before"
    print(f"  afterwards 0 cells in {SLOTS} slots, {same} from the empty cache")


def answer(engine: LlamaEngine) -> list[int]:
    """A greedy one, alone: it would change if something were left behind."""
    options = Sampling(form="user", temperature=0.0)
    refused = engine.start(proto.Start(bytes(24), b"Tell me a short story.", 32, 1, sampling=options), 0)
    if refused is not None:
        raise AccountError(refused.error.text)
    ids: list[int] = []
    while engine.next_wakeup_ms() == 0:
        for output in engine.step(0):
            ids += output.ids
    engine.forget()
    return ids


# --- engine -------------------------------------------------------------------------------------------------


def in_child(cancels: int, seed: int, threads: int) -> list[float]:
    """Milliseconds from the order to stop until the slot was free and given to the next."""
    chance = random.Random(seed)
    child = Child(LlamaOptions(slots=SLOTS, context=CONTEXT, batch=BATCH, threads=threads))
    live: list[bytes] = []
    took: list[float] = []

    def fill() -> None:
        while len(live) < SLOTS:
            key = random.Random(len(took) * SLOTS + len(live)).randbytes(24)
            child.order(proto.Start(key, prompt(chance), 200, 1, sampling=OPTIONS[0]))
            live.append(key)

    try:
        fill()
        while len(took) < cancels:
            for _ in range(chance.choice((0, 1, 1, 3))):
                receive(child, live)
            fill()
            victim = live.pop(chance.randrange(SLOTS))
            began = time.perf_counter()
            child.order(proto.Stop(victim))
            echo = b"\xff" * 24
            child.order(proto.Start(echo, b"", 1, 1))  # refused, as soon as the stop before it was carried out
            while not receive(child, live, echo):
                pass
            took.append((time.perf_counter() - began) * 1000)
            fill()  # a slot that were not free would refuse this
    finally:
        child.close()
    return took


def receive(child: Child, live: list[bytes], echo: bytes = b"") -> bool:
    """Whether this was the answer to the echo."""
    message = child.receive()
    if isinstance(message, proto.Refused):
        if message.key != echo:
            raise AccountError(f"a slot was free, and yet: {message.error.text}")
        return True
    for output in message.outputs if isinstance(message, proto.Step) else ():
        if output.end is not None and output.key in live:
            live.remove(output.key)
    return False


# --- mesh ---------------------------------------------------------------------------------------------------


async def one_cancel(client: Client, chance: random.Random, took: dict[str, list[float]]) -> None:
    """Ask, wait for something, cancel, and wait for the END."""
    moment = chance.choice(("asked", "accepted", "accepted", "first token", "some tokens", "deadline"))
    deadline_ms = chance.randrange(1, 1500) if moment == "deadline" else 0
    wanted = {"first token": 1, "some tokens": chance.randrange(2, 30)}.get(moment, 0)
    stream = client.stream(prompt(chance).decode(), max_tokens=200, form="user", deadline_ms=deadline_ms)
    placed = asyncio.Event()
    stream.on_place = placed.set
    try:
        if moment == "accepted":
            await placed.wait()
        tokens = 0
        while tokens < wanted and (piece := await stream.next_piece()) is not None:
            tokens += len(piece.ids)
        phase = "in its answer" if tokens else "queued or in its prompt"
        began = time.perf_counter()
        if moment != "deadline":
            await stream.cancel()
        answer = await stream.result()
    except LlamboError as error:
        if error.code is not Code.DEADLINE:
            raise
        took["by its deadline"].append(0.0)
    else:
        how = {"cancelled": phase, "deadline": "by its deadline"}.get(answer.reason, "by itself")
        took[how].append((time.perf_counter() - began) * 1000)


async def storm_of_clients(port: int, cancels: int, seed: int) -> tuple[dict[str, list[float]], float]:
    took: dict[str, list[float]] = {
        phase: [] for phase in ("queued or in its prompt", "in its answer", "by its deadline", "by itself")
    }
    chance, left = random.Random(seed), cancels

    async def asker(client: Client) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await asyncio.wait_for(one_cancel(client, chance, took), LIMIT_S)

    async with Client(f"tcp://127.0.0.1:{port}") as client:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(ASKED):
                tasks.create_task(asker(client))
        began = time.perf_counter()
        async with asyncio.timeout(LIMIT_S):
            while (found := await client.status()).busy or found.running or found.waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        if found.transcript_bytes:
            raise AccountError(f"{found.transcript_bytes} bytes of transcripts are still held")
        idle_ms = (time.perf_counter() - began) * 1000
        # All slots at a time, once more: as many as ever can be used.
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*[client.generate("Hello", max_tokens=4) for _ in range(SLOTS)])
    return took, idle_ms


def in_mesh(cancels: int, seed: int, threads: int) -> tuple[dict[str, list[float]], float]:
    engine_options = {"slots": SLOTS, "context": CONTEXT, "batch": BATCH, "threads": threads}
    with Node("broker") as broker:
        port = broker.port
        options = {"broker": f"tcp://127.0.0.1:{port}", "name": "w", "engine": "llama", "model": "smollm2"}
        with Node("worker", {**options, "llama": engine_options}):
            return asyncio.run(storm_of_clients(port, cancels, seed))


# --- all of it ----------------------------------------------------------------------------------------------


def figures(took: list[float]) -> str:
    return f"p50 {quantile(took, 0.5):.1f} ms, p99 {quantile(took, 0.99):.1f} ms, longest {max(took):.1f} ms"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cancels", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--part", choices=("accounts", "engine", "mesh"))
    options = parser.parse_args(arguments)
    wanted = (options.cancels, options.seed, options.threads)
    if options.part in (None, "accounts"):
        accounts(*wanted)
    if options.part in (None, "engine"):
        took = in_child(*wanted)
        print(f"engine: {len(took)} cancels with {SLOTS} slots taken, from the order until the slot is free:")
        print(f"  {figures(took)}", flush=True)
    if options.part in (None, "mesh"):
        phases, idle_ms = in_mesh(*wanted)
        total = sum(map(len, phases.values()))
        print(f"mesh: {total} requests, {ASKED} at a time at {SLOTS} slots, from the cancel to the END at the client:")
        for phase, ended in phases.items():
            if phase == "by its deadline":
                print(f"  {len(ended):5} {phase}")
            elif ended:
                print(f"  {len(ended):5} {phase}: {figures(ended)}")
        print(f"  afterwards no slot is busy, no request lives, no byte is held: seen {idle_ms:.0f} ms after the last")
    return 0


if __name__ == "__main__":
    sys.exit(main())
