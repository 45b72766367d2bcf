"""A chat as it is kept: turns, and what was set for it. Plain values; `chat_store` puts them into files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llambo.mesh.wire import limits

#: Files of another format are left alone.
FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
NAME_RULE = "letters, digits, `_`, `-` and `.`, at most 64 of them, and neither `.` nor `-` first"
#: Characters to either side of what a search has found.
AROUND = 30

#: Why an answer ended. `stopped`: by the person who had asked; `cancelled`: by somebody else.
Ending = Literal["stop", "length", "stopped", "cancelled", "deadline", "failed"]
Seconds = Annotated[int, Meta(ge=0, le=2**53)]


class Turn(msgspec.Struct, frozen=True, omit_defaults=True):
    """A question and what was answered. A turn without an answer is kept, but never sent to a model."""

    question: str
    answer: str = ""
    ending: Ending = "stop"
    #: When it was asked, in seconds since 1970.
    at: Seconds = 0
    model: str = ""
    tokens: int = 0

    @property
    def mark(self) -> str:
        """What is to be known of an answer that is not whole."""
        return (
            "" if self.ending == "stop" else {"length": "cut", "deadline": "out of time"}.get(self.ending, self.ending)
        )


class Session(msgspec.Struct, frozen=True):
    name: str = ""
    format: int = FORMAT
    created: Seconds = 0
    used: Seconds = 0
    #: What to ask; empty: the only one there is.
    model: Annotated[str, Meta(max_length=limits.NAME_CHARS)] = ""
    system: Annotated[str, Meta(max_length=limits.SYSTEM_CHARS)] = ""
    #: The name was made up and not chosen.
    unnamed: bool = False
    #: Turns before this one are remembered by the file, and not told to the model any more.
    context_from: Annotated[int, Meta(ge=0)] = 0
    turns: list[Turn] = []

    @property
    def current(self) -> list[Turn]:
        return self.turns[self.context_from :]


def is_name(text: str) -> bool:
    return NAME.fullmatch(text) is not None


def matches(turns: list[Turn], text: str) -> Iterator[tuple[int, str]]:
    """The number of each turn in which this stands, whatever its case, and what stands around it."""
    wanted = re.compile(re.escape(text), re.IGNORECASE)
    for number, turn in enumerate(turns, 1):
        for who, said in (("you", turn.question), ("model", turn.answer)):
            if found := wanted.search(said):
                yield number, f"{who}: {_excerpt(said, found.start(), found.end())}"


def _excerpt(text: str, start: int, end: int) -> str:
    first, last = max(0, start - AROUND), min(len(text), end + AROUND)
    return f"{'…' if first else ''}{one_line(text[first:last])}{'…' if last < len(text) else ''}"


def turn_count(number: int) -> str:
    return f"{number} turn{'s' if number != 1 else ''}"


def one_line(text: str, most: int = 0) -> str:
    line = " ".join(text.split())
    return f"{line[: most - 1]}…" if most and len(line) > most else line
