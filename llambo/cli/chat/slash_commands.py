"""The commands of a chat that begin with a slash: how they are typed, explained and carried out."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from llambo.cli.chat.dialogue import EXCERPT_CHARS, Dialogue, ModelContext
from llambo.cli.chat.store import NAME_RULE, is_name, matches, one_line
from llambo.cli.commands.status import mesh_facts
from llambo.cli.kit.tables import facts, plural
from llambo.mesh.wire import limits

#: /history alone shows this many turns.
LISTED = 50

KEYS = """\
Enter sends, Alt-Enter begins a new line, and a pasted block stays as it is.
Ctrl-C stops an answer, or empties the line. Ctrl-R searches what you typed
before, Tab completes. Two slashes begin a message that has one: //etc/hosts"""


async def enter(chat: Dialogue, text: str) -> bool:
    """Carry out what the user typed: a command, or a question. False: the user leaves."""
    text = clean(text)
    if text.startswith("/") and not text.startswith("//"):
        word, _, argument = text[1:].rstrip().partition(" ")
        command = BY_NAME.get(word.lower())
        if command is None:
            chat.screen.print(f"there is no command /{one_line(word, EXCERPT_CHARS)}; /help lists them", "warning")
        elif command.run is None:
            return False
        else:
            await command.run(chat, argument.strip())
    elif text.strip():
        await chat.ask(text[1:] if text.startswith("//") else text)
    return True


def clean(text: str) -> str:
    """A terminal may send half characters, which no message can carry."""
    return text.encode(errors="replace").decode().strip("\n")


async def _help(chat: Dialogue, argument: str) -> None:
    rows = [(f"/{command.name} {command.argument}".rstrip(), command.help) for command in COMMANDS]
    width = max(len(typed) for typed, _ in rows)
    chat.screen.print("\n".join([*(f"{typed:<{width}}  {text}" for typed, text in rows), "", KEYS]))


async def _history(chat: Dialogue, argument: str) -> None:
    turns, show = chat.saved.turns, chat.screen.print
    if argument.startswith("#"):
        number = int(argument[1:]) if argument[1:].isdecimal() else 0
        if 1 <= number <= len(turns):
            chat.screen.show_turn(number, turns[number - 1])
        else:
            show(f"there is no turn {argument}; there are {len(turns)}", "warning")
        return
    if argument:
        lines = [f"{number:>4}  {found}" for number, found in matches(turns, argument)]
        show("\n".join(lines) or f"no turn contains {argument!r}")
        return
    first = max(0, len(turns) - LISTED)
    lines = [f"      ({plural(first, 'turn')} before these; /history TEXT finds them)"] if first else []
    for number, turn in enumerate(turns[first:], first + 1):
        if number == chat.saved.context_from + 1 > 1:
            lines.append("      -- begun anew --")
        mark = f" ({turn.mark})" if turn.mark else ""
        lines += [
            f"{number:>4}  you: {one_line(turn.question, EXCERPT_CHARS)}",
            f"      model: {one_line(turn.answer, EXCERPT_CHARS)}{mark}",
        ]
    show("\n".join(lines) or "nothing was asked yet")


async def _clear(chat: Dialogue, argument: str) -> None:
    chat.change(context_from=len(chat.saved.turns))
    chat.context.left_out = chat.context.used = 0
    chat.screen.print("the model begins anew; /history still has the earlier turns", "quiet")


async def _status(chat: Dialogue, argument: str) -> None:
    saved, context = chat.saved, chat.context
    now = [turn for turn in saved.current if turn.answer]
    used = f", the last answer ended at {context.used}" if context.used else ""
    left_out = f", {context.left_out} of them left out" if context.left_out else ""
    found = await chat.client.status()
    facts([
        ("session", saved.name if chat.store is not None else "none: this chat is not saved"),
        ("turns", f"{len(saved.turns)}, {len(now)} since the model began{left_out}"),
        ("asks", saved.model or "the only model there is"),
        ("context", {None: "not asked yet", 0: "no limit"}.get(context.tokens, f"{context.tokens} tokens{used}")),
        ("answers", f"at most {chat.answer_tokens} tokens"),
        ("system", one_line(saved.system, EXCERPT_CHARS) or "none"),
        *mesh_facts(found, chat.client.address),
    ])  # fmt: skip


async def _model(chat: Dialogue, wanted: str) -> None:
    names = await chat.find_models()
    asked = chat.saved.model or (names[0] if len(names) == 1 else "")
    if not wanted:
        lines = [f"{'*' if name == asked else ' '} {name}" for name in names]
        chat.screen.print("\n".join(lines) or "no model is served now", "plain" if lines else "warning")
    elif wanted not in names:
        chat.screen.print(f"no worker serves {wanted}; there is: {', '.join(names) or 'nothing'}", "warning")
    else:
        if wanted != asked:
            chat.context = ModelContext()
        chat.change(model=wanted)
        chat.screen.print(f"{wanted} is asked from now on", "quiet")


async def _system(chat: Dialogue, text: str) -> None:
    if not text:
        chat.screen.print(chat.saved.system or "there is no system message; /system TEXT sets one")
    elif len(text) > limits.SYSTEM_CHARS:
        chat.screen.print(f"at most {limits.SYSTEM_CHARS} characters", "warning")
    else:
        chat.change(system="" if text == "-" else text)
        chat.screen.print("there is no system message any more" if text == "-" else "from now on", "quiet")


async def _save(chat: Dialogue, name: str) -> None:
    if chat.store is None:
        chat.screen.print("this chat is not saved: it was begun with --private", "warning")
    elif name and not is_name(name):
        chat.screen.print(f"{name!r} is not a valid name: {NAME_RULE}", "warning")
    else:
        chat.saved, path = chat.store.save_as(chat.saved, name or chat.saved.name)
        chat.screen.print(f"saved as {chat.saved.name}, in {path}")


async def _session(chat: Dialogue, name: str) -> None:
    before = chat.saved.name
    if not name:
        chat.screen.print(f"this is {before}; `llambo chat --list` shows the others")
    elif chat.store is None:
        chat.screen.print("this chat is not saved, so it cannot change to another one", "warning")
    elif not is_name(name):
        chat.screen.print(f"{name!r} is not a valid name: {NAME_RULE}", "warning")
    elif name != before:
        chat.open(chat.store.open(name, int(time.time())))
        chat.store.unlock(before)
        chat.screen.print(f"{name}: {plural(len(chat.saved.turns), 'turn')} so far", "quiet")


async def _retry(chat: Dialogue, argument: str) -> None:
    if not chat.saved.current:
        chat.screen.print("nothing was asked yet", "warning")
    else:
        await chat.ask(chat.saved.current[-1].question, again=True)


@dataclass(frozen=True, slots=True)
class SlashCommand:
    name: str
    argument: str
    help: str
    #: None: leave.
    run: Callable[[Dialogue, str], Awaitable[None]] | None


COMMANDS = (
    SlashCommand("help", "", "what can be typed here", _help),
    SlashCommand("history", "[TEXT|#N]", "the turns so far; those with TEXT in them; all of turn N", _history),
    SlashCommand("clear", "", "begin anew: the model forgets, the history does not", _clear),
    SlashCommand("status", "", "of this chat and of the mesh", _status),
    SlashCommand("model", "[NAME]", "which models there are; ask this one from now on", _model),
    SlashCommand("system", "[TEXT|-]", "show the system message; set it; `-`: remove it", _system),
    SlashCommand("save", "[NAME]", "where this chat is saved; save it under a name of your own", _save),
    SlashCommand("session", "[NAME]", "go on with another chat", _session),
    SlashCommand("retry", "", "ask the last question again, in place of its answer", _retry),
    SlashCommand("exit", "", "leave, as Ctrl-D does", None),
)
BY_NAME = {command.name: command for command in COMMANDS} | dict.fromkeys(("quit", "bye"), COMMANDS[-1])
