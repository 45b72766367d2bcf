"""One process of readers over HTTP: server-sent events and WebSockets, of every API, from several gateways.

    python -m tests.chaos.http_load OPTIONS-AS-JSON

A reader whose connection breaks, or is silent for too long, comes back to another gateway with the id of the last event
it has; some break their connection themselves. So does one that gets an error that is named as retryable, for a while;
but not after `cancelled`, since that says to begin a new request. What it has in the end is compared with the only
right answer of the fake engine. It writes a line when a stream begins, and one with what became of it (`http_check.py`
has the words). When standard input is closed, nothing new is begun.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import msgspec
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from llambo.gateway.apis import anthropic_messages, openai_chat, responses
from llambo.gateway.apis.response_store import ResponseStore
from llambo.mesh.service.host import end_with_parent
from llambo.worker.engine.fake_model import pieces_of, plain_base, plain_next
from tests.chaos.history import Journal
from tests.chaos.load import WORDS

PATHS = {"chat": "chat/completions", "completions": "completions", "messages": "messages", "responses": "responses"}
#: Those that a WebSocket has.
SOCKET_APIS = ("chat", "messages", "responses")
#: The shares of WebSockets, of several choices where an API has them, and of readers that break their connection.
SOCKETS, SEVERAL, CUTTERS = 0.25, 0.15, 0.25
#: After so long without a byte a reader goes to the next gateway. A comment comes every 15 s.
SILENT_S = 6.0
CONNECT_S = 3.0
#: After this a stream counts as hung.
HUNG_S = 120.0
#: How long a reader tries again after errors. (Anthropic's shape has no code; an `api_error` may be `cancelled`.)
TRY_S = 40.0
FINAL = ("cancelled", "409 cancelled", "api_error", "409 api_error", "server_error")
PAUSE_S = 0.2
#: The reasons of an answer that has all its tokens, by API.
NATURAL = {"chat": "length", "completions": "length", "messages": "max_tokens", "responses": "max_output_tokens"}


@dataclass(frozen=True)
class Options:
    name: str
    ports: tuple[int, ...]
    history: str
    parent: int
    seed: int
    streams: int
    tokens: tuple[int, int]


class Broken(Exception):
    """The connection broke, or was silent for too long, before the answer had an end."""


@dataclass
class Asked:
    """One request, the only right answer to it, and what its reader has of it."""

    api: str
    socket: bool
    body: dict[str, Any]
    expected: list[str]
    #: It breaks its connection after so many events; 0: it does not.
    cut_after: int = 0
    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finishes: list[str] = field(default_factory=list)
    #: All is there, as the API says it.
    done: bool = False
    error: dict[str, Any] | None = None
    takeovers: int = 0
    begun_again: int = 0
    tried_again: int = 0

    def __post_init__(self) -> None:
        self.texts, self.finishes = [""] * len(self.expected), [""] * len(self.expected)

    def take(self, id: str, data: Any) -> None:
        """One event."""
        self._read(data)
        if self.error is None:  # an error has the id of the event before it
            self.ids.append(id)

    def _read(self, data: Any) -> None:
        if data == "[DONE]":
            self.done = True
            return
        match data:
            case {"error": dict() as error}:
                self.error = error
            case {"type": "response.failed", "response": {"error": error}}:
                self.error = error
            case {"choices": list() as choices}:
                for choice in choices:
                    self.texts[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content") or ""
                    self.finishes[choice["index"]] += choice["finish_reason"] or ""
            case {"type": "content_block_delta", "delta": {"text": text}}:
                self.texts[0] += text
            case {"type": "message_delta", "delta": {"stop_reason": reason}}:
                self.finishes[0] += reason
            case {"type": "message_stop"}:
                self.done = True
            case {"type": "response.output_text.delta", "delta": text}:
                self.texts[0] += text
            case {"type": "response.incomplete", "response": {"incomplete_details": {"reason": reason}}}:
                self.finishes[0] += reason
                self.done = True
            case {"type": "response.completed"}:
                self.finishes[0] += "completed"
                self.done = True

    @property
    def code(self) -> str:
        """Of its error."""
        assert self.error is not None
        return str(self.error.get("code") or self.error.get("type"))

    def outcome(self) -> tuple[str, str]:
        """A word of `http_check.py`, and a code or what is wrong."""
        if len(set(self.ids)) != len(self.ids):
            return "doubled", "an event came twice"
        ahead = [has for has, right in zip(self.texts, self.expected, strict=True) if not right.startswith(has)]
        if ahead:
            return "wrong", f"a text does not begin as the right one does: {ahead[0][-60:]!r}"
        if self.error is not None:
            return ("error" if self.error.get("retryable") is True else "fatal"), self.code
        if self.texts != self.expected or set(self.finishes) != {NATURAL[self.api]}:
            have = [f"{len(has)} of {len(right)}" for has, right in zip(self.texts, self.expected, strict=True)]
            return "cut short", f"{', '.join(have)} characters, ended with {self.finishes}"
        return "whole", ""


def draw(random: Random, options: Options, number: str) -> Asked:
    api = random.choice(list(PATHS))
    socket = api in SOCKET_APIS and random.random() < SOCKETS
    choices = random.choice((2, 3)) if api in ("chat", "completions") and random.random() < SEVERAL else 1
    prompt = f"{options.name} {number} {' '.join(random.sample(WORDS, 5))}"
    seed, tokens = random.getrandbits(62) + 1, random.randint(*options.tokens)
    about: dict[str, Any] = {"stream": True, "seed": seed}
    messages = {"messages": [{"role": "user", "content": prompt}]}
    match api:
        case "completions":
            body, text = about | {"prompt": prompt, "max_tokens": tokens}, prompt
        case "chat":
            body = about | messages | {"max_tokens": tokens}
            text = openai_chat.parse(msgspec.convert(body, openai_chat.ChatRequest), 0).submission.prompt
        case "messages":
            body = about | messages | {"max_tokens": tokens}
            asked = msgspec.convert(body, anthropic_messages.MessagesRequest)
            text = anthropic_messages.parse(asked).submission.prompt
        case _:
            body = about | {"input": prompt, "max_output_tokens": tokens, "store": False}
            wanted = msgspec.convert(body, responses.ResponsesRequest)
            text = responses.parse(wanted, 0, ResponseStore(), "").submission.prompt
    if choices > 1:
        body["n"] = choices
    expected = [answer(text, seed + choice, tokens) for choice in range(choices)]
    cut_after = random.randint(1, tokens) if random.random() < CUTTERS else 0
    return Asked(api, socket, body, expected, cut_after)


def answer(prompt: str, seed: int, tokens: int) -> str:
    base = plain_base(seed, prompt.encode())
    return b"".join(pieces_of([plain_next(base, index, True) for index in range(tokens)])).decode(errors="replace")


# --- reading -----------------------------------------------------------------------------------------


async def read_http(asked: Asked, port: int, last: str) -> None:
    """Until the end of the stream, an error, or Broken."""
    async with asyncio.timeout(CONNECT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        body = json.dumps(asked.body).encode()
        head = [f"POST /v1/{PATHS[asked.api]} HTTP/1.1", "host: localhost", f"content-length: {len(body)}"]
        head += [f"last-event-id: {last}"] if last else []
        writer.write("\r\n".join([*head, "", ""]).encode() + body)
        lines = await _lines(reader)
        status, headers = int(lines[0].split()[1]), dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        if status != 200:
            data = await asyncio.wait_for(reader.readexactly(int(headers["content-length"])), SILENT_S)
            asked.error = json.loads(data)["error"]
            asked.error["code"] = f"{status} {asked.error.get('code') or asked.error['type']}"
            if asked.error["retryable"] is not (headers["x-should-retry"] == "true"):
                asked.error["retryable"] = False
            return
        async for id, data in _events(reader):
            asked.take(id, data)
            if asked.done or asked.error is not None:
                return
            if asked.cut_after and len(asked.ids) >= asked.cut_after:
                asked.cut_after = 0
                raise Broken
        raise Broken
    finally:
        writer.transport.abort()


async def _lines(reader: asyncio.StreamReader) -> list[str]:
    data = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SILENT_S)
    return data.decode().split("\r\n")


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[tuple[str, Any]]:
    """Of a body in chunks. It ends without a word if the connection does."""
    rest = b""
    while True:
        size = int(await asyncio.wait_for(reader.readuntil(b"\r\n"), SILENT_S), 16)
        if size == 0:
            return
        rest += (await asyncio.wait_for(reader.readexactly(size + 2), SILENT_S))[:-2]
        *events, rest = rest.split(b"\n\n")
        for event in events:
            fields = dict(line.split(b": ", 1) for line in event.split(b"\n") if not line.startswith(b":"))
            if b"data" in fields:
                data = fields[b"data"]
                yield fields[b"id"].decode(), "[DONE]" if data == b"[DONE]" else json.loads(data)


async def read_socket(asked: Asked, port: int, last: str) -> None:
    url = f"ws://127.0.0.1:{port}/v1/stream"
    async with connect(url, open_timeout=CONNECT_S, close_timeout=1, ping_interval=None) as socket:
        message = {"type": "ask", "id": "1", "api": asked.api, "body": asked.body}
        await socket.send(json.dumps(message | ({"last_event_id": last} if last else {})))
        while True:
            said = json.loads(await asyncio.wait_for(socket.recv(), SILENT_S))
            match said["type"]:
                case "event":
                    asked.take(said["event_id"], said["data"])
                case "error":
                    asked.error = said["error"]
                    return
                case "end":
                    asked.done = True
                    return
            if asked.cut_after and len(asked.ids) >= asked.cut_after:
                asked.cut_after = 0
                socket.transport.abort()
                raise Broken


class HttpLoad:
    def __init__(self, options: Options) -> None:
        self._options = options
        self._journal = Journal(Path(options.history), options.name)
        self._closing = False

    async def run(self) -> None:
        watcher = asyncio.create_task(self._until_closed())
        self._journal.write("begun")
        async with asyncio.TaskGroup() as lanes:
            for number in range(self._options.streams):
                lanes.create_task(self._lane(number))
        self._journal.write("left")
        await watcher

    async def _until_closed(self) -> None:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        await reader.read()
        self._closing = True

    async def _lane(self, number: int) -> None:
        random = Random(f"{self._options.seed}/{self._options.name}/{number}")
        turn = 0
        await asyncio.sleep(random.random())
        while not self._closing:
            turn += 1
            asked = draw(random, self._options, f"{number} {turn}")
            key = f"{self._options.name} {number} {turn}"
            self._journal.write("http begun", key=key, api=asked.api)
            try:
                async with asyncio.timeout(HUNG_S):
                    await self._read(asked, random)
                outcome, text = asked.outcome()
            except TimeoutError:
                outcome, text = "hung", f"no end after {HUNG_S:.0f} s"
            place = asked.ids[-1] if asked.ids else ""
            self._journal.write(
                "http", key=key, api=asked.api, socket=asked.socket, choices=len(asked.expected), outcome=outcome,
                text=text, id=place.partition("-")[0], place=place, takeovers=asked.takeovers,
                begun_again=asked.begun_again, tried_again=asked.tried_again, tokens=sum(map(len, asked.texts)),
            )  # fmt: skip
            if outcome != "whole":
                await asyncio.sleep(PAUSE_S)

    async def _read(self, asked: Asked, random: Random) -> None:
        """From one gateway after the other, until there is an end."""
        ports = list(self._options.ports)
        random.shuffle(ports)
        read = read_socket if asked.socket else read_http
        loop, turn = asyncio.get_running_loop(), 0
        until = loop.time() + TRY_S
        while not asked.done:
            last = asked.ids[-1] if asked.ids else ""
            try:
                await read(asked, ports[turn % len(ports)], last)
            except (Broken, OSError, asyncio.IncompleteReadError, TimeoutError, WebSocketException):
                if asked.done:
                    return
                if asked.ids:
                    asked.takeovers += 1
                else:
                    asked.begun_again += 1
                await asyncio.sleep(PAUSE_S * random.random())
            if asked.error is not None:
                if not asked.error["retryable"] or asked.code in FINAL or loop.time() > until:
                    return
                asked.error = None
                asked.tried_again += 1
                await asyncio.sleep(1.0)
            turn += 1


def main(arguments: list[str]) -> None:
    given = json.loads(arguments[0])
    options = Options(**{**given, "tokens": tuple(given["tokens"]), "ports": tuple(given["ports"])})
    end_with_parent(options.parent)
    asyncio.run(HttpLoad(options).run())


if __name__ == "__main__":
    main(sys.argv[1:])
