"""The same without asyncio.

python examples/sync.py [tcp://127.0.0.1:7330] [PROMPT]
"""

import sys

from llambo import LlamboError, SyncClient


def main(address: str = "tcp://127.0.0.1:7330", prompt: str = "What is AI?") -> None:
    with SyncClient(address) as client:
        # As it comes; leaving the loop early, or Ctrl-C, cancels the request.
        for piece in client.stream(prompt, max_tokens=64):
            print(piece.text, end="", flush=True)
        print()
        # Or all at once.
        answer = client.generate(prompt, max_tokens=64)
        print(f"{len(answer.ids)} tokens from {answer.worker}, ended for: {answer.reason}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except LlamboError as error:
        sys.exit(f"{error.text}\n{error.hint}")
