"""Seven streams run, then a prompt of 8,000 tokens arrives: how much longer they wait between tokens.

First in the mesh, then beside it llama-server in the same situation: same file, threads, slots and context. The gaps
between the tokens of the seven are counted before the newcomer, and from its arrival to its own first token.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass

from bench.figures import quantile
from bench.mesh import has_safe_settings, mesh
from bench.neighbours import Terms, llama_server
from bench.streams import CHANCE, HttpStreams, Timed, llama_server_stream, mesh_stream, prompt
from llambo import Client
from llambo.mesh.service import host
from llambo.worker.config import LlamaOptions
from llambo.worker.models import model_files

RUNNING = 7
SLOTS, CONTEXT = 8, 8192
#: Some 30 tokens of text that says something new each time.
SENTENCE = "In year {n} the old llama carried {n} sacks of salt over the pass, and no one in the valley thanked it. "
#: The length of the seven running answers: they take longer than the prompt.
ENDLESS = 6_000
#: Of the seven's tokens before the prompt arrives, the first few of each are not counted.
SETTLING = 10
#: Sentences whose tokens are counted to know how many make a prompt of a given length.
COUNTED = 4
#: How often is looked whether they are so far.
POLL_S = 0.02


@dataclass(frozen=True)
class Seen:
    """Milliseconds: gaps of the seven before and while the newcomer waits, and how long that is."""

    before: list[float]
    during: list[float]
    waited: float
    prompt_tokens: int

    @property
    def ratio(self) -> float:
        return quantile(self.during, 0.99) / quantile(self.before, 0.99)


def seen(streams: list[Timed], newcomer: Timed, prompt_tokens: int) -> Seen:
    before: list[float] = []
    during: list[float] = []
    settled = max(stream.arrivals[SETTLING] for stream in streams)
    for stream in streams:
        before += stream.gaps_ms(settled, newcomer.started)
        during += stream.gaps_ms(newcomer.started, newcomer.arrivals[0])
        # One that stood still all the time has no token in it: its wait counts all the same.
        last = max(at for at in stream.arrivals if at < newcomer.arrivals[0])
        during.append((newcomer.arrivals[0] - last) * 1000)
    return Seen(before, during, newcomer.first_ms, prompt_tokens)


def sentences(count: int, seed: int) -> str:
    return "".join(SENTENCE.format(n=1000 + (seed * 977 + n * 13) % 9000) for n in range(count))


async def sized(client: Client, tokens: int, seed: int) -> str:
    """A text of about so many tokens and not more: found out by asking for the length of a short one."""
    answer = await client.generate(sentences(COUNTED, seed + 1), max_tokens=1, form="text")
    return sentences(int(tokens / (answer.usage.prompt_tokens / COUNTED)), seed)


# --- the mesh ------------------------------------------------------------------------------------------


async def in_mesh(client: Client, text: str, turn: int, before: int) -> Seen:
    running = [Timed() for _ in range(RUNNING)]
    tasks = [
        asyncio.create_task(mesh_stream(client, prompt(turn, n), ENDLESS, n + 1, timed))
        for n, timed in enumerate(running)
    ]
    try:
        # An event would put us into each of their steps.
        while min(timed.tokens for timed in running) < before:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        newcomer = Timed(time.perf_counter())
        stream = client.stream(text, max_tokens=1, form="text", sampling={**CHANCE, "ignore_eos": True}, seed=1)
        answer = await stream.result()
        newcomer.arrivals.append(time.perf_counter())
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
    return seen(running, newcomer, answer.usage.prompt_tokens)


# --- llama-server --------------------------------------------------------------------------------------


def in_server(port: int, text: str, prompt_tokens: int, turn: int, before: int) -> Seen:
    reader = HttpStreams()
    asked = [llama_server_stream(port, prompt(turn, n), ENDLESS, n + 1) for n in range(RUNNING)]
    running = [reader.add(stream) for stream in asked]
    while min(len(timed.arrivals) for timed in running) < before:
        reader.turn()
    newcomer = reader.add(llama_server_stream(port, text, 1, 1))
    while not newcomer.arrivals:
        reader.turn()
    for stream in asked:
        stream.close()  # which cancels it
    return seen(running, newcomer, prompt_tokens)


async def compare(options: argparse.Namespace) -> dict[str, list[Seen]]:
    engine_options = LlamaOptions(slots=SLOTS, context=CONTEXT, threads=options.threads)
    found: dict[str, list[Seen]] = {"mesh": []}
    with mesh(engine_options) as ours:
        async with Client(ours.address) as client:
            safe = await has_safe_settings(client)
            texts = [await sized(client, options.tokens, turn) for turn in range(options.rounds)]
            for turn, text in enumerate(texts):
                found["mesh"].append(await in_mesh(client, text, turn, options.before))
    if options.alone:
        return found
    terms = Terms(model_files.find("smollm2"), SLOTS, CONTEXT, options.threads, safe, options.server_flags.split())
    with llama_server(terms) as server:
        for turn, text in enumerate(texts):
            tokens = found["mesh"][turn].prompt_tokens
            seen_there = in_server(server.port, text, tokens, turn, options.before)
            found.setdefault("llama-server", []).append(seen_there)
    return found


def report(found: dict[str, list[Seen]]) -> None:
    print("                  between tokens of the seven, ms                       first token of")
    print("                  before: p50    p99   during: p50    p99    max  ratio   the newcomer, s")
    for name, runs in found.items():
        for one in runs:
            before, during = ([quantile(gaps, share) for share in (0.5, 0.99)] for gaps in (one.before, one.during))
            print(f"  {name:<14} {before[0]:>12.1f} {before[1]:>6.1f} {during[0]:>13.1f} {during[1]:>6.1f}"
                  f" {max(one.during):>6.0f} {one.ratio:>6.2f} {one.waited / 1000:>10.1f}")  # fmt: skip
    print("  ratio: of the p99. Aim: at most 3")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench newcomer", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8_000, help="of the newcomer's prompt")
    parser.add_argument("--before", type=int, default=100, help="tokens of each of the seven before it arrives")
    parser.add_argument("--threads", type=int, default=host.physical_cores())
    parser.add_argument("--alone", action="store_true", help="without llama-server")
    parser.add_argument("--server-flags", default="", help="more flags for llama-server, in one word")
    options = parser.parse_args(arguments)
    found = asyncio.run(compare(options))
    size = found["mesh"][0].prompt_tokens
    print(f"newcomer: a prompt of {size} tokens beside {RUNNING} streams, {options.threads} threads")
    report(found)
    return 0
