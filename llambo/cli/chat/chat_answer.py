"""Reading one answer to its end, while a person looks on: pieces, frames, and a quiet line where it takes long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from llambo.cli.chat.chat_view import AnswerView
from llambo.cli.kit.out import Out
from llambo.cli.kit.views import Clock
from llambo.mesh.wire.errors import LlamboError, printable

if TYPE_CHECKING:
    from llambo.mesh.client.answer_stream import Stream
    from llambo.mesh.client.client import Client

#: Without a token for so long, the person is told; in the middle of an answer a while later.
FIRST_S, STALL_S = 1.0, 2.0
#: How often what is told may change.
TICK_S = 1.0


class Waiting:
    """What a person is told who waits: the place in the queue, how long nothing has come, and what is known of it."""

    def __init__(self, client: Client, stream: Stream, lost: Callable[[], str]) -> None:
        self._client = client
        self._stream = stream
        self._lost = lost
        self._since = time.monotonic()
        self._begun = False
        self._story = ""
        self._asking: asyncio.Task[None] | None = None
        self._asked_at = 0.0

    def heard(self) -> None:
        self._since, self._begun, self._story = time.monotonic(), True, ""

    def line(self) -> str:
        if lost := self._lost():
            return f"lost the broker ({lost}); trying again"
        quiet_s = time.monotonic() - self._since
        if not self._begun and self._stream.ahead:
            return f"waiting, {self._stream.ahead} ahead"
        if quiet_s < (STALL_S if self._begun else FIRST_S):
            return ""
        if self._asking is None or (self._asking.done() and time.monotonic() - self._asked_at > STALL_S):
            self._asked_at = time.monotonic()
            self._asking = asyncio.get_running_loop().create_task(self._ask_why())
        known = f" ({self._story})" if self._story else ""
        return f"{'nothing' if self._begun else 'waiting'} for {quiet_s:.0f} s{known}"

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            with suppress(asyncio.CancelledError):
                await self._asking

    async def _ask_why(self) -> None:
        """A line that explains; the answer comes without it, too."""
        try:
            found = await self._client.why(self._stream.id)
        except LlamboError:
            self._story = ""
            return
        worker = printable(found.worker)
        if found.state != "running" or not worker:
            self._story = "no worker has it now"
        else:
            self._story = f"its worker is lost, {worker} has it now" if found.moves else f"{worker} has it"


async def read(stream: Stream, view: AnswerView, out: Out, waiting: Waiting, heard: Callable[[str], None]) -> Clock:
    """To the end of the stream. `heard` is called with each piece of text, before it is shown."""
    clock = Clock()
    try:
        while True:
            due = view.frame(waiting.line())
            try:
                async with asyncio.timeout_at(min(due, asyncio.get_running_loop().time() + TICK_S)):
                    piece = await stream.next_piece()
            except TimeoutError:
                continue
            if piece is None:
                break
            clock.on_piece(len(piece.ids))
            waiting.heard()
            heard(piece.text)
            view.piece(piece)
            await out.room()
    finally:
        clock.on_end()
        await waiting.close()
        view.end(stream.answer, clock)
    return clock
