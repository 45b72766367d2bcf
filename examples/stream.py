"""Stream an answer with asyncio.

python examples/stream.py [tcp://127.0.0.1:7330] [PROMPT]
"""

import asyncio
import sys

from llambo import Client, LlamboError


async def main(address: str = "tcp://127.0.0.1:7330", prompt: str = "What is AI?") -> None:
    async with Client(address) as client:
        stream = client.stream(prompt, max_tokens=64)
        async for piece in stream:
            print(piece.text, end="", flush=True)
        print()
        answer = await stream.result()
        print(f"{len(answer.ids)} tokens from {answer.worker}, ended for: {answer.reason}")


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except LlamboError as error:
        sys.exit(f"{error.text}\n{error.hint}")
