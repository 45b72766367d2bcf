"""An honest client in a process of its own: are its answers delivered, are they right, and how long do they take?

The same process may have a second client, of a hostile broker: that client may get any `LlamboError`, and no other.

    with Honest(address) as honest:
        ...                         # whatever is done to the mesh meanwhile
        honest.mark("during")       # what follows is counted under this name
    print(honest.tallies)
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any

from llambo import Client
from llambo.mesh.client.answer_stream import Stream
from llambo.mesh.security import keys
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.testing.mesh import truth

#: Requests at a time, tokens of each, and the pause between two of the same line.
LINES = 2
TOKENS = 12
PAUSE_S = 0.01
#: A request that takes longer has failed.
REQUEST_S = 60.0
END_S = 30.0


class Tally:
    """What became of the requests since the last mark."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.times_ms: list[float] = []
        self.wrong = 0
        self.moves = 0
        self.errors: dict[str, int] = {}
        self.began = time.monotonic()
        self.first_at = 0.0
        self.last_at = self.ended = self.began
        #: The longest time without an answer.
        self.gap_ms = 0.0

    def answered(self, began: float) -> None:
        now = time.monotonic()
        self.first_at = self.first_at or now
        self.gap_ms = max(self.gap_ms, (now - self.last_at) * 1_000)
        self.last_at = now
        self.times_ms.append((now - began) * 1_000)

    def close(self) -> None:
        """A silence that lasts until now counts as well."""
        self.ended = time.monotonic()
        self.gap_ms = max(self.gap_ms, (self.ended - self.last_at) * 1_000)

    def figures(self) -> dict[str, Any]:
        times = sorted(self.times_ms)
        return {
            "answers": len(times),
            "wrong": self.wrong,
            "moves": self.moves,
            "errors": self.errors,
            "p50_ms": round(quantile(times, 0.5), 1),
            "p99_ms": round(quantile(times, 0.99), 1),
            "most_ms": round(times[-1], 1) if times else 0.0,
            "gap_ms": round(self.gap_ms),
            "seconds": round(self.ended - self.began, 1),
        }


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


class Faults(logging.Handler):
    """What a client reports as a fault of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


async def serve(address: str, hostile: str = "") -> None:
    """Ask until standard input is closed; each line of it begins a new tally."""
    faults = Faults()
    logging.getLogger().addHandler(faults)
    tallies = [Tally("before")]
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    async def listen() -> None:
        while line := await reader.readline():
            tallies[-1].close()
            tallies.append(Tally(line.decode().strip()))
            print("marked", flush=True)
        over.set()

    listener = asyncio.create_task(listen())
    async with Client(address, name="honest", lost_ms=int(REQUEST_S * 1_000)) as client:
        print("ready", flush=True)
        lines = [_line(client, number, tallies, over) for number in range(LINES)]
        await asyncio.gather(*lines, *([_use_hostile_mesh(hostile, over)] if hostile else []))
    await listener
    tallies[-1].close()
    for text in faults.texts:
        tallies[-1].errors[text] = 1
    print(json.dumps({tally.name: tally.figures() for tally in tallies}), flush=True)


async def _line(client: Client, number: int, tallies: list[Tally], over: asyncio.Event) -> None:
    """One request after the other."""
    count = 0
    while not over.is_set():
        count += 1
        prompt, began = f"honest {number} {count}", time.monotonic()
        try:
            async with asyncio.timeout(REQUEST_S):
                stream, ids = await _answered(client, prompt, count)
        except (LlamboError, TimeoutError) as error:
            code = error.code.value if isinstance(error, LlamboError) else "nothing for a minute"
            tallies[-1].errors[code] = tallies[-1].errors.get(code, 0) + 1
        else:
            tally = tallies[-1]
            tally.answered(began)
            tally.wrong += ids != truth(prompt, count, TOKENS)
            tally.moves += stream.answer.moves if stream.answer else 0
        await asyncio.sleep(PAUSE_S)


async def _answered(client: Client, prompt: str, seed: int) -> tuple[Stream, list[int]]:
    """A broker that does not keep up, as on a busy machine, says when to come back. The time until then counts."""
    while True:
        stream = client.stream(prompt, model="fake", max_tokens=TOKENS, seed=seed)
        try:
            return stream, [id async for piece in stream for id in piece.ids]
        except LlamboError as error:
            if error.code is not Code.BUSY or not error.retry_after_ms:
                raise
            await asyncio.sleep(error.retry_after_ms / 1_000)


async def _use_hostile_mesh(address: str, over: asyncio.Event) -> None:
    """Use a hostile mesh. It may refuse, lie or be silent; any error but a LlamboError ends this process."""
    while not over.is_set():
        with suppress(LlamboError):
            async with Client(address, name="victim", lost_ms=5_000) as client:
                while not over.is_set():
                    await asyncio.gather(_ask(client.status()), *(_ask(_read(client)) for _ in range(4)))


async def _ask(question: Coroutine[Any, Any, Any]) -> None:
    with suppress(LlamboError, TimeoutError):
        async with asyncio.timeout(1.0):
            await question


async def _read(client: Client) -> None:
    async with client.stream("give me all", max_tokens=50) as stream:
        async for _ in stream:
            pass


class Honest:
    """The process. At its end it prints a tally for each mark; the first is `before`."""

    def __init__(self, address: str, hostile: str = "", key: str = "") -> None:
        self.tallies: dict[str, dict[str, Any]] = {}
        environment = {name: value for name, value in os.environ.items() if name != keys.KEY_ENV}
        if key:
            environment[keys.KEY_ENV] = key
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.honest", address, hostile],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._line(END_S)

    def _line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if readable else b""
        assert line, f"the honest client wrote nothing for {timeout_s} s"
        return bytes(line)

    def mark(self, name: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(name.encode() + b"\n")
        self._process.stdin.flush()
        self._line(END_S)

    def __enter__(self) -> Honest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            if error is None:
                self._process.stdin.close()
                self.tallies = json.loads(self._line(REQUEST_S + END_S))
        finally:
            self._process.kill()
            self._process.wait(END_S)
            self._process.stdout.close()

    def faults(self) -> int:
        return faults_of(self.tallies)


def faults_of(tallies: dict[str, dict[str, Any]]) -> int:
    """Answers that were wrong, and requests without one."""
    return sum(tally["wrong"] + sum(tally["errors"].values()) for tally in tallies.values())


def show(tallies: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"{'':<12}{'answers':>8}{'wrong':>7}{'errors':>8}{'p50 ms':>9}{'p99 ms':>9}{'most ms':>9}{'gap ms':>8}{'s':>8}"
    ]
    for name, tally in tallies.items():
        lines.append(
            f"{name:<12}{tally['answers']:>8}{tally['wrong']:>7}{sum(tally['errors'].values()):>8}{tally['p50_ms']:>9}"
            f"{tally['p99_ms']:>9}{tally['most_ms']:>9}{tally['gap_ms']:>8}{tally['seconds']:>8}"
        )
        if tally["errors"]:
            lines.append(f"            {tally['errors']}")
    return "\n".join(lines)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
