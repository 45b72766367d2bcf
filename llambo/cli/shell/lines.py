"""What a line typed at `llambo>` means: commands, and prompts to the model.

status; nodes                   two commands
send "one; two" --seed 7        quotes as in a shell
What is AI?; really?            its first word is no command: the whole line is a prompt, as it was typed
status; What is AI?             a command, and a prompt up to the end of the line
> why is the sky blue?          a prompt, although `why` is a command
# nothing                       a remark
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass

#: Begins a prompt to the model, whatever its first word is.
TO_MODEL = ">"
REMARK = "#"
#: How similar to a command a single word must be to count as a typing mistake.
SIMILAR = 0.8

_FIRST_WORD = re.compile(r"[^\s;]+")


@dataclass(frozen=True, slots=True)
class CommandCall:
    name: str
    words: tuple[str, ...] = ()
    #: What was typed after the name, unchanged.
    rest: str = ""


@dataclass(frozen=True, slots=True)
class ModelPrompt:
    text: str


class BadLine(ValueError):
    """Nothing of the line is carried out; the text says why."""


def parse(line: str, commands: Collection[str]) -> list[CommandCall | ModelPrompt]:
    """The whole line, before anything of it is carried out: half a line would be worse than none."""
    found: list[CommandCall | ModelPrompt] = []
    rest = line.strip()
    while rest and not rest.startswith(REMARK):
        if rest.startswith(";"):
            rest = rest[1:].lstrip()
            continue
        if rest.startswith(TO_MODEL):
            return [*found, ModelPrompt(rest[len(TO_MODEL) :].strip())]
        first = _FIRST_WORD.match(rest)
        assert first is not None, "it begins neither with a space nor with a semicolon"
        if first[0] not in commands:
            _refuse_typing_mistake(rest, commands)
            return [*found, ModelPrompt(rest)]
        end = end_of_command(rest)
        found.append(_call(rest[:end]))
        rest = rest[end:].lstrip()
    return found


def end_of_command(text: str) -> int:
    """Where the first semicolon outside quotes is; or the end."""
    quote, at = "", 0
    while at < len(text):
        letter = text[at]
        if letter == "\\" and quote != "'":
            at += 1
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == ";":
            return at
        at += 1
    return len(text)


def _call(text: str) -> CommandCall:
    try:
        name, *words = shlex.split(text)
    except ValueError as error:
        hint = "" if text.rstrip().endswith("\\") else f"; begin a prompt to the model with `{TO_MODEL}`"
        raise BadLine(f"{text.strip()!r}: {str(error).lower()}{hint}") from error
    return CommandCall(name, tuple(words), text[len(name) :].strip())


def _refuse_typing_mistake(rest: str, commands: Collection[str]) -> None:
    """A single word that is almost a command is hardly meant for the model."""
    close = difflib.get_close_matches(rest.lower(), commands, 1, SIMILAR) if " " not in rest else []
    if close:
        raise BadLine(f"{rest!r} is no command; {close[0]!r} is, and `{TO_MODEL} {rest}` asks the model")
