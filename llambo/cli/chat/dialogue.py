"""The dialogue with a model: what is sent along with a question, and what is saved of the answer.

    learn the size of the model's context (once for a model)
    -> find how many earlier turns fit into it -> ask -> show the answer while it arrives -> save the turn

One question is asked at a time, and each step waits for the one before. An error of the mesh is raised to the caller,
after what there is of the answer has been saved. A signal cancels the task that runs `ask`; while an answer arrives,
the first one cancels the request instead, so that its end can still be read (`Interrupts`).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from llambo.cli.chat.screen import Screen, Waiting
from llambo.cli.chat.store import Ending, SavedChat, Store, Turn, one_line
from llambo.cli.kit.answer_views import Clock, show
from llambo.cli.kit.follow import Interrupts
from llambo.cli.kit.progress import wait_shown
from llambo.mesh.wire.errors import Code, LlamboError

if TYPE_CHECKING:
    from llambo.mesh.client.answer_stream import Answer, Stream
    from llambo.mesh.client.client import Client

T = TypeVar("T")
#: (role, content), as the template of a model reads them.
Messages = tuple[tuple[str, str], ...]

#: Earlier turns that are sent along with a question, if there is room.
TURNS = 50
#: The default of the longest answer.
CHAT_TOKENS = 1024
#: A question that leaves less than this for its answer is too long.
LEAST_ANSWER = 16
#: How much of a question a notice quotes.
EXCERPT_CHARS = 60


@dataclass(frozen=True, slots=True)
class AskOptions:
    """What holds for every question."""

    max_tokens: int = CHAT_TOKENS
    turns: int = TURNS
    temperature: float | None = None
    seed: int | None = None


@dataclass(slots=True)
class ModelContext:
    """What is known of the context of the model."""

    #: None: not asked yet; 0: no limit.
    tokens: int | None = None
    #: What the last question and its answer took of it.
    used: int = 0
    #: The earlier turns that were left out, as last reported to the user.
    left_out: int = 0


class Dialogue:
    def __init__(
        self, client: Client, saved: SavedChat, store: Store | None, screen: Screen, signals: Signals,
        options: AskOptions,
    ) -> None:  # fmt: skip
        """`store`: None if nothing is saved."""
        self.client = client
        self.saved = saved
        self.store = store
        self.screen = screen
        self.context = ModelContext()
        #: The names of the models that were served when they were last asked for.
        self.models: tuple[str, ...] = ()
        #: Why the broker is lost; empty while it is there.
        self.lost = ""
        #: The last answer that came to its end, and its times.
        self.answered: tuple[Answer, Clock] | None = None
        self.ending: Ending | None = None
        self._signals = signals
        self._options = options
        self._retries = 0

    async def find_models(self) -> tuple[str, ...]:
        self.models = tuple(row.model for row in await self.client.models())
        return self.models

    @property
    def answer_tokens(self) -> int:
        """At most half of the context: the question and the earlier turns need room, too."""
        context, most = self.context.tokens, self._options.max_tokens
        return min(most, context // 2) if context else most

    # --- asking ----------------------------------------------------------------------------------------

    async def ask(self, question: str, *, again: bool = False) -> None:
        """`again`: the last question, in place of its answer, with another seed. Its own answer is not sent along."""
        asked_at = int(time.time())
        self._retries = self._retries + 1 if again else 0
        turns = self.saved.current[:-1] if again else self.saved.current
        with wait_shown(self.client, hidden=self.screen.as_json):
            if self.context.tokens is None:
                self.context.tokens = _context_of(await self.client.model_info(model=self.saved.model or None))
            messages, most = await self._fitted(question, [turn for turn in turns if turn.answer])
        text, stream, error = await self._answer(messages, most)
        answer = stream.answer
        self.ending = _ending(answer.reason if answer else "error" if error else "cancelled", self._signals.interrupted)
        tokens, prompt_tokens = (len(answer.ids), answer.usage.prompt_tokens) if answer else (0, 0)
        self.context.used = prompt_tokens + tokens if prompt_tokens else 0
        turn = Turn(question, text, self.ending, asked_at, stream.model, tokens)
        stays = again and bool(self.saved.turns[-1].answer) and not text
        if not stays:
            before = self.saved.turns[:-1] if again else self.saved.turns
            self.change(turns=[*before, turn], used=asked_at)
        await self.screen.out.flush()
        if stays:
            self.screen.print("the earlier answer stays", "quiet")
        if error is not None:
            raise error
        match self.ending:
            case "length":
                self.screen.print(f"cut after {tokens} tokens; --max-tokens allows more", "quiet")
            case "stopped":
                self.screen.print("stopped", "quiet")
            case "cancelled":
                self.screen.print("another client cancelled it", "warning")
            case "deadline":
                self.screen.print("out of time", "warning")

    async def _fitted(self, question: str, earlier: list[Turn]) -> tuple[Messages, int]:
        """The messages to send, and the longest answer there is room for."""
        turns = earlier[-self._options.turns :] if self._options.turns else []
        system = (("system", self.saved.system),) if self.saved.system else ()

        def messages(count: int) -> Messages:
            sent = turns[len(turns) - count :]
            pairs = [part for turn in sent for part in (("user", turn.question), ("assistant", turn.answer))]
            return (*system, *pairs, ("user", question))

        async def count_tokens(count: int) -> int:
            prompt = _encoded(messages(count))
            return len((await self.client.tokenize(prompt, form="messages", model=self.saved.model or None)).ids)

        most, context = self.answer_tokens, self.context.tokens or 0
        # A token has at least one byte. If the bytes fit into half of the room, so do the tokens and a template.
        size = sum(len(content.encode()) for _, content in messages(len(turns)))
        fits = len(turns)
        if context and size * 2 > context - most:
            fits, tokens = await most_that_fit(len(turns), context - most, count_tokens)
            if fits < 0:
                fits, most = 0, context - tokens
                if most < LEAST_ANSWER:
                    text = f"this message has {tokens} tokens, and the context of the model {context}"
                    raise LlamboError(Code.TOO_LONG, f"{text}; it was not sent")
                self.screen.print(f"this message is long: {most} tokens are left for the answer", "warning")
        self._report_left_out(earlier, fits)
        return messages(fits), most

    def _report_left_out(self, earlier: list[Turn], sent: int) -> None:
        """Each time it changes: the user must know what the model does not see."""
        left_out, before = len(earlier) - sent, self.context.left_out
        self.context.left_out = left_out
        if left_out and left_out != before:
            first = f"first {left_out} turns are" if left_out > 1 else "first turn is"
            by_number = sent == self._options.turns
            why = f"--turns {self._options.turns}" if by_number else f"its context has {self.context.tokens} tokens"
            begin = one_line(earlier[-sent].question, EXCERPT_CHARS) if sent else ""
            seen = f"what it sees begins at {begin!r}" if sent else "it sees only this"
            self.screen.print(f"the {first} left out of what the model sees ({why}); {seen}", "warning")

    async def _answer(self, messages: Messages, max_tokens: int) -> tuple[str, Stream, LlamboError | None]:
        """What there is of the answer, its stream, and the error it failed with."""
        seed, texts = self._options.seed, list[str]()
        if seed is not None:
            seed = (seed + self._retries) % 2**63
        error: LlamboError | None = None
        stream = self.client.stream(
            _encoded(messages), form="messages", model=self.saved.model or None, max_tokens=max_tokens, seed=seed,
            temperature=self._options.temperature,
        )  # fmt: skip
        with Interrupts(cancels=True, session=self._signals).installed() as interrupts:
            interrupts.stream = stream
            view = self.screen.answer_view(stream, Waiting(self.client, stream, lambda: self.lost))
            try:
                async with stream:
                    self.answered = await show(stream, view, self.screen.out, texts)
            except LlamboError as failed:
                error = failed
            except asyncio.CancelledError:
                if not self._signals.interrupted:
                    raise
            finally:
                view.close()
        return "".join(texts), stream, error

    # --- what is saved ---------------------------------------------------------------------------------

    def change(self, **changes: Any) -> None:
        self.saved = msgspec.structs.replace(self.saved, **changes)
        # A chat without a turn is not worth a file.
        if self.store is not None and self.saved.turns:
            self.store.save(self.saved)

    def open(self, saved: SavedChat) -> None:
        """Continue with another chat."""
        same = saved.model == self.saved.model
        self.saved, self._retries = saved, 0
        self.context = ModelContext(self.context.tokens if same else None)


async def most_that_fit(most: int, room: int, count_tokens: Callable[[int], Awaitable[int]]) -> tuple[int, int]:
    """How many of the `most` latest turns fit into `room` tokens, and the tokens they are together with the question.

    -1 turns: not even the question alone fits, and the tokens are those of the question. Only the model can count its
    tokens, so each count is a request; everything is tried first, then each count halves what is left to decide.
    """
    fits, tokens, too_many, tried = -1, 0, most + 1, most
    while too_many - fits > 1:
        counted = await count_tokens(tried)
        if counted <= room:
            fits, tokens = tried, counted
        else:
            too_many = tried
            tokens = tokens if tried else counted
        tried = (fits + too_many) // 2
    return fits, tokens


class Signals:
    """Ctrl-C stops what runs, and not the chat. SIGTERM and SIGHUP stop it and end the chat, a second one at once."""

    def __init__(self) -> None:
        #: A signal came while the last work ran.
        self.interrupted = False
        #: The signal that ends the chat, or 0.
        self.ended_by = 0
        #: Called at a signal while an answer arrives; otherwise the work is cancelled.
        self.on_signal: Callable[[int], None] | None = None
        self._work: asyncio.Future[Any] | None = None

    async def run(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`, which runs as a task of its own. None: a signal has cancelled it."""
        self.interrupted = False
        self._work = task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task})
        finally:
            self._work = None
        return None if task.cancelled() else task.result()

    def receive(self, number: int) -> None:
        if number != signal.SIGINT:
            if self.ended_by:
                os._exit(128 + number)
            self.ended_by = number
        if self._work is not None:
            self.interrupted = True
            if self.on_signal is not None:
                self.on_signal(number)
            else:
                self._work.cancel()


def _ending(reason: str, interrupted: bool) -> Ending:
    match reason:
        case "stop" | "length" | "deadline":
            return reason
        case "cancelled":
            return "stopped" if interrupted else "cancelled"
        case _:
            return "failed"


def _encoded(messages: Messages) -> str:
    return json.dumps([{"role": role, "content": content} for role, content in messages], ensure_ascii=False)


def _context_of(info: dict[str, Any]) -> int:
    """A worker may report anything."""
    context = info.get("context_tokens", 0)
    if not isinstance(context, int) or context < 0:
        raise LlamboError(Code.BAD_MESSAGE, f"the model's context is reported as {context!r}")
    return context
