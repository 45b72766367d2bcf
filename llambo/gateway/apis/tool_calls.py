"""Tool calls in the text of an answer, taken out of it while it comes.

    Begun, Arguments, Arguments, ..., Ended          one call, its arguments as they are written
    Content                                          everything else

The worker's grammar makes calls of one form (`llambo.mesh.wire.conversation`); the parser knows that form and no
other. What begins like a call and does not go on as one was never a call, and comes out as content: nothing is lost
but the frame of a call, the blanks around it, and a call at the very end whose arguments have not begun. The same text
gives the same deltas however it is cut, when neighbours of one kind are joined.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from llambo.mesh.wire.conversation import CALL_BEGIN, CALL_END, TOOL_NAME

#: The frame around name and arguments; more than that is not one.
FRAME_CHARS = 1024
BLANK = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Begun:
    """Call number `index` of this answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """Some more of the JSON text of the arguments, which is an object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Not `whole`: the answer ended in the middle of the arguments."""

    index: int
    whole: bool = True


Delta = Content | Begun | Arguments | Ended


@dataclass(frozen=True, slots=True)
class Call:
    id: str
    name: str
    #: JSON text.
    arguments: str


class _Blank:
    """Any blanks, or none."""


class _Name:
    """A string of JSON that is the name of a tool."""


_Form = Sequence[str | type[_Blank] | type[_Name]]
_HEAD: _Form = (
    _Blank, "{", _Blank, '"name"', _Blank, ":", _Blank, _Name, _Blank, ",", _Blank, '"arguments"', _Blank, ":", _Blank,
)  # fmt: skip
_TAIL: _Form = (_Blank, "}", _Blank, CALL_END)
#: What can change how deep in an object of JSON one is.
_MARKS = re.compile(r'["\\{}\[\]]')


class ToolCalls:
    """One answer. `seed` is what its ids are made of: the request's id, and the number of the choice if there are
    several, so that a stream that is told again has the same ids."""

    def __init__(self, seed: str, *, prefix: str = "call_") -> None:
        self._seed, self._prefix = seed, prefix
        #: Calls so far, also those under way.
        self.count = 0
        self._step = self._in_content
        #: What was not understood yet: never more than a frame.
        self._held = ""
        #: Blanks that belong to the content if more of it comes, and to nobody if a call does.
        self._blanks: list[str] = []
        self._spoke = False
        self._depth = 0
        self._quoted = self._escaped = False
        self._out: list[Delta] = []

    def feed(self, text: str) -> list[Delta]:
        self._held += text
        while self._held and self._step():
            pass
        return self._taken()

    def finish(self) -> list[Delta]:
        """The answer is over, in whatever place."""
        if self._step == self._in_content and (self._spoke or self.count == 0):
            self._say(self._held)
            if self._blanks:
                self._out.append(Content("".join(self._blanks)))
        elif self._step == self._in_arguments:
            self._out.append(Ended(self.count - 1, whole=False))
        self._held, self._blanks = "", []
        return self._taken()

    def _taken(self) -> list[Delta]:
        out, self._out = self._out, []
        return out

    def _say(self, text: str) -> None:
        """Blanks at the beginning, and after a call, wait for what follows them."""
        if not text:
            return
        if not self._spoke and not text.strip(BLANK):
            self._blanks.append(text)
            return
        self._out.append(Content("".join([*self._blanks, text])))
        self._blanks, self._spoke = [], True

    # --- where in the text: True if it went on ---------------------------------------------------------------------

    def _in_content(self) -> bool:
        before, tag, after = self._held.partition(CALL_BEGIN)
        if tag:
            self._say(before)
            self._held, self._step = after, self._in_head
            return True
        keep = next(
            (n for n in range(min(len(CALL_BEGIN) - 1, len(before)), 0, -1) if before.endswith(CALL_BEGIN[:n])), 0
        )
        self._say(before[: len(before) - keep])
        self._held = before[len(before) - keep :]
        return False

    def _in_head(self) -> bool:
        end, name = _follow(self._held, _HEAD)
        if end is None:
            return False
        if end < 0 or self._held[end] != "{":
            self._say(CALL_BEGIN)
            self._step = self._in_content
            return True
        self._blanks = []
        self._out.append(Begun(self.count, call_id(self._seed, self.count, self._prefix), name))
        self.count += 1
        self._held, self._step = self._held[end:], self._in_arguments
        return True

    def _in_arguments(self) -> bool:
        end = self._end_of_arguments()
        text, self._held = self._held[:end], self._held[end:]
        self._out.append(Arguments(self.count - 1, text))
        if self._depth == 0:
            self._out.append(Ended(self.count - 1))
            self._step, self._spoke = self._in_tail, False
        return True

    def _end_of_arguments(self) -> int:
        """Where in what is held the object is closed, or all of it."""
        text, at = self._held, 0
        if self._escaped:
            self._escaped, at = False, 1
        while (mark := _MARKS.search(text, at)) is not None:
            char, at = mark.group(), mark.end()
            if char == "\\" and self._quoted:
                self._escaped = at == len(text)
                at += 1
            elif char == '"':
                self._quoted = not self._quoted
            elif not self._quoted and char != "\\":
                self._depth += 1 if char in "{[" else -1
                if self._depth == 0:
                    return at
        return len(text)

    def _in_tail(self) -> bool:
        end, _ = _follow(self._held, _TAIL)
        if end is None:
            return False
        self._held = self._held[max(end, 0) :]
        self._step = self._in_content
        return True


def _follow(text: str, form: _Form) -> tuple[int | None, str]:
    """Where the form ends and the name in it; None if it may still come, below 0 if it will not.

    Decided by the place where it goes wrong, so that it is the same for every cut of the text. A form that ends with
    blanks is there only when what follows them is.
    """
    at, name = 0, ""
    for part in form:
        if part is _Blank:
            while at < len(text) and text[at] in BLANK:
                at += 1
        elif part is _Name:
            found = _name_at(text, at)
            if found is None or not found:
                return (None if found is None else -1), ""
            name, at = found, at + len(found) + 2
        else:
            assert isinstance(part, str)
            if not text.startswith(part, at):
                come = text[at : at + len(part)]
                return (None if part.startswith(come) and len(text) < FRAME_CHARS else -1), ""
            at += len(part)
        if at > FRAME_CHARS:
            return -1, ""
    if at == len(text) and form[-1] is _Blank:
        return None, name
    return at, name


def _name_at(text: str, at: int) -> str | None:
    """The name in quotes here; empty if it is none, None if it may become one."""
    if at == len(text):
        return None
    end = text.find('"', at + 1)
    whole, name = end >= 0, text[at + 1 : end if end >= 0 else len(text)]
    if text[at] != '"' or (name and not TOOL_NAME.fullmatch(name)):
        return ""
    return name if whole else None


def call_id(seed: str, index: int, prefix: str = "call_") -> str:
    """Always the same one for the same call of the same answer."""
    return prefix + sha256(f"{seed}:{index}".encode()).hexdigest()[:24]


def collect(text: str, seed: str, *, prefix: str = "call_") -> tuple[str, list[Call]]:
    """A whole answer: its content, and its calls. A call that is not whole is there, too, as far as it came."""
    parser = ToolCalls(seed, prefix=prefix)
    content: list[str] = []
    begun: list[tuple[Begun, list[str]]] = []
    for delta in [*parser.feed(text), *parser.finish()]:
        match delta:
            case Content(text):
                content.append(text)
            case Begun():
                begun.append((delta, []))
            case Arguments(index, text):
                begun[index][1].append(text)
    return "".join(content), [Call(call.id, call.name, "".join(parts)) for call, parts in begun]


# --- What an answer consists of while it comes: text, and tool calls if there are tools. ---


class Parser(Protocol):
    def feed(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]: ...


class Plain:
    """Without tools nothing looks like a call."""

    def feed(self, text: str) -> list[Delta]:
        return [Content(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


def parser_of(tools: bool, seed: str, prefix: str) -> Parser:
    return ToolCalls(seed, prefix=prefix) if tools else Plain()


def deltas_of(text: str, tools: bool, seed: str, prefix: str) -> list[Delta]:
    """Of a whole answer."""
    parser = parser_of(tools, seed, prefix)
    return [*parser.feed(text), *parser.finish()]
