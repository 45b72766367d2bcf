"""A conversation: each line of stdin is a question, and the model sees all that was said before it.

python examples/chat.py [tcp://127.0.0.1:7330]
"""

import sys

from llambo import LlamboError, SyncClient


def main(address: str = "") -> None:
    messages = [{"role": "system", "content": "Answer in one sentence."}]
    with SyncClient(address) as client:
        for line in sys.stdin:
            messages.append({"role": "user", "content": line.strip()})
            stream = client.stream(messages, max_tokens=64)
            for piece in stream:
                print(piece.text, end="", flush=True)
            print()
            messages.append(stream.result().message)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except LlamboError as error:
        sys.exit(f"{error.text}\n{error.hint}")
