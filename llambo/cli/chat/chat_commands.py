"""The commands of a chat, as they are typed and explained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChatCommand:
    name: str
    argument: str
    help: str


COMMANDS = (
    ChatCommand("help", "", "what can be typed here"),
    ChatCommand("history", "[TEXT|#N]", "the turns so far; those with TEXT in them; turn N as a whole"),
    ChatCommand("clear", "", "begin anew: the model forgets, the history does not"),
    ChatCommand("status", "", "of this chat and of the mesh"),
    ChatCommand("model", "[NAME]", "which models there are; ask this one from now on"),
    ChatCommand("system", "[TEXT|-]", "how the model is told to behave; change it; `-`: no more"),
    ChatCommand("save", "[NAME]", "where this chat is kept; keep it under a name of your own"),
    ChatCommand("session", "[NAME]", "go on with another chat"),
    ChatCommand("retry", "", "ask the last question again, in place of its answer"),
    ChatCommand("exit", "", "leave, as Ctrl-D does"),
)
BY_NAME = {command.name: command for command in COMMANDS} | {"quit": ChatCommand("exit", "", "")}

KEYS = """\
Enter sends, Alt-Enter begins a new line, and a pasted block stays as it is.
Ctrl-C stops an answer, or empties the line. Ctrl-R searches what you typed
before, Tab completes. Two slashes begin a message that has one: //etc/hosts"""


def help_text() -> str:
    rows = [(f"/{command.name} {command.argument}".rstrip(), command.help) for command in COMMANDS]
    width = max(len(typed) for typed, _ in rows)
    return "\n".join([*(f"{typed:<{width}}  {told}" for typed, told in rows), "", KEYS])


def parse(text: str) -> tuple[str, str]:
    """(command, argument) of a line that begins with a slash; for one that means nothing the command is empty."""
    word, _, argument = text[1:].partition(" ")
    command = BY_NAME.get(word.lower())
    return (command.name, argument.strip()) if command is not None else ("", word)
