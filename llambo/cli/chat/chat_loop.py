"""A chat from its beginning to its end: a single question, or a conversation at a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
import msgspec

from llambo.cli.chat.chat_core import CHAT_TOKENS, ChatCore
from llambo.cli.chat.chat_session import Session, one_line, turn_count
from llambo.cli.chat.chat_shell import Talk
from llambo.cli.chat.chat_store import Store
from llambo.cli.chat.chat_tell import Teller
from llambo.cli.chat.chat_view import AnswerView, DrawnAnswer, JsonAnswer, PlainAnswer, width
from llambo.cli.kit.ask import connect
from llambo.cli.kit.command import silence_stdout
from llambo.cli.kit.common import Common
from llambo.cli.kit.exits import Exit
from llambo.cli.kit.following import tell_link
from llambo.cli.kit.out import Out
from llambo.cli.kit.views import statistics_line

if TYPE_CHECKING:
    from rich.console import Console

    from llambo.cli.chat.chat_prompt import Prompt
    from llambo.mesh.client.answer_stream import Stream
    from llambo.mesh.client.request_options import Options

HISTORY = "chat_history"


def talk(common: Common, store: Store, question: str | None, **chosen: Any) -> int:
    """The exit code."""
    try:
        return asyncio.run(_Chat(common, store, chosen).run(question))
    except BrokenPipeError:
        silence_stdout()
        return Exit.OK
    finally:
        store.close()


class _Chat:
    def __init__(self, common: Common, store: Store, chosen: dict[str, Any]) -> None:
        self._common = common
        self._store = store
        self._chosen = chosen
        self._colours = not (chosen["no_color"] or os.environ.get("NO_COLOR"))

    async def run(self, question: str | None) -> int:
        core = ChatCore(
            self._session(question), max_tokens=self._max_tokens(), turns=self._chosen["turns"],
            keeps=self._keeps(question),
        )  # fmt: skip
        console = self._console()
        teller = Teller(_renderer(console), aside=question is not None, colours=self._colours)
        async with connect(self._common) as client:
            with contextlib.closing(Out(sys.stdout.fileno())) as out:
                store = self._store if self._keeps(question) else None
                chat = Talk(client, core, store, out, teller, self._view(out, console), self._options())
                if question is None:
                    with _keys_unseen():
                        return await self._converse(chat, client.address, teller)
                if self._common.verbose or sys.stderr.isatty():
                    client.on_link = tell_link
                code = await self._answer_once(chat, question)
                if self._common.verbose and chat.told is not None:
                    click.echo(statistics_line(*chat.told), err=True)
                return code

    # --- one question ----------------------------------------------------------------------------------

    async def _answer_once(self, chat: Talk, question: str) -> int:
        stop = chat.listen(lambda: None)
        try:
            # Nobody types commands here.
            await chat.enter(f"/{question}" if question.startswith("/") else question)
        finally:
            stop()
        if chat.interrupted:
            return 128 + chat.signal if chat.signal else Exit.INTERRUPTED
        if chat.error is not None:
            raise chat.error
        return Exit.ERROR if chat.ending == "cancelled" else Exit.OK

    # --- a conversation --------------------------------------------------------------------------------

    async def _converse(self, chat: Talk, address: str, teller: Teller) -> int:
        prompt = self._prompt(chat, teller)
        typing: asyncio.Task[str | None] | None = None

        def stop_typing() -> None:
            if typing is not None:
                typing.cancel()

        unlisten = chat.listen(stop_typing)
        turns = chat.core.session.turns
        await chat.look()
        teller.say(f"llambo chat at {address}; /help tells what can be typed", "quiet")
        if turns:
            teller.say(f"{turn_count(len(turns))} so far, the last: {one_line(turns[-1].question, 50)}", "quiet")
        try:
            while not chat.left and not chat.signal:
                typing = asyncio.get_running_loop().create_task(prompt.line())
                await asyncio.wait({typing})
                if typing.cancelled():
                    break
                line = typing.result()
                if line is None:
                    teller.say("/exit or Ctrl-D leaves", "quiet")
                    continue
                await chat.enter(line)
        except EOFError:
            pass
        finally:
            unlisten()
        session = chat.core.session
        if self._keeps(None) and session.turns:
            teller.say(f"kept; `llambo chat --session {session.name}` goes on with it", "quiet")
        return 128 + chat.signal if chat.signal else Exit.OK

    def _prompt(self, chat: Talk, teller: Teller) -> Prompt:
        from llambo.cli.chat.chat_prompt import ChatCompleter, Prompt, open_history

        path = None if self._chosen["private"] else self._store.folder.parent / HISTORY
        history = open_history(
            path, lambda error: teller.say(f"what you type is not remembered: {path}: {error.strerror}", "warning")
        )
        completer = ChatCompleter(lambda: chat.models, self._store.names)
        prompt = Prompt(history, completer, lambda: "no broker answers" if chat.lost else "", colours=self._colours)

        def on_link(lost: str) -> None:
            chat.lost = lost
            prompt.refresh()

        chat.client.on_link = on_link
        return prompt

    # --- what was chosen -------------------------------------------------------------------------------

    def _keeps(self, question: str | None) -> bool:
        return bool(self._chosen["session"]) or (question is None and not self._chosen["private"])

    def _session(self, question: str | None) -> Session:
        now_s = int(time.time())
        name = self._chosen["session"]
        if name:
            session = self._store.open(name, now_s)
        else:
            session = Session(_made_up(self._store), created=now_s, used=now_s, unnamed=True)
            if self._keeps(question):
                self._store.take(session.name)
        settings = self._common.settings
        model = settings.text("client_model")
        if model and (not session.model or "client_model" in self._common.flags):
            session = msgspec.structs.replace(session, model=model)
        if self._chosen["system"] is not None:
            session = msgspec.structs.replace(session, system=self._chosen["system"])
        return session

    def _max_tokens(self) -> int:
        settings = self._common.settings
        return CHAT_TOKENS if settings.sources["max_tokens"] == "default" else settings.number("max_tokens")

    def _options(self) -> Options:
        settings = self._common.settings
        said = settings.sources["temperature"] != "default"
        return {"temperature": settings.real("temperature") if said else None, "seed": self._chosen["seed"]}

    # --- what it looks like ----------------------------------------------------------------------------

    def _console(self) -> Console | None:
        """None: stdout is no terminal, or one that cannot draw."""
        if self._chosen["as_json"] or not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
            return None
        from rich.console import Console

        return Console(no_color=not self._colours, highlight=False)

    def _view(self, out: Out, console: Console | None) -> Callable[[Stream], AnswerView]:
        if self._chosen["as_json"]:
            return lambda stream: JsonAnswer(out, stream)
        if console is None:
            return lambda stream: PlainAnswer(out)
        return lambda stream: DrawnAnswer(out, console)


def _renderer(console: Console | None) -> Callable[[str], str] | None:
    if console is None:
        return None
    from llambo.cli.chat.chat_markdown import lines_of
    from llambo.mesh.wire.errors import printable

    return lambda text: "\n".join(lines_of(console, printable(text), width()))


def _made_up(store: Store) -> str:
    """When it began, as a name that nobody has yet."""
    begun = time.strftime("%Y-%m-%d-%H%M%S")
    name, more = begun, 1
    while store.exists(name):
        name, more = f"{begun}-{more}", more + 1
    return name


@contextlib.contextmanager
def _keys_unseen() -> Iterator[None]:
    """What is typed while an answer comes is for the next line, and must not be shown in the middle of it.

    Not even by the terminal itself, which would also keep a Ctrl-D to itself; while one edits, the prompt is in charge.
    """
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = termios.tcgetattr(descriptor)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
