"""A mesh on this machine, an answer, and a worker that is killed in the middle of the next one.

    make demo

It takes some seconds and leaves nothing behind. Everything here is what a person would type, save for `kill -9`
at just the right moment.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue

from llambo import SyncClient

PROMPT, SEED, TOKENS = "Tell me a short story about a llama.", 7, 80
#: The worker is killed when so many bytes of the answer are here: about a third of it.
KILL_AFTER_BYTES = 130
LIMIT_S = 60.0


def main() -> int:
    step("A broker and two workers with SmolLM2, a chat model of 98 MB.")
    with mesh() as (address, http, lines):
        step("An answer, streamed through the broker.")
        undisturbed = ask(address)

        step("The same again. Now its worker gets a kill -9 in the middle of it.")
        disturbed, id = ask_and_kill(address)

        # A model computes a prompt of other length in other steps, and may then round otherwise: that the words are
        # the same is likely. The promise is that no word which was shown has changed.
        same = disturbed == undisturbed
        kept = disturbed.encode()[:KILL_AFTER_BYTES] == undisturbed.encode()[:KILL_AFTER_BYTES]
        words = "the same, to the last token" if same else "whole, and goes on in other words"
        step(f"The killed answer is {words if kept else 'NOT what was shown: this is a bug'}.")
        print("What happened to it, from `llambo why`:\n", flush=True)
        subprocess.run([*llambo(address), "why", id], check=True, timeout=LIMIT_S)

        step("Meanwhile, `llambo up` has seen this.")
        # It starts the worker again after a moment.
        while "is ready again" not in show(lines.get(timeout=LIMIT_S)):
            pass

        step("The same mesh over HTTP, for every program that uses OpenAI's API.")
        body = '{"messages": [{"role": "user", "content": "What is AI?"}], "max_tokens": 40}'
        print(f"    dashboard: {http}/")
        print(f"    curl {http}/v1/chat/completions -d '{body}'\n", flush=True)
        print(over_http(f"{http}/v1/chat/completions", body), flush=True)
        if sys.stdin.isatty() and sys.stdout.isatty():
            step("It runs on for you. Enter, or Ctrl-C, stops it.")
            with suppress(KeyboardInterrupt, EOFError):
                input()
    step("Stopped; nothing is left running.")
    return 0 if kept else 1


# --- the mesh ------------------------------------------------------------------------------------------


@contextmanager
def mesh() -> Iterator[tuple[str, str, SimpleQueue[str]]]:
    """`llambo up` on free ports: its address, that of its gateway, and its output, line by line."""
    words = ["up", "--port", "0", "--workers", "2", "--engine", "llama", "--model", "smollm2"]
    command = [sys.executable, "-m", "llambo.cli", *words]
    up = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: SimpleQueue[str] = SimpleQueue()
    listener = threading.Thread(target=listen, args=(up, lines), daemon=True)
    listener.start()
    try:
        print(f"$ llambo {' '.join(words)}", flush=True)
        yield *wait_until_ready(lines), lines
    finally:
        if up.poll() is None:
            up.send_signal(signal.SIGINT)  # a Ctrl-C
        up.wait(LIMIT_S)
        listener.join(LIMIT_S)


def listen(up: subprocess.Popen[str], lines: SimpleQueue[str]) -> None:
    assert up.stdout is not None
    with up.stdout:
        for line in up.stdout:
            lines.put(line.rstrip())
    lines.put("llambo up: it has ended")


def wait_until_ready(lines: SimpleQueue[str]) -> tuple[str, str]:
    address = http = ""
    while True:
        line = show(lines.get(timeout=LIMIT_S))
        if found := re.search(r"broker at (tcp://\S+),", line):
            address = found[1]
        if found := re.search(r"dashboard is at (http://\S+)/$", line):
            http = found[1]
        if "Ctrl-C stops everything" in line:
            return address, http
        if "it has ended" in line:
            sys.exit("the mesh did not start")


# --- the answers ---------------------------------------------------------------------------------------


def llambo(address: str) -> list[str]:
    return [sys.executable, "-m", "llambo.cli", "--broker", address]


def send(address: str) -> subprocess.Popen[bytes]:
    words = ["send", "-v", "--seed", str(SEED), "--max-tokens", str(TOKENS), PROMPT]
    print(f"$ llambo {' '.join(words[:-1])} {PROMPT!r}", flush=True)
    # Its statistics come last, so they may share the pipe with the answer.
    return subprocess.Popen([*llambo(address), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ask(address: str) -> str:
    with send(address) as sending:
        return answer_of(b"".join(pieces(sending)))


def ask_and_kill(address: str) -> tuple[str, str]:
    """The answer, and the id of its request."""
    output, id = b"", ""
    with send(address) as sending, SyncClient(address) as client:
        for piece in pieces(sending):
            output += piece
            if not id and len(output) > KILL_AFTER_BYTES:
                request = client.requests()[0]
                id = request.id
                pids = {worker.worker: worker.pid for worker in client.workers()}
                pid = pids[request.worker]
                print(f"\n\n    >>> kill -9 {pid}: that was {request.worker}, which writes this <<<\n", flush=True)
                os.kill(pid, signal.SIGKILL)
    return answer_of(output), id


def over_http(url: str, body: str) -> str:
    """The answer of the gateway."""
    with urllib.request.urlopen(url, body.encode(), LIMIT_S) as reply:  # noqa: S310 - our own gateway
        return str(reply.read().decode())


def pieces(sending: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Its output, shown as it comes."""
    assert sending.stdout is not None
    while piece := os.read(sending.stdout.fileno(), 4096):
        sys.stdout.buffer.write(piece)
        sys.stdout.flush()
        yield piece
    if sending.wait(LIMIT_S) != 0:
        sys.exit("the answer failed")


def answer_of(output: bytes) -> str:
    """Without the line of statistics."""
    return output.decode().rstrip("\n").rpartition("\n")[0]


# --- telling -------------------------------------------------------------------------------------------


def step(text: str) -> None:
    print(f"\n== {text}\n", flush=True)


def show(line: str) -> str:
    print(line, flush=True)
    return line


if __name__ == "__main__":
    sys.exit(main())
