"""One connection's shell: a socket, a core, and a task for each answer that is under way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, assert_never

from llambo.bridge import facts as f
from llambo.bridge.connection_core import ConnectionCore
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.client.client import Client
from llambo.mesh.wire.errors import Code, ErrorInfo, LlamboError

if TYPE_CHECKING:
    from llambo.bridge.server import Bridge

log = logging.getLogger(__name__)

#: What may wait for a peer to read it; then its answers wait as well.
WRITE_BYTES = 64 * 1024


class Connection(asyncio.Protocol):
    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._client: Client = bridge.client
        self._core = ConnectionCore(bridge.terms)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._room = asyncio.Event()
        self._room.set()
        self._transport: asyncio.Transport | None = None

    @property
    def answers(self) -> int:
        return self._core.answers

    # --- what asyncio tells --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(WRITE_BYTES)
        self._bridge.joined(self, transport)

    def data_received(self, data: bytes) -> None:
        self.handle(f.Arrived(data))

    def eof_received(self) -> bool:
        """True: what it has asked is still answered."""
        self.handle(f.PeerFinished())
        return True

    def pause_writing(self) -> None:
        self._room.clear()
        self.handle(f.Filled())

    def resume_writing(self) -> None:
        self._room.set()
        self.handle(f.Drained())

    def connection_lost(self, error: Exception | None) -> None:
        for task in self._tasks.values():
            task.cancel()
        assert self._transport is not None
        self._bridge.left(self, self._transport)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- what the core wants -------------------------------------------------------------------------------

    def handle(self, fact: f.Fact) -> None:
        for order in self._core.handle(fact):
            self._do(order)

    def _do(self, order: f.Order) -> None:
        assert self._transport is not None
        match order:
            case f.Write(data):
                self._transport.write(data)
            case f.Infer(number):
                self._start(number, self._infer(order))
            case f.Ask(number, what):
                self._start(number, self._ask(number, what))
            case f.Drop(number):
                if (task := self._tasks.get(number)) is not None:
                    task.cancel()
            case f.Read(True):
                self._transport.resume_reading()
            case f.Read():
                self._transport.pause_reading()
            case f.Close():
                self._transport.close()
            case f.Abort():
                self._transport.abort()
            case f.StopBridge():
                self._bridge.stop()
            case _:
                assert_never(order)

    # --- answers -------------------------------------------------------------------------------------------

    def _start(self, number: int, work: Awaitable[f.Fact]) -> None:
        task = self._tasks[number] = asyncio.ensure_future(self._finish(number, work))
        task.add_done_callback(lambda done: self._over(number, done))

    async def _finish(self, number: int, work: Awaitable[f.Fact]) -> None:
        try:
            fact = await work
        except LlamboError as error:
            fact = f.Failed(number, error.info())
        self.handle(fact)

    def _over(self, number: int, task: asyncio.Task[None]) -> None:
        del self._tasks[number]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an answer has failed: %r", error, exc_info=error)
            self.handle(f.Failed(number, ErrorInfo(Code.INTERNAL, f"the bridge is broken: {error!r}")))

    async def _infer(self, order: f.Infer) -> f.Fact:
        options = order.options
        options["stream"] = order.streamed
        async with self._client.stream(order.prompt, **options) as stream:
            while (piece := await stream.next_piece()) is not None:
                if order.streamed:
                    self.handle(f.Text(order.number, piece.text))
                    await self._room.wait()
            assert stream.answer is not None, "a stream that was read to its end has an answer"
            return f.Done(order.number, told(stream.answer, stream.model, whole=not order.streamed))

    async def _ask(self, number: int, what: str) -> f.Fact:
        if what == "models":
            return f.Done(number, await self._client.query("models"))
        return f.Done(number, {"bridge": self._bridge.numbers(), "mesh": await self._client.query("status")})


def told(answer: Answer, model: str, *, whole: bool) -> dict[str, Any]:
    """What is said of an answer in its last object; its text only if it was not said before."""
    return {
        **({"text": answer.text} if whole else {}),
        "reason": answer.reason,
        "id": answer.id,
        "model": model,
        "tokens": len(answer.ids),
        "prompt_tokens": answer.usage.prompt_tokens,
        "worker": answer.worker,
        "moves": answer.moves,
        "queued_ms": answer.queued_ms,
    }
