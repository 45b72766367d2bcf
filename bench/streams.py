"""Streams of tokens, timed where they arrive: from the mesh by its own client, from other servers over HTTP.

The reader of HTTP is leaner than any real one (it counts events and looks into none but the last), because it
shares the cores with what is measured: what it saves is to the advantage of the others.
"""

from __future__ import annotations

import asyncio
import json
import re
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.figures import quantile
from llambo import Client

READ_BYTES = 64 * 1024
#: Nothing arrives on any stream for so long: something is broken.
LIMIT_S = 300.0
EVENT = b"data: {"
#: In every event of llama-server's own API, and in the last one of OpenAI's.
COUNTED = re.compile(rb'"(?:tokens_predicted|completion_tokens)":\s*(\d+)')
#: The defaults of llama.cpp, given here so that they stay the same.
CHANCE = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
#: What SmolLM2 ends an answer with; the server of llama-cpp-python knows no `ignore_eos`.
ENDINGS = {"0": -100.0, "2": -100.0}


@dataclass(slots=True)
class Timed:
    """One stream. All times are of `time.perf_counter`."""

    started: float = 0.0
    #: When something arrived.
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def first_ms(self) -> float:
        return (self.arrivals[0] - self.started) * 1000

    def gaps_ms(self, since: float = 0.0, until: float = float("inf")) -> list[float]:
        """Between neighbours, for those that ended within this time."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [(after - before) * 1000 for before, after in pairs if since <= after < until]


@dataclass(slots=True)
class Summary:
    """A round of streams at once, or several of them."""

    per_s: float
    first_ms: tuple[float, float]
    gap_ms: tuple[float, float]


def summary(streams: Sequence[Timed]) -> Summary:
    took = max(stream.arrivals[-1] for stream in streams) - min(stream.started for stream in streams)
    firsts = [stream.first_ms for stream in streams]
    gaps = [gap for stream in streams for gap in stream.gaps_ms()]
    return Summary(
        sum(stream.tokens for stream in streams) / took,
        (quantile(firsts, 0.5), quantile(firsts, 0.99)),
        (quantile(gaps, 0.5), quantile(gaps, 0.99)),
    )


def prompt(turn: int, number: int) -> str:
    """Some 32 tokens, different from the first on, so that nothing of it is cached."""
    return f"{turn} {number}: Tell me a story about a llama that crosses the mountains in a winter storm, and what it"


# --- the mesh ------------------------------------------------------------------------------------------


async def mesh_stream(client: Client, text: str, tokens: int, seed: int, timed: Timed) -> Timed:
    timed.started = time.perf_counter()
    sampling = {**CHANCE, "ignore_eos": True}
    async for piece in client.stream(text, max_tokens=tokens, seed=seed, form="text", sampling=sampling):
        timed.arrivals.append(time.perf_counter())
        timed.tokens += len(piece.ids)
    return timed


async def mesh_round(client: Client, turn: int, streams: int, tokens: int) -> list[Timed]:
    tasks = [mesh_stream(client, prompt(turn, n), tokens, n + 1, Timed()) for n in range(streams)]
    return list(await asyncio.gather(*tasks))


# --- HTTP ----------------------------------------------------------------------------------------------


class HttpStream:
    """One request, on a connection of its own."""

    def __init__(self, port: int, path: str, body: dict[str, Any]) -> None:
        self.timed = Timed()
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self._request = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self.over = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self.over = True
        self._socket.close()

    def start(self) -> None:
        self.timed.started = time.perf_counter()
        self._socket.sendall(self._request)

    def read(self) -> None:
        data = self._socket.recv(READ_BYTES)
        now = time.perf_counter()
        heard = self._rest + data
        events = heard.count(EVENT)
        if events:
            self.timed.arrivals.append(now)
            self.timed.tokens += events
        counted = COUNTED.findall(heard)
        if counted:
            # Its last event has no token; and one of text that ended within a character stands for several.
            self.timed.tokens = int(counted[-1])
        # What may be the beginning of an event, but none that was counted.
        self._rest = heard[heard.rfind(EVENT) + len(EVENT) :] if events else heard
        self._rest = self._rest[-2 * READ_BYTES :]
        if not data:
            self.close()
            if not self.timed.arrivals:
                raise SystemExit(f"no tokens came, but {heard[:500]!r}")


class HttpStreams:
    """Some of them, read by one thread. More may be added while it runs."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def add(self, stream: HttpStream) -> Timed:
        stream.start()
        self._selector.register(stream, selectors.EVENT_READ)
        return stream.timed

    def turn(self) -> bool:
        """Read what is there, or wait for it. False: all have ended."""
        if not self._selector.get_map():
            return False
        ready = self._selector.select(LIMIT_S)
        if not ready:
            raise SystemExit(f"nothing arrived for {LIMIT_S} s")
        for key, _ in ready:
            stream: HttpStream = key.fileobj  # type: ignore[assignment]
            number = stream.fileno()
            stream.read()
            if stream.over:
                self._selector.unregister(number)
        return True


def llama_server_stream(port: int, text: str, tokens: int, seed: int, **more: Any) -> HttpStream:
    asked = {"prompt": text, "n_predict": tokens, "seed": seed, "stream": True, "ignore_eos": True, **CHANCE,
             "samplers": ["top_k", "top_p", "min_p", "temperature"], "cache_prompt": False, **more}  # fmt: skip
    return HttpStream(port, "/completion", asked)


def python_server_stream(port: int, text: str, tokens: int, seed: int) -> HttpStream:
    """Its last event only says that it ended: one event for each token, and one more."""
    asked = {"prompt": text, "max_tokens": tokens, "seed": seed, "stream": True, "logit_bias": ENDINGS, **CHANCE}
    return HttpStream(port, "/v1/completions", asked)


def openai_stream(port: int, text: str, tokens: int, seed: int, **more: Any) -> HttpStream:
    """The same request to each server that has OpenAI's API and llama.cpp's additions to it."""
    asked = {"prompt": text, "max_tokens": tokens, "seed": seed, "stream": True, "ignore_eos": True, **CHANCE,
             "stream_options": {"include_usage": True}, **more}  # fmt: skip
    return HttpStream(port, "/v1/completions", asked)


def http_round(streams: Sequence[HttpStream]) -> list[Timed]:
    reader = HttpStreams()
    timed = [reader.add(stream) for stream in streams]
    while reader.turn():
        pass
    return timed
