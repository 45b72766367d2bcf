"""What a line typed at `llambo>` says: commands, and prompts to the model. Pure text in, orders out.

status; nodes                   two commands
send "one; two" --seed 7        quotes as in a shell
What is AI?; really?            its first word is no command: all of the line is a prompt, as it was typed
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

#: Begins what is for the model whatever its first word is.
TO_MODEL = ">"
REMARK = "#"
#: How like a command a single word must be to be taken for a mistyped one.
LIKE = 0.8

_FIRST_WORD = re.compile(r"[^\s;]+")


@dataclass(frozen=True, slots=True)
class Order:
    """A command by its name, and what it is told."""

    name: str
    words: tuple[str, ...] = ()
    #: What was typed after the name, as it was typed.
    rest: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something said to the model."""

    text: str


class BadLine(ValueError):
    """Nothing of the line is done; the text says why."""


def parse(line: str, commands: Collection[str]) -> list[Order | Prompt]:
    """All of a line, before anything of it is done: half a line would be worse than none."""
    found: list[Order | Prompt] = []
    rest = line.strip()
    while rest and not rest.startswith(REMARK):
        if rest.startswith(";"):
            rest = rest[1:].lstrip()
            continue
        if rest.startswith(TO_MODEL):
            return [*found, Prompt(rest[len(TO_MODEL) :].strip())]
        first = _FIRST_WORD.match(rest)
        assert first is not None, "it begins neither with a space nor with a semicolon"
        if first[0] not in commands:
            _not_mistyped(rest, commands)
            return [*found, Prompt(rest)]
        end = end_of_order(rest)
        found.append(_order(rest[:end]))
        rest = rest[end:].lstrip()
    return found


def end_of_order(text: str) -> int:
    """Where the first semicolon is that no quotes hold; or the end."""
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


def _order(text: str) -> Order:
    try:
        name, *words = shlex.split(text)
    except ValueError as error:
        say = f"; begin with `{TO_MODEL}` what is for the model" if "quotation" in str(error) else ""
        raise BadLine(f"{text.strip()!r}: {str(error).lower()}{say}") from error
    return Order(name, tuple(words), text[len(name) :].strip())


def _not_mistyped(rest: str, commands: Collection[str]) -> None:
    """A single word that is almost a command was hardly meant for the model."""
    if " " in rest:
        return
    close = difflib.get_close_matches(rest.lower(), commands, 1, LIKE)
    if close:
        raise BadLine(f"{rest!r} is no command; {close[0]!r} is, and `{TO_MODEL} {rest}` asks the model")
