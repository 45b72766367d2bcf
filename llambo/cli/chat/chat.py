"""`llambo chat`: a conversation at a terminal, one question from a script, or the saved chats."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
import time
import tty
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import msgspec

from llambo.cli.chat.dialogue import CHAT_TOKENS, TURNS, AskOptions, Dialogue, Signals
from llambo.cli.chat.screen import Screen
from llambo.cli.chat.slash_commands import COMMANDS, clean, enter
from llambo.cli.chat.store import SavedChat, Store, Turn, matches, one_line
from llambo.cli.commands.send import read_stdin
from llambo.cli.kit.answer_views import StdoutWriter, statistics_line
from llambo.cli.kit.command import Command, silence_stdout
from llambo.cli.kit.common import Common, asked_model, connect, state_folder
from llambo.cli.kit.failure import Exit, Failure
from llambo.cli.kit.flags import Seed, client_options, json_option, setting_option, settings_options
from llambo.cli.kit.follow import on_end_signals, report_link
from llambo.cli.kit.tables import duration, number, plural, show_json, table
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.naming import is_listed_otherwise, with_adapter

if TYPE_CHECKING:
    from llambo.cli.chat.prompt import ChatPrompt

HISTORY_FILE = "chat_history"
STOPPED = "stopped before there was an answer"

EXAMPLES = """
llambo chat                                a conversation; /help in it
llambo chat --session travel               go on with one, or begin it
llambo chat "What is AI?"                  one answer
git diff | llambo chat "Explain this"      about what comes from a pipe
llambo chat --session travel "And by train?"
llambo chat --list                         the saved chats
llambo chat --search "night train"         in all of them
llambo chat --json --search train | jq -r '.[].session'
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFlags:
    session: str | None
    private: bool
    turns: int
    system: str | None
    lora: str | None
    seed: int | None
    no_color: bool
    as_json: bool

    @property
    def colours(self) -> bool:
        return not (self.no_color or os.environ.get("NO_COLOR"))


@click.command(cls=Command, examples=EXAMPLES, exit_codes=True)
@click.argument("prompt", nargs=-1, metavar="[PROMPT|-]")
@click.option(
    "--session", metavar="NAME", help="Go on with this chat, or begin it.",
    shell_complete=lambda context, parameter, typed: [name for name in _store().names() if name.startswith(typed)],
)  # fmt: skip
@click.option("--list", "listed", is_flag=True, help="List the saved chats, the last used one first.")
@click.option("--search", metavar="TEXT", help="Find this text in all saved chats.")
@click.option("--delete", metavar="NAME", help="Remove a saved chat.")
@click.option("--private", is_flag=True, help="Save nothing: neither the chat nor the lines that are typed.")
@click.option(
    "--turns", type=click.IntRange(0, 10_000), default=TURNS, metavar="NUMBER", show_default=True,
    help="The most earlier turns that are sent along with a question.",
)  # fmt: skip
@click.option("--system", metavar="TEXT", help="The system message: how the model shall behave.")
@click.option("--lora", metavar="NAME", help="With this adapter of the model.")
@click.option("--seed", type=Seed(), metavar="NUMBER", help="The same seed, the same chances.")
@click.option("--no-color", is_flag=True, help="Without colours, as with NO_COLOR in the environment.")
@json_option
@setting_option("max_tokens", default=str(CHAT_TOKENS))
@settings_options(["client_model", "temperature", "connect_ms"])
@client_options
def chat(
    common: Common, /, prompt: tuple[str, ...], as_json: bool, listed: bool, search: str | None, delete: str | None,
    **chosen: Any,
) -> None:  # fmt: skip
    """Talk with a model. Without PROMPT a conversation; with one, or with stdin, a single answer.

    A conversation is saved in a file that only its owner can read, in $XDG_STATE_HOME/llambo/chats. It gets a
    generated name, and --session continues it. A single answer is saved only with --session. If the context of the
    model is full, the oldest turns are left out, and a notice says so. The longest answer is at most half of the
    context.

    Ctrl-C stops an answer and leaves what there is of it. PROMPT and stdin together are one question. With --json a
    single answer has the lines of `llambo send --json`.
    """
    if sum([listed, search is not None, delete is not None, bool(prompt)]) > 1:
        raise click.UsageError("--list, --search, --delete and a PROMPT: one at a time")
    flags = ChatFlags(as_json=as_json, **chosen)
    if flags.private and flags.session:
        raise click.UsageError("--private saves nothing, so there is no --session")
    if listed:
        _list(_store(), as_json)
    elif search is not None:
        _search(_store(), search, as_json)
    elif delete is not None:
        _delete(_store(), delete)
    else:
        _talk(common, _question(prompt), flags)


def _store() -> Store:
    return Store(state_folder(os.environ, "chats"))


# --- saved chats ---------------------------------------------------------------------------------------


def _list(store: Store, as_json: bool) -> None:
    found = sorted(store.all(), key=lambda each: each.chat.used if each.chat else 0, reverse=True)
    if as_json:
        show_json([
            {"session": each.name, "problem": each.problem}
            | ({"turns": len(each.chat.turns), "created": each.chat.created, "used": each.chat.used,
                "model": each.chat.model, "first": _first(each.chat.turns)} if each.chat else {})
            for each in found
        ])  # fmt: skip
        return
    rows = [
        (each.name, number(len(each.chat.turns)), _ago(each.chat.used), one_line(_first(each.chat.turns), 50))
        for each in found if each.chat is not None
    ]  # fmt: skip
    table(["session", "turns", "used", "begins with"], rows, nothing=f"no chat is saved in {store.folder}", fixed=1)
    for each in found:
        if each.problem:
            click.echo(f"llambo: {each.problem}", err=True)


def _first(turns: list[Turn]) -> str:
    return turns[0].question if turns else ""


def _ago(used_s: int) -> str:
    """In days from two days on."""
    ago_s = max(0.0, time.time() - used_s)
    return f"{ago_s // 86_400:.0f} days ago" if ago_s > 2 * 86_400 else f"{duration(ago_s * 1_000)} ago"


def _search(store: Store, text: str, as_json: bool) -> None:
    if not text.strip():
        raise click.UsageError("--search: there is nothing to look for")
    found = [
        (each.name, turn, excerpt)
        for each in store.all() if each.chat is not None
        for turn, excerpt in matches(each.chat.turns, text)
    ]  # fmt: skip
    if as_json:
        show_json([{"session": name, "turn": turn, "said": excerpt} for name, turn, excerpt in found])
    else:
        rows = [(name, number(turn), excerpt) for name, turn, excerpt in found]
        table(["session", "turn", "said"], rows, nothing=f"no chat contains {text!r}", fixed=1)


def _delete(store: Store, name: str) -> None:
    if store.exists(name):
        store.lock(name)
    if not store.delete(name):
        raise LlamboError(Code.BAD_REQUEST, f"there is no saved chat called {name}; `llambo chat --list` shows them")
    click.echo(f"{name} is removed")


# --- talking -------------------------------------------------------------------------------------------


def _question(arguments: tuple[str, ...]) -> str | None:
    """The arguments, stdin, or both. None: the user will type it."""
    words = " ".join(word for word in arguments if word != "-")
    if sys.stdin.isatty() and "-" not in arguments:
        return words if arguments else None
    return "\n\n".join(part for part in (words, read_stdin()) if part)


def _talk(common: Common, question: str | None, flags: ChatFlags) -> None:
    if question is None:
        if flags.as_json:
            raise click.UsageError("--json is for a single answer, --list and --search")
        if not sys.stdout.isatty():
            raise click.UsageError("a conversation needs a terminal; give a PROMPT for a single answer")
    elif not question.strip():
        raise LlamboError(Code.BAD_REQUEST, "the prompt is empty", hint="give a prompt, as an argument or on stdin")
    if len(flags.system or "") > limits.SYSTEM_CHARS:
        raise click.UsageError(f"--system may have {limits.SYSTEM_CHARS} characters")
    store = _store()
    saves = bool(flags.session) or (question is None and not flags.private)
    try:
        saved = _saved_chat(common, store, saves, flags)
        code = asyncio.run(_run(common, store if saves else None, saved, question, flags))
    except BrokenPipeError:
        silence_stdout()
        code = Exit.OK
    finally:
        store.close()
    click.get_current_context().exit(code)


def _saved_chat(common: Common, store: Store, saves: bool, flags: ChatFlags) -> SavedChat:
    """The chat to continue, or a new one, locked if it is saved."""
    now_s, changes, settings = int(time.time()), dict[str, str](), common.settings
    if flags.session:
        saved = store.open(flags.session, now_s)
    else:
        saved = SavedChat(_generated_name(store), created=now_s, used=now_s, unnamed=True)
        if saves:
            store.lock(saved.name)
    model = asked_model(settings.text("client_model"))
    if model and (not saved.model or "client_model" in common.flags):
        changes["model"] = model
    if flags.lora:
        changes["model"] = with_adapter(changes.get("model", saved.model), flags.lora)
    if flags.system is not None:
        changes["system"] = flags.system
    return msgspec.structs.replace(saved, **changes)


def _generated_name(store: Store) -> str:
    """The time now, with a number behind it if that name is taken."""
    begun = time.strftime("%Y-%m-%d-%H%M%S")
    name, more = begun, 1
    while store.exists(name):
        name, more = f"{begun}-{more}", more + 1
    return name


async def _run(common: Common, store: Store | None, saved: SavedChat, question: str | None, flags: ChatFlags) -> int:
    """The exit code."""
    settings = common.settings
    given = settings.sources
    options = AskOptions(
        max_tokens=CHAT_TOKENS if given["max_tokens"] == "default" else settings.number("max_tokens"),
        turns=flags.turns,
        temperature=settings.real("temperature") if given["temperature"] != "default" else None,
        seed=flags.seed,
    )
    async with connect(common) as client:
        with contextlib.closing(StdoutWriter(sys.stdout.fileno())) as out:
            screen, signals = _screen(out, question, flags), Signals()
            dialogue = Dialogue(client, saved, store, screen, signals, options)
            with on_end_signals(signals.receive):
                if question is None:
                    return await _converse(dialogue, signals, _prompt(dialogue, flags))
                return await _answer_once(dialogue, signals, question, common)


def _screen(out: StdoutWriter, question: str | None, flags: ChatFlags) -> Screen:
    console = None
    if not flags.as_json and sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        from rich.console import Console

        console = Console(no_color=not flags.colours, highlight=False)
    to_stderr = question is not None
    return Screen(out, console, colours=flags.colours, notices_to_stderr=to_stderr, as_json=flags.as_json)


async def _answer_once(chat: Dialogue, signals: Signals, question: str, common: Common) -> int:
    if common.verbose or sys.stderr.isatty():
        chat.client.on_link = report_link
    try:
        await signals.run(chat.ask(clean(question)))
    except LlamboError:
        if not signals.interrupted:
            raise
    if signals.interrupted and chat.ending is None:
        chat.screen.print(STOPPED, "quiet")
    if common.verbose and chat.answered is not None:
        click.echo(statistics_line(*chat.answered), err=True)
    if signals.interrupted:
        return 128 + signals.ended_by if signals.ended_by else Exit.INTERRUPTED
    return Exit.ERROR if chat.ending == "cancelled" else Exit.OK


async def _converse(chat: Dialogue, signals: Signals, prompt: ChatPrompt) -> int:
    show, turns = chat.screen.print, chat.saved.turns
    with _no_echo():
        await signals.run(chat.find_models())
        show(f"llambo chat at {chat.client.address}{_with_model(chat)}; /help lists the commands", "quiet")
        if turns:
            show(f"{plural(len(turns), 'turn')} so far, the last: {one_line(turns[-1].question, 50)}", "quiet")
        while not signals.ended_by:
            try:
                line = await signals.run(prompt.line())
                if line is None:
                    if not signals.ended_by:
                        show("/exit or Ctrl-D leaves", "quiet")
                    continue
                stays = await signals.run(enter(chat, line))
            except EOFError:
                break
            except LlamboError as error:
                failure = Failure.of(error)
                show(f"{failure.message}\n  {failure.hint}" if failure.hint else failure.message, "error")
                continue
            if stays is None:
                show(STOPPED, "quiet")
            elif not stays:
                break
    if chat.store is not None and chat.saved.turns:
        show(f"saved; `llambo chat --session {chat.saved.name}` goes on with it", "quiet")
    return 128 + signals.ended_by if signals.ended_by else Exit.OK


def _with_model(chat: Dialogue) -> str:
    """Which model answers, or which there are to choose from."""
    names = [name for name in chat.models if not is_listed_otherwise(name, chat.models)]
    if chat.saved.model or len(names) == 1:
        return f", with {chat.saved.model or names[0]}"
    return f", /model chooses one of {', '.join(names[:5])}" if names else ""


def _prompt(chat: Dialogue, flags: ChatFlags) -> ChatPrompt:
    from llambo.cli.chat.prompt import ChatCompleter, ChatPrompt, open_history

    path = None if flags.private else state_folder(os.environ, HISTORY_FILE)
    history = open_history(
        path, lambda error: chat.screen.print(f"lines are not remembered: {path}: {error.strerror}", "warning")
    )
    names = chat.store.names if chat.store is not None else list
    completer = ChatCompleter(
        {command.name: command.help for command in COMMANDS},
        {"model": lambda: chat.models, "session": names, "save": names},
    )
    prompt = ChatPrompt(history, completer, lambda: "no broker answers" if chat.lost else "", colours=flags.colours)

    def on_link(lost: str) -> None:
        chat.lost = lost
        prompt.refresh()

    chat.client.on_link = on_link
    return prompt


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    """What is typed while an answer arrives belongs to the next line, and must not be shown within the answer.

    Without ICANON the terminal does not hold a Ctrl-D back, either. While a line is edited the prompt sets the mode.
    """
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor, termios.TCSANOW)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
