"""The second turn of a chat of some 2,000 tokens, on the same worker: how soon its first token comes.

The first turn computes the whole prompt. The second one sends all of it again, with the answer and one more
question: what the worker still has in its cache need not be computed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

from bench.figures import quantile
from bench.mesh import mesh
from bench.newcomer import sized
from bench.streams import CHANCE
from llambo import Client
from llambo.mesh.client.client import Answer
from llambo.mesh.service import host
from llambo.worker.config import LlamaOptions

SLOTS, CONTEXT = 4, 4096

Message = dict[str, str]


async def turn(client: Client, chat: list[Message], tokens: int) -> tuple[float, Answer]:
    """Milliseconds to the first token, and the answer."""
    begun, first_ms = time.perf_counter(), 0.0
    stream = client.stream(json.dumps(chat), form="messages", max_tokens=tokens, sampling=dict(CHANCE), seed=1)
    async for _ in stream:
        first_ms = first_ms or (time.perf_counter() - begun) * 1000
    assert stream.answer is not None, "the stream ended without an answer"
    return first_ms, stream.answer


async def chats(address: str, count: int, prompt_tokens: int, tokens: int) -> list[tuple[float, float, Answer, Answer]]:
    found = []
    async with Client(address) as client:
        for number in range(count):
            text = await sized(client, prompt_tokens, 100 + number)
            chat = [{"role": "user", "content": f"{text}\nWhat is this text about?"}]
            first_ms, answer = await turn(client, chat, tokens)
            chat += [
                {"role": "assistant", "content": answer.text},
                {"role": "user", "content": "Who carried the salt?"},
            ]
            second_ms, second = await turn(client, chat, tokens)
            found.append((first_ms, second_ms, answer, second))
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench turns", description=__doc__)
    parser.add_argument("--chats", type=int, default=10)
    parser.add_argument("--prompt-tokens", type=int, default=2_000)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--threads", type=int, default=host.physical_cores())
    options = parser.parse_args(arguments)
    with mesh(LlamaOptions(slots=SLOTS, context=CONTEXT, threads=options.threads)) as ours:
        found = asyncio.run(chats(ours.address, options.chats, options.prompt_tokens, options.tokens))
    first, second = [one[0] for one in found], [one[1] for one in found]
    ratios = [after / before for before, after in zip(first, second, strict=True)]
    sizes = [(one[2].usage.prompt_tokens, one[3].usage.prompt_tokens, one[3].usage.cached_tokens) for one in found]
    print(f"turns: {len(found)} chats, {options.threads} threads; tokens of the first one: {sizes[0][0]} in its first "
          f"turn, {sizes[0][1]} in its second, {sizes[0][2]} of them cached")  # fmt: skip
    print("  first token, ms     p50      max")
    for name, values in (("first turn", first), ("second turn", second)):
        print(f"  {name:<14} {quantile(values, 0.5):>8.1f} {max(values):>8.1f}")
    print(f"  {'ratio':<14} {quantile(ratios, 0.5):>8.3f} {max(ratios):>8.3f}     aim: at most 0.2")
    return 0
