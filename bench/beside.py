"""The whole mesh beside other servers of the same model: llama-server, and the server of llama-cpp-python.

Streams go from a real client through broker, agent and engine child and back. The others are asked over HTTP. Same
file, threads, context, slots and sampling; by turns (A B C, A B C, ...); what counts is the median of the ratios.
Beside them stands the engine child alone, without agent, broker and client.

With a library that was compiled on this machine, the first time compiles llama-server, too, which takes minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

from bench import engine
from bench.mesh import MODEL, Mesh, has_safe_settings, mesh
from bench.neighbours import Terms, is_compiled, llama_server, python_server
from bench.streams import (
    HttpStream,
    Summary,
    Timed,
    http_round,
    llama_server_stream,
    mesh_round,
    prompt,
    python_server_stream,
    summary,
)
from llambo import Client
from llambo.mesh.service import host
from llambo.worker.config import LlamaOptions
from llambo.worker.llama import binding
from llambo.worker.models import model_files

STREAMS = (1, 4, 8, 16)
SLOTS, CONTEXT = 16, 1024
MESH, SERVER, PYTHON, ALONE = "mesh", "llama-server", "llama-cpp-python", "engine child"
#: It serves one at a time: with more streams than this it only queues.
PYTHON_STREAMS = (1, 4)

Rounds = dict[tuple[str, int], list[Summary]]
Round = Callable[[int, int], Awaitable[list[Timed]]]


def over_mesh(client: Client, tokens: int) -> Round:
    return lambda turn, streams: mesh_round(client, turn, streams, tokens)


def over_http(open_stream: Callable[..., HttpStream], port: int, tokens: int, **more: object) -> Round:
    async def round_of(turn: int, streams: int) -> list[Timed]:
        made = [open_stream(port, prompt(turn, n), tokens, n + 1, **more) for n in range(streams)]
        return await asyncio.to_thread(http_round, made)

    return round_of


async def measure(runners: dict[str, Round], counts: list[int], rounds: int) -> Rounds:
    found: Rounds = {}
    names = list(runners)
    turn = 0
    for number in range(rounds):
        for streams in counts:
            # Who comes first changes: the first one finds the machine as the others left it.
            for name in names[number % len(names) :] + names[: number % len(names)]:
                if name == PYTHON and streams not in PYTHON_STREAMS:
                    continue
                turn += 1
                found.setdefault((name, streams), []).append(summary(await runners[name](turn, streams)))
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


async def compare(options: argparse.Namespace, stack: ExitStack) -> Rounds:
    engine_options = LlamaOptions(slots=SLOTS, context=CONTEXT, threads=options.threads)
    ours = stack.enter_context(mesh(engine_options))
    tokens = options.tokens
    async with Client(ours.address) as client:
        safe = await has_safe_settings(client)
        path = model_files.find(MODEL)
        terms = Terms(path, SLOTS, CONTEXT, options.threads, safe, options.server_flags.split())
        repacking = "no repacking" if safe else "repacking allowed"
        shape = f"{options.threads} threads, {SLOTS} slots of {CONTEXT}, {tokens} tokens a stream, {repacking}"
        print(f"beside: SmolLM2-135M Q4_1, {binding.find()}, {shape}")

        runners = {MESH: over_mesh(client, tokens)}
        if SERVER in options.beside:
            server = stack.enter_context(llama_server(terms))
            runners[SERVER] = over_http(llama_server_stream, server.port, tokens)
        if ALONE in options.beside:
            child = engine.Child(engine_options)
            stack.callback(child.close)

            async def of_child(turn: int, streams: int) -> list[Timed]:
                return await asyncio.to_thread(engine.round_of, child, streams, tokens, turn)

            runners[ALONE] = of_child
        if PYTHON in options.beside and is_compiled() and not safe:
            python = stack.enter_context(python_server(terms))
            runners[PYTHON] = over_http(python_server_stream, python.port, tokens)
        await measure(runners, [1], 1)  # everything once, so that nothing is done for the first time below
        found = await measure(runners, options.streams, options.rounds)
        if options.profile:
            await profile(ours, client, options.streams, tokens)
        return found


async def profile(ours: Mesh, client: Client, counts: list[int], tokens: int) -> None:
    """Where the processor time of a token goes."""
    print("  processor time for a token, us:  streams   engine   agent  broker  client   of two cores idle")
    for streams in counts:
        before, mine, wall = ours.cpu_s(), time.process_time(), time.perf_counter()
        timed = await mesh_round(client, 1_000 + streams, streams, tokens)
        after, mine, wall = ours.cpu_s(), time.process_time() - mine, time.perf_counter() - wall
        made = sum(stream.tokens for stream in timed)
        used = {name: (after[name] - before[name]) * 1e6 / made for name in after} | {"client": mine * 1e6 / made}
        idle = 1 - sum(used.values()) * made / 1e6 / wall / host.physical_cores()
        row = f"{used['engine']:>8.0f}{used['agent']:>8.0f}{used['broker']:>8.0f}{used['client']:>8.0f}"
        print(f"  {'':<33}{streams:>7}  {row}   {idle:>8.1%}")


def report(found: Rounds, counts: list[int]) -> None:
    names = [name for name in (MESH, ALONE, SERVER, PYTHON) if any(who == name for who, _ in found)]
    print("                              tokens/s   ratio   first token, ms    between tokens, ms")
    print("  streams                                        p50     p99        p50     p99")
    for streams in counts:
        for name in names:
            rounds = found.get((name, streams))
            if rounds:
                print(f"  {streams:>7}  {name:<18} {row(rounds, found.get((SERVER, streams)))}")
    print("  ratio: to llama-server, the median of the rounds. Aim: 1.0 at 4, 8 and 16 streams, 0.98 at 1")


def row(rounds: list[Summary], beside: list[Summary] | None) -> str:
    per_s = statistics.median(one.per_s for one in rounds)
    ratio = (
        statistics.median(a.per_s / b.per_s for a, b in zip(rounds, beside, strict=True)) if beside else float("nan")
    )
    times = [
        statistics.median(values) for values in zip(*((*one.first_ms, *one.gap_ms) for one in rounds), strict=True)
    ]
    first50, first99, gap50, gap99 = times
    return f"{per_s:>8.1f}  {ratio:>6.3f}  {first50:>6.0f}  {first99:>6.0f}   {gap50:>8.1f}  {gap99:>6.1f}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench beside", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="of each stream")
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    parser.add_argument("--threads", type=int, default=host.physical_cores())
    parser.add_argument("--beside", nargs="*", default=[ALONE, SERVER, PYTHON], choices=[ALONE, SERVER, PYTHON])
    parser.add_argument("--server-flags", default="", help="more flags for llama-server, in one word")
    parser.add_argument("--profile", action="store_true", help="say where the processor time goes")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        report(asyncio.run(compare(options, stack)), options.streams)
    return 0
