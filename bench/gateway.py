"""What HTTP costs: the gateway beside the mesh itself, and beside llama-server's own HTTP.

On SmolLM2 all three get the same prompts by turns, the two over HTTP in the same words (`/v1/completions`). Then
the same without a model, as fast as it goes, for what a token costs the gateway; and how much it keeps for a stream.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

from bench.beside import MESH, SERVER, Rounds, measure, over_http, over_mesh
from bench.mesh import MODEL, has_safe_settings, mesh
from bench.neighbours import Terms, llama_server
from bench.processes import Node
from bench.streams import HttpStreams, openai_stream, prompt
from llambo import Client
from llambo.mesh.service import host
from llambo.testing.processes import cpu_s
from llambo.worker.config import FakeOptions, LlamaOptions
from llambo.worker.models import model_files

STREAMS = (1, 8, 32)
SLOTS, CONTEXT = 32, 512
HTTP = "gateway"
#: The fake engine's streams are so many times longer: a token takes it no time.
FAKE_FACTOR = 16
#: Of each stream that is kept open; slow enough that a thousand of them leave the machine idle.
OPEN_TOKENS_PER_S, OPEN_TOKENS = 4.0, 1_000
#: How many of its tokens each has had when the memory is read for the second time.
LATER = 8


# --- on a model ----------------------------------------------------------------------------------------


async def on_a_model(options: argparse.Namespace, stack: ExitStack) -> Rounds:
    engine_options = LlamaOptions(slots=SLOTS, context=CONTEXT, threads=options.threads)
    ours = stack.enter_context(mesh(engine_options))
    door = stack.enter_context(Node("gateway", {"broker": ours.address}))
    async with Client(ours.address) as client:
        safe = await has_safe_settings(client)
        shape = f"{options.threads} threads, {SLOTS} slots of {CONTEXT}, {options.tokens} tokens a stream"
        print(f"gateway: SmolLM2-135M Q4_1, {shape}")
        tokens = options.tokens
        runners = {MESH: over_mesh(client, tokens), HTTP: over_http(openai_stream, door.port, tokens)}
        if not options.alone:
            server = stack.enter_context(
                llama_server(Terms(model_files.find(MODEL), SLOTS, CONTEXT, options.threads, safe))
            )
            chain = ["top_k", "top_p", "min_p", "temperature"]
            runners[SERVER] = over_http(openai_stream, server.port, tokens, samplers=chain, cache_prompt=False)
        await measure(runners, [1], 1)  # everything once, so that nothing is done for the first time below
        return await measure(runners, options.streams, options.rounds)


# --- without one ---------------------------------------------------------------------------------------


@contextmanager
def fake(engine_options: FakeOptions) -> Iterator[tuple[str, Node]]:
    """A mesh of one fake engine: its address, and the gateway before it."""
    with Node("broker") as broker:
        address = broker.address
        worker = {"broker": address, "name": "fake", "engine": "fake", "fake": asdict(engine_options)}
        with Node("worker", worker), Node("gateway", {"broker": address}) as door:
            yield address, door


async def without_a_model(options: argparse.Namespace) -> tuple[Rounds, dict[int, float]]:
    """The rounds, and the gateway's processor time for a token in microseconds, by the number of streams."""
    tokens, cost = options.tokens * FAKE_FACTOR, {}
    with fake(FakeOptions(slots=SLOTS)) as (address, door):
        async with Client(address) as client:
            runners = {MESH: over_mesh(client, tokens), HTTP: over_http(openai_stream, door.port, tokens)}
            await measure(runners, [1], 1)
            found = await measure(runners, options.streams, options.rounds)
            for streams in options.streams:
                before = cpu_s(door.pid)
                timed = await runners[HTTP](1_000, streams)
                cost[streams] = (cpu_s(door.pid) - before) * 1e6 / sum(stream.tokens for stream in timed)
    return found, cost


def kept_open(streams: int) -> tuple[int, int, int]:
    """Bytes of the gateway: before there was a stream, with all of them begun, and some tokens later."""
    engine_options = FakeOptions(slots=streams, tokens_per_s=OPEN_TOKENS_PER_S)
    with fake(engine_options) as (_, door):
        reader, port = HttpStreams(), door.port
        first = openai_stream(port, prompt(0, 0), 1, 1)
        reader.add(first)
        while reader.turn():
            pass
        before = door.rss_bytes()
        made = [openai_stream(port, prompt(1, n), OPEN_TOKENS, n + 1) for n in range(streams)]
        timed = [reader.add(stream) for stream in made]
        found = []
        for tokens in (1, LATER):
            while min(stream.tokens for stream in timed) < tokens:
                reader.turn()
            found.append(door.rss_bytes())
        for stream in made:
            stream.close()
    return before, found[0], found[1]


# --- report -------------------------------------------------------------------------------------------


def report(found: Rounds, counts: list[int], cost: dict[int, float] | None = None) -> None:
    names = [name for name in (MESH, HTTP, SERVER) if any(who == name for who, _ in found)]
    print("                         tokens/s   to bus   to llama-server   first token, ms    between tokens, ms")
    print("  streams                                                       p50     p99        p50     p99")
    for streams in counts:
        for name in names:
            rounds = found[name, streams]
            per_s = statistics.median(one.per_s for one in rounds)
            times = zip(*((*one.first_ms, *one.gap_ms) for one in rounds), strict=True)
            first50, first99, gap50, gap99 = [statistics.median(values) for values in times]
            ratios = f"{ratio(found, name, MESH, streams):>7}  {ratio(found, name, SERVER, streams):>16}"
            more = f"   {cost[streams]:.0f} us of the gateway for a token" if cost and name == HTTP else ""
            print(f"  {streams:>7}  {name:<13} {per_s:>9.1f}  {ratios}  {first50:>7.1f} {first99:>7.1f}   "
                  f"{gap50:>8.2f} {gap99:>7.2f}{more}")  # fmt: skip


def ratio(found: Rounds, name: str, beside: str, streams: int) -> str:
    """Of tokens a second: the median of the rounds."""
    if name == beside or (beside, streams) not in found:
        return ""
    pairs = zip(found[name, streams], found[beside, streams], strict=True)
    return f"{statistics.median(one.per_s / other.per_s for one, other in pairs):.3f}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench gateway", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="of each stream")
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    parser.add_argument("--threads", type=int, default=host.physical_cores())
    parser.add_argument("--open", type=int, default=1_000, help="streams that are kept open")
    parser.add_argument("--alone", action="store_true", help="without llama-server, which has to be built")
    parser.add_argument("--no-model", action="store_true", help="only what needs no model")
    options = parser.parse_args(arguments)
    if not options.no_model:
        with ExitStack() as stack:
            report(asyncio.run(on_a_model(options, stack)), options.streams)
    print(f"gateway: fake engine, as fast as it goes, {options.tokens * FAKE_FACTOR} tokens a stream")
    found, cost = asyncio.run(without_a_model(options))
    report(found, options.streams, cost)
    before, begun, later = kept_open(options.open)
    mib = [f"{value / 2**20:.1f} MiB" for value in (before, begun, later)]
    each = [f"{(value - before) / 1024 / options.open:.1f}" for value in (begun, later)]
    print(f"gateway: {options.open} streams kept open: {mib[0]} before, {mib[1]} with all of them begun, "
          f"{mib[2]} {LATER} tokens later: {each[0]} and {each[1]} KiB a stream")  # fmt: skip
    return 0
