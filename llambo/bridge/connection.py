"""One connection of the bridge: a task that reads commands, and a task for each answer under way.

Commands are carried out in order: the next one is looked at when the one before it has been answered. A command with
a tag is the exception: its answer comes beside others, and each object of it has the tag.

Three rules keep a connection from costing more than itself:

- The socket is read only while the reading task has nothing left to do, so unread bytes are at most one read of
  asyncio and one unfinished command.
- Nothing is begun or continued while more than `WRITE_BYTES` wait for the peer to read. This is checked before each
  command, not once per read: since Python 3.12 asyncio adds up the sizes of all waiting writes at each write, and
  100,000 short replies in the queue would block the loop, and with it all other connections, for minutes.
- A connection carries out one command in each turn of the loop, however many arrive at once.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from llambo.bridge import protocol
from llambo.bridge.holds import Holds
from llambo.bridge.protocol import Command, LineParser, Mistake, ObjectParser, Parsed, Parser, Reply, Tag
from llambo.mesh.client.client import Client
from llambo.mesh.client.model_loading import row_of
from llambo.mesh.wire.errors import Code, ErrorInfo, LlamboError
from llambo.mesh.wire.reports import ModelRow

log = logging.getLogger(__name__)

#: Bytes that may wait for a peer to read them.
WRITE_BYTES = 64 * 1024
STOPPED = ErrorInfo(Code.CANCELLED, "the bridge is stopping")


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What each connection may do."""

    line_bytes: int = 1024 * 1024
    #: Answers under way at a time.
    in_flight: int = 16
    quit_stops: bool = False


class Owner(Protocol):
    """What a connection needs of its bridge."""

    client: Client
    connection_limits: ConnectionLimits
    holds: Holds

    def joined(self, connection: Connection, descriptor: int) -> None: ...
    def left(self, descriptor: int) -> None: ...
    def stop(self) -> None: ...
    def numbers(self) -> dict[str, int]: ...


class Connection(asyncio.Protocol):
    def __init__(self, bridge: Owner) -> None:
        self._bridge = bridge
        self._limits = bridge.connection_limits
        #: What LOAD has loaded, in this order; requests that name no model go to the last.
        self._models: dict[str, None] = {}
        #: Its name as a holder of models.
        self._holder = bridge.holds.holder()
        self._parser: Parser = LineParser(self._limits.line_bytes)
        self._encode: protocol.Encode = protocol.encode_line
        #: Answers under way, and the command each belongs to.
        self._answers: dict[asyncio.Task[None], Command] = {}
        #: Set when bytes or the end of input have arrived; set while there is room for more output.
        self._arrived, self._room = asyncio.Event(), asyncio.Event()
        self._room.set()
        self._finished = self._hung_up = False
        #: An answer has to be complete before the next command.
        self._waits = False
        self._transport: asyncio.Transport
        self._commands: asyncio.Task[None]
        self._task: asyncio.Task[None]

    @property
    def answers(self) -> int:
        return len(self._answers)

    # --- called by asyncio ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(WRITE_BYTES)
        self._commands = asyncio.create_task(self._carry_out_commands())
        self._task = asyncio.create_task(self._run())
        self._bridge.joined(self, self._descriptor())

    def data_received(self, data: bytes) -> None:
        self._transport.pause_reading()
        self._parser.feed(data)
        self._arrived.set()

    def eof_received(self) -> bool:
        """True keeps the other direction open: `nc -N` ends its output and waits for the answers."""
        self._finished = True
        self._arrived.set()
        return True

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._cancel_answers()
        self._free()
        self._task.cancel()
        self._bridge.left(self._descriptor())

    def _descriptor(self) -> int:
        number: int = self._transport.get_extra_info("socket").fileno()
        return number

    # --- called by the bridge ------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """The peer has closed its socket. Unless it had ended its output or waits for an answer, its last bytes may
        still be unread, with a QUIT among them: then the end of the input closes the connection."""
        self._hung_up = True
        self._cancel_answers()
        if self._finished or self._waits:
            self.abort()

    def stop(self) -> None:
        """Begin no more commands. The connection closes when its answers are complete."""
        self._commands.cancel()

    def cut_short(self) -> None:
        """End now: answers under way end with an error."""
        self._commands.cancel()
        for command in self._cancel_answers():
            self._write(command, protocol.error_reply(STOPPED))

    def abort(self) -> None:
        self._transport.abort()

    # --- commands ------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await asyncio.wait({self._commands})
            while self._answers:
                await asyncio.wait(self._answers)
            if not self._commands.cancelled() and (error := self._commands.exception()) is not None:
                log.error("a connection has failed: %r", error, exc_info=error)
            self._transport.close()
        finally:
            self._commands.cancel()

    async def _carry_out_commands(self) -> None:
        while (parsed := await self._next()) is not None:
            if isinstance(parsed, Command):
                done = await self._carry_out(parsed)
            else:
                self._write(parsed, protocol.mistake_reply(parsed))
                done = parsed.fatal
            if done:
                self._cancel_answers()
                return
            await asyncio.sleep(0)
            await self._room.wait()

    async def _next(self) -> Parsed | None:
        while (parsed := self._parser.next()) is None:
            if self._finished:
                return self._parser.end()
            self._arrived.clear()
            self._transport.resume_reading()
            await self._arrived.wait()
        return parsed

    async def _carry_out(self, command: Command) -> bool:
        """True if nothing comes after it."""
        match command.name:
            case "PING":
                self._write(command, protocol.ok("pong", {}))
            case "FREE":
                self._write(command, self._free(command.fields.get("model", "")))
            case "BINARY":
                self._switch_to_msgpack(command)
            case "QUIT":
                self._write(command, protocol.ok("bye", {}))
                if self._limits.quit_stops:
                    self._bridge.stop()
                return True
            case _ if self._hung_up:
                pass
            case _ if len(self._answers) >= self._limits.in_flight:
                text = f"{self._limits.in_flight} answers are under way on this connection, which is the limit"
                hint = "wait for one of them, or open another connection"
                self._write(command, protocol.mistake_reply(Mistake(text, hint, code=Code.OVER_LIMIT)))
            case _:
                task = asyncio.create_task(self._answer(command))
                self._answers[task] = command
                task.add_done_callback(self._forget)
                if command.tag is None:
                    self._waits = True
                    await asyncio.wait({task})
                    self._waits = False
        return False

    def _switch_to_msgpack(self, command: Command) -> None:
        """The reply is still a line. The next byte is the first one of msgpack."""
        if not isinstance(self._parser, LineParser):
            self._write(command, protocol.mistake_reply(Mistake("this connection is binary already")))
            return
        self._write(command, protocol.ok("binary", {"format": "msgpack"}))
        rest = self._parser.rest()
        self._parser, self._encode = ObjectParser(self._limits.line_bytes), protocol.encode_object
        self._parser.feed(rest)

    # --- answers -------------------------------------------------------------------------------------------

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._answers.pop(task, None)

    def _cancel_answers(self) -> list[Command]:
        """Cancel what is under way. Returns its commands."""
        commands = list(self._answers.values())
        for task in self._answers:
            task.cancel()
        self._answers.clear()
        return commands

    async def _answer(self, command: Command) -> None:
        try:
            match command.name:
                case "STATUS":
                    reply = await self._status()
                case "LOAD":
                    reply = await self._load(command.fields["model"])
                case _:
                    reply = await self._infer(command)
        except LlamboError as error:
            reply = protocol.error_reply(error.info())
        except Exception as error:
            log.exception("an answer has failed")
            reply = protocol.error_reply(ErrorInfo(Code.INTERNAL, f"the bridge is broken: {error!r}"))
        self._write(command, reply)

    async def _status(self) -> Reply:
        mesh = await self._bridge.client.query("status")
        rows = {row["model"]: row for row in mesh.get("models", ())}
        loaded = [self._loaded(model, rows.get(model, {})) for model in self._models]
        return protocol.ok(
            "up", {"model": self._model, "loaded": loaded, "bridge": self._bridge.numbers(), "mesh": mesh}
        )

    def _loaded(self, model: str, row: dict[str, Any]) -> dict[str, Any]:
        """What this connection has loaded, as it is now."""
        found = msgspec.convert(row, ModelRow)
        own = [there for there in found.hosts if any(name.endswith(self._holder) for name in there.holders)]
        where = {"host": own[0].host, "percent": own[0].percent} if own else {}
        return {"model": model, "state": own[0].state if own else found.state, **where}

    async def _load(self, model: str) -> Reply:
        served = await self._bridge.client.models()
        found = next((row for row in served if row.model == model), None)
        if found is None:
            names = ", ".join(row.model for row in served) or "none"
            return protocol.error_reply(
                ErrorInfo(Code.UNKNOWN_MODEL, f"no worker has {model}; there is {names}"[:2_000])
            )
        self._models.pop(model, None)
        self._models[model] = None
        if found.hosts:
            found = await self._held(model)
        return protocol.ok("loaded", msgspec.to_builtins(found))

    async def _held(self, model: str) -> ModelRow:
        try:
            await self._bridge.holds.load(model, self._holder)
        except LlamboError:
            self._models.pop(model, None)
            raise
        if model not in self._models:
            raise LlamboError(Code.CANCELLED, f"{model} was given back meanwhile")
        return await row_of(self._bridge.client, model)

    @property
    def _model(self) -> str:
        return next(reversed(self._models), "")

    def _free(self, model: str = "") -> Reply:
        """Give it back; without a name all of them."""
        if model and model not in self._models:
            text = f"{model} is not loaded on this connection"
            return protocol.mistake_reply(Mistake(text, "STATUS shows what is loaded; FREE alone gives back all of it"))
        chosen = model or self._model
        for each in [model] if model else list(self._models):
            del self._models[each]
            self._bridge.holds.give_back(each, self._holder)
        return protocol.ok("free", {"model": chosen})

    async def _infer(self, command: Command) -> Reply:
        prompt, options = protocol.request_of(command, self._model)
        options["stream"] = command.streamed
        async with self._bridge.client.stream(prompt, **options) as stream:
            while (piece := await stream.next_piece()) is not None:
                if command.streamed and piece.text:
                    self._send(command.tag, protocol.token(piece.text))
                    await self._room.wait()
            answer = stream.answer
            assert answer is not None, "a stream that was read to its end has an answer"
        data: dict[str, Any] = {} if command.streamed else {"text": answer.text}
        data |= {
            "reason": answer.reason,
            "id": answer.id,
            "model": stream.model,
            "tokens": len(answer.ids),
            "prompt_tokens": answer.usage.prompt_tokens,
            "worker": answer.worker,
            "moves": answer.moves,
            "queued_ms": answer.queued_ms,
        }
        data |= {"fake": True} if answer.fake else {}
        return protocol.ok(answer.reason, data)

    # --- output --------------------------------------------------------------------------------------------

    def _write(self, to: Command | Mistake, reply: Reply) -> None:
        self._send(to.tag, protocol.final(reply) if to.streamed else reply)

    def _send(self, tag: Tag, reply: Reply) -> None:
        if not self._hung_up and not self._transport.is_closing():
            self._transport.write(self._encode(reply if tag is None else {**reply, "tag": tag}))
