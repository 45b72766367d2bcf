"""Carries out what the core of a chat orders: asks the mesh, shows, keeps files, and hears Ctrl-C.

What runs between two lines of the person is one *exchange*: an event, its orders, the facts they bring, and so on
until nothing is left to do. It is a task of its own, so that Ctrl-C ends it and never the program.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, assert_never

from llambo.cli.chat import chat_events as e
from llambo.cli.chat.chat_answer import Waiting, read
from llambo.cli.chat.chat_core import ChatCore
from llambo.cli.chat.chat_session import Ending
from llambo.cli.chat.chat_store import Store
from llambo.cli.chat.chat_tell import Teller
from llambo.cli.chat.chat_view import AnswerView
from llambo.cli.commands.status import mesh_facts
from llambo.cli.kit.failure import Failure
from llambo.cli.kit.following import END_WAIT_S, end_signals
from llambo.cli.kit.out import Out
from llambo.cli.kit.views import Clock
from llambo.mesh.wire.errors import Code, LlamboError

if TYPE_CHECKING:
    from llambo.mesh.client.answer_stream import Answer, Stream
    from llambo.mesh.client.client import Client
    from llambo.mesh.client.request_options import Options

MakeView = Callable[["Stream"], AnswerView]


class Talk:
    """One chat with one mesh."""

    def __init__(
        self, client: Client, core: ChatCore, store: Store | None, out: Out, teller: Teller, view: MakeView,
        options: Options,
    ) -> None:  # fmt: skip
        self.client = client
        self.core = core
        self.left = False
        #: The signal that ends the program, or 0.
        self.signal = 0
        #: What the last exchange failed of.
        self.error: LlamboError | None = None
        self.interrupted = False
        self.ending: Ending | None = None
        #: The last answer that came to its end, and how long it took.
        self.told: tuple[Answer, Clock] | None = None
        self.models: tuple[str, ...] = ()
        #: Why there is no broker now; empty while there is one.
        self.lost = ""
        self._store = store
        self._out = out
        self._teller = teller
        self._view = view
        self._options = options
        self._stream: Stream | None = None
        self._work: asyncio.Task[None] | None = None
        self._cancelling: list[asyncio.Task[None]] = []

    async def look(self) -> None:
        """Which models there are, for who begins to type the name of one."""
        self.models = tuple(row.model for row in await self.client.models())

    # --- one exchange ----------------------------------------------------------------------------------

    async def enter(self, text: str) -> None:
        await self.exchange(e.Entered(text, int(time.time())))

    async def exchange(self, event: e.Event) -> None:
        """Returns when all is done that follows of it. SIGINT stops it, and so do the signals that end the program."""
        self.error, self.interrupted, self.ending = None, False, None
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._on_interrupt)
        try:
            self._work = loop.create_task(self._carry_out(event))
            await asyncio.wait({self._work})
            if self._work.cancelled():
                await self._carry_out(e.Interrupted())
            else:
                self._work.result()
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            self._work = self._stream = None

    async def _carry_out(self, event: e.Event) -> None:
        facts = [event]
        while facts:
            for order in self.core.handle(facts.pop(0)):
                try:
                    fact = await self._perform(order)
                except LlamboError as error:
                    self.error = error
                    failure = Failure.of(error)
                    fact = e.Failed(failure.message, failure.hint)
                if fact is not None:
                    facts.append(fact)
        await self._out.flush()

    # --- signals ---------------------------------------------------------------------------------------

    def listen(self, stop: Callable[[], None]) -> Callable[[], None]:
        """SIGTERM and SIGHUP end an exchange, and then the program. `stop` is called where none runs."""
        loop = asyncio.get_running_loop()
        numbers = [number for number in end_signals() if number != signal.SIGINT]

        def end(number: int) -> None:
            if self.signal:
                os._exit(128 + number)
            self.signal = number
            if self._work is None:
                stop()
            else:
                self._on_interrupt()

        for number in numbers:
            loop.add_signal_handler(number, end, number)

        def unlisten() -> None:
            for number in numbers:
                loop.remove_signal_handler(number)

        return unlisten

    def _on_interrupt(self) -> None:
        work, stream = self._work, self._stream
        if work is None:
            return
        if stream is None or self.interrupted:
            # No answer has begun, or its end is not worth waiting for.
            self.interrupted = True
            work.cancel()
            return
        self.interrupted = True
        loop = asyncio.get_running_loop()
        self._cancelling.append(loop.create_task(stream.cancel()))
        loop.call_later(END_WAIT_S, self._give_up, stream)

    def _give_up(self, stream: Stream) -> None:
        if self._stream is stream and self._work is not None:
            self._work.cancel()

    # --- orders ----------------------------------------------------------------------------------------

    async def _perform(self, order: e.Order) -> e.Event | None:
        match order:
            case e.Say(text, tone):
                await self._tell(lambda: self._teller.say(text, tone))
            case e.ShowTurn(number, turn):
                await self._tell(lambda: self._teller.turn(number, turn))
            case e.ShowStatus(facts):
                found = await self.client.query("status")
                await self._tell(lambda: self._teller.facts([*facts, *mesh_facts(found, self.client.address)]))
            case e.Learn(model):
                return e.Learned(_context_of(await self.client.model_info(model=model or None)))
            case e.Count(model, messages):
                prompt = _encoded(messages)
                return e.Counted(len((await self.client.tokenize(prompt, form="messages", model=model or None)).ids))
            case e.Ask():
                return await self._ask(order)
            case e.Refuse(problem):
                raise LlamboError(Code.TOO_LONG, problem)
            case e.FindModels(wanted):
                await self.look()
                return e.ModelsFound(self.models, wanted)
            case e.Keep() | e.KeepAs() | e.Open():
                return await self._file(order)
            case e.Leave():
                self.left = True
            case _:
                assert_never(order)
        return None

    async def _tell(self, say: Callable[[], None]) -> None:
        await self._out.flush()
        say()

    async def _file(self, order: e.Keep | e.KeepAs | e.Open) -> e.Event | None:
        if self._store is None:
            return None
        match order:
            case e.Keep(session):
                self._store.save(session)
            case e.KeepAs(session, name):
                kept, path = self._store.keep_as(session, name)
                return e.Kept(kept, str(path))
            case e.Open(name):
                return e.Opened(self._store.change(self.core.session.name, name, int(time.time())))
        return None

    # --- an answer -------------------------------------------------------------------------------------

    async def _ask(self, order: e.Ask) -> e.Answered:
        options: dict[str, Any] = {**self._options, "model": order.model or None, "max_tokens": order.max_tokens}
        if options.get("seed") is not None:
            options["seed"] = (options["seed"] + order.tries) % 2**63
        texts: list[str] = []
        problem: LlamboError | None = None
        async with self.client.stream(_encoded(order.messages), form="messages", **options) as stream:
            self._stream = stream
            view = self._view(stream)
            try:
                waiting = Waiting(self.client, stream, lambda: self.lost)
                clock = await read(stream, view, self._out, waiting, texts.append)
                assert stream.answer is not None, "a stream that was read to its end has an answer"
                self.told = stream.answer, clock
            except LlamboError as error:
                problem = self.error = error
            except asyncio.CancelledError:
                if not self.interrupted:
                    raise
            finally:
                self._stream = None
        return self._answered(stream, "".join(texts), problem)

    def _answered(self, stream: Stream, text: str, problem: LlamboError | None) -> e.Answered:
        answer = stream.answer
        self.ending = _ending(answer.reason if answer else "error" if problem else "cancelled", self.interrupted)
        failure = Failure.of(problem) if problem is not None else None
        return e.Answered(
            text,
            self.ending,
            len(answer.ids) if answer else 0,
            answer.usage.prompt_tokens if answer else 0,
            stream.model,
            failure.message if failure else "",
            failure.hint if failure else "",
        )


def _ending(reason: str, interrupted: bool) -> Ending:
    match reason:
        case "stop" | "length" | "deadline":
            return reason
        case "cancelled":
            return "stopped" if interrupted else "cancelled"
        case _:
            return "failed"


def _encoded(messages: e.Messages) -> str:
    return json.dumps([{"role": role, "content": content} for role, content in messages], ensure_ascii=False)


def _context_of(info: dict[str, Any]) -> int:
    """From a worker, that may say anything."""
    context = info.get("context_tokens", 0)
    if not isinstance(context, int) or context < 0:
        raise LlamboError(Code.BAD_MESSAGE, f"the model's context is said to be {context!r}")
    return context
