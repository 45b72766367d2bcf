"""One client as a process of its own: it keeps streams going and writes down what it sees.

    python -m tests.chaos.load OPTIONS-AS-JSON

When its standard input is closed it asks for nothing new, reads what runs to the end, and leaves; when its parent
dies it is killed. It uses the public client and nothing else, but for one thing: it looks at the chunks that come in,
to write down by which dispatch each token was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import zlib
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from llambo import Client, LlamboError
from llambo.mesh.client.answer_stream import Stream
from llambo.mesh.service.host import end_with_parent
from llambo.mesh.wire.stream import Reassembly
from tests.chaos.history import Journal

#: The shares of the ways in which answers are asked for; the rest are streams.
GENERATED, DETACHED = 0.05, 0.10
#: With models: the shares of requests whose model is held before, for so long, and of those that a pause precedes.
HELD, HELD_MS, PAUSES = 0.03, 3_000, 0.5
#: How long after its end an answer is looked at once more: nothing may have come.
AFTERWARDS_S = 1.0
#: After a request that failed, so that an outage is not asked about a thousand times a second.
PAUSE_S = 0.25
WORDS = ("how", "many", "small", "machines", "does", "it", "take", "to", "answer", "before", "tea", "gets", "cold")


@dataclass(frozen=True)
class Options:
    name: str
    address: str
    history: str
    parent: int
    seed: int
    streams: int
    tokens: tuple[int, int]
    #: Those that may be asked for, and how often each is, beside the others; empty: requests name none.
    models: dict[str, float] = field(default_factory=dict)


class Spans:
    """Which dispatch made which tokens: (first index, how many, dispatch), by request."""

    def __init__(self) -> None:
        self._by_id: dict[bytes, deque[tuple[int, int, str]]] = defaultdict(deque)

    def watch(self) -> None:
        """Look over the shoulder of every `Reassembly` of this process."""
        append = Reassembly._append

        def watched(reassembly: Reassembly, frame: bytes, count: int, flags: int) -> bool:
            first = reassembly.next_index
            taken = append(reassembly, frame, count, flags)
            if taken:
                spans = self._by_id[frame[1:17]]
                if spans and first < spans[-1][0] + spans[-1][1]:
                    spans.clear()  # an answer that is followed anew begins anew
                spans.append((first, count, frame[17:25].hex()))
            return taken

        Reassembly._append = watched  # type: ignore[method-assign, assignment]

    def take(self, id: str, first: int, count: int) -> list[tuple[str, int]]:
        """Those of the tokens from `first` on; earlier ones are dropped."""
        spans, found = self._by_id[bytes.fromhex(id)], []
        until = first + count
        while spans and spans[0][0] < until:
            begin, length, dispatch = spans.popleft()
            end = begin + length
            if end > until:
                spans.appendleft((until, end - until, dispatch))
                end = until
            if end > max(begin, first):
                found.append((dispatch, end - max(begin, first)))
        return found

    def forget(self, id: str) -> None:
        self._by_id.pop(bytes.fromhex(id), None)


class Load:
    def __init__(self, options: Options) -> None:
        self._options = options
        self._journal = Journal(Path(options.history), options.name)
        self._spans = Spans()
        self._spans.watch()
        self._closing = False
        self._later: set[asyncio.Task[Any]] = set()

    async def run(self) -> None:
        async with Client(self._options.address, name=self._options.name) as client:
            watcher = asyncio.create_task(self._until_closed(client))
            self._journal.write("begun")
            async with asyncio.TaskGroup() as lanes:
                for number in range(self._options.streams):
                    lanes.create_task(self._lane(client, number))
            await asyncio.gather(*self._later)
            counters = client.counters
            self._journal.write("left", counters={name: getattr(counters, name) for name in counters.__slots__})
            await watcher

    async def _until_closed(self, client: Client) -> None:
        """A line on standard input is one more request, with what is to become of it."""
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        async for line in reader:
            self._keep(asyncio.create_task(self._ask(client, json.loads(line), 1.0)))
        self._closing = True

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def _lane(self, client: Client, number: int) -> None:
        random = Random(f"{self._options.seed}/{self._options.name}/{number}")
        turn = 0
        await asyncio.sleep(random.random())
        while not self._closing:
            turn += 1
            request: dict[str, Any] = {
                "seed": random.getrandbits(62) + 1,
                "prompt": f"{self._options.name} {number} {turn} {' '.join(random.sample(WORDS, 5))}",
                "max": random.randint(*self._options.tokens),
            }
            draw = random.random()
            if models := self._options.models:
                (request["model"],) = random.choices(list(models), list(models.values()))
                if random.random() < HELD:
                    await self._hold(client, request["model"], f"{self._options.name}-{number}")
                if random.random() < PAUSES:
                    await asyncio.sleep(PAUSE_S * random.randint(1, 20))
            if not await self._ask(client, request, draw):
                await asyncio.sleep(PAUSE_S)

    async def _hold(self, client: Client, model: str, holder: str) -> None:
        """Every other holder is given back at once; the others end by themselves. It may be refused: it is a wish."""
        try:
            await client.hold_model(model, holder=holder, ttl_ms=HELD_MS)
            if len(self._later) % 2:
                await client.release_model(model, holder=holder)
        except LlamboError as error:
            self._journal.write("not held", model=model, code=error.code.value, text=error.text)

    async def _ask(self, client: Client, request: dict[str, Any], draw: float) -> bool:
        """False if it failed."""
        id, reading = "", {}
        options = {"seed": request["seed"], "max_tokens": request["max"], "model": request.get("model", "")}
        try:
            if draw < DETACHED:
                id = await client.submit(request["prompt"], **options)
                self._journal.write("submit", id=id, how="detached", **request)
                await self._read(await client.attach(id), 0)
                reading = {"r": 1}
                await self._read(await client.attach(id), 1)
            else:
                whole = draw < DETACHED + GENERATED
                stream = client.stream(request["prompt"], stream=not whole, **options)
                id = stream.id
                self._journal.write("submit", id=id, how="generate" if whole else "stream", **request)
                await self._read(stream, 0)
            if "model" in request:
                self._keep(asyncio.create_task(self._ask_what_it_waited_for(client, id)))
        except LlamboError as error:
            self._journal.write("error", id=id, code=error.code.value, text=error.text, **reading)
            await self._ask_why(client, id)
            return False
        finally:
            if id:
                self._spans.forget(id)
        return True

    async def _read(self, stream: Stream, reading: int) -> None:
        facts: dict[str, Any] = {"id": stream.id} | ({"r": reading} if reading else {})
        while (piece := await stream.next_piece()) is not None:
            made = self._spans.take(stream.id, piece.index, len(piece.ids))
            if piece.ids:
                self._journal.write("chunk", **facts, i=piece.index, ids=piece.ids, d=made)
        answer = stream.answer
        assert answer is not None, "a stream without an error has an answer"
        crc = zlib.crc32(answer.text.encode())
        self._journal.write("end", **facts, reason=answer.reason, count=len(answer.ids), moves=answer.moves,
                            worker=answer.worker, crc=crc, queued=answer.queued_ms)  # fmt: skip
        self._keep(asyncio.create_task(self._look_again(stream, facts)))

    async def _look_again(self, stream: Stream, facts: dict[str, Any]) -> None:
        """After the end: whatever a stream still has to give was not meant to be there."""
        await asyncio.sleep(AFTERWARDS_S)
        while (piece := await stream.next_piece()) is not None:
            self._journal.write("chunk", **facts, i=piece.index, ids=piece.ids, d=[])

    async def _ask_what_it_waited_for(self, client: Client, id: str) -> None:
        """A broker that came later does not know."""
        with contextlib.suppress(LlamboError, TimeoutError):
            async with asyncio.timeout(2):
                story = (await client.why(id)).story
            self._journal.write("waited", **{"id": id, "for": [step.detail for step in story if step.what == "waits"]})

    async def _ask_why(self, client: Client, id: str) -> None:
        if not id:
            return
        try:
            async with asyncio.timeout(2):
                self._journal.write("why", id=id, story=msgspec.to_builtins((await client.why(id)).story))
        except (LlamboError, TimeoutError) as error:
            self._journal.write("why", id=id, story=[{"at_ms": 0, "what": "no broker knows", "detail": str(error)}])


def main(arguments: list[str]) -> None:
    given = json.loads(arguments[0])
    options = Options(**{**given, "tokens": tuple(given["tokens"])})
    end_with_parent(options.parent)
    asyncio.run(Load(options).run())


if __name__ == "__main__":
    main(sys.argv[1:])
