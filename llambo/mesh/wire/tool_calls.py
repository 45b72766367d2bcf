"""Separates tool calls from the rest of an answer while its text arrives.

    CallBegun, CallArguments, CallArguments, ..., CallEnded          one call, its arguments as they are written
    Content                                                          everything else

The worker's grammar makes calls of one form (`llambo.mesh.wire.conversation`); the parser knows no other. Text that
begins like a call and does not continue as one comes out as content. Nothing is lost except the frame of a call, the
blanks around it, and a call at the very end whose arguments have not begun. The deltas do not depend on how the text
is cut into pieces, if neighbours of one kind are joined.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from llambo.mesh.wire.conversation import CALL_BEGIN, CALL_END, TOOL_NAME

#: Longer text around name and arguments is not a frame.
FRAME_CHARS = 1024
BLANK = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """Call number `index` of this answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of the JSON text of the arguments, which is an object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """`whole` is False if the answer ended in the middle of the arguments."""

    index: int
    whole: bool = True


Delta = Content | CallBegun | CallArguments | CallEnded


class _Blank:
    """Any number of blanks."""


class _Name:
    """A JSON string with the name of a tool."""


_Form = Sequence[str | type[_Blank] | type[_Name]]
_HEAD: _Form = (
    _Blank, "{", _Blank, '"name"', _Blank, ":", _Blank, _Name, _Blank, ",", _Blank, '"arguments"', _Blank, ":", _Blank,
)  # fmt: skip
_TAIL: _Form = (_Blank, "}", _Blank, CALL_END)
#: What can change the nesting depth in an object of JSON.
_MARKS = re.compile(r'["\\{}\[\]]')


class ToolCalls:
    """The parser for one answer. Ids of calls are derived from `seed`, so that a resumed stream has the same ids."""

    def __init__(self, seed: str, *, prefix: str = "call_") -> None:
        self._seed, self._prefix = seed, prefix
        #: Calls so far, also those under way.
        self.count = 0
        self._step = self._in_content
        #: Text that cannot be classified yet: never more than a frame.
        self._pending = ""
        #: Blanks that belong to the content if more content follows, and are dropped if a call follows.
        self._blanks: list[str] = []
        #: Content has come since the beginning or the last call.
        self._in_text = False
        self._depth = 0
        self._quoted = self._escaped = False
        self._out: list[Delta] = []

    def feed(self, text: str) -> list[Delta]:
        self._pending += text
        while self._pending and self._step():
            pass
        return self._take()

    def finish(self) -> list[Delta]:
        """The answer has ended, perhaps in the middle of a call."""
        if self._step == self._in_content and (self._in_text or self.count == 0):
            self._content(self._pending)
            if self._blanks:
                self._out.append(Content("".join(self._blanks)))
        elif self._step == self._in_arguments:
            self._out.append(CallEnded(self.count - 1, whole=False))
        self._pending, self._blanks = "", []
        return self._take()

    def _take(self) -> list[Delta]:
        out, self._out = self._out, []
        return out

    def _content(self, text: str) -> None:
        """Blanks at the beginning and after a call wait for what follows them."""
        if not text:
            return
        if not self._in_text and not text.strip(BLANK):
            self._blanks.append(text)
            return
        self._out.append(Content("".join([*self._blanks, text])))
        self._blanks, self._in_text = [], True

    # The states. Each returns True if it consumed something.

    def _in_content(self) -> bool:
        before, tag, after = self._pending.partition(CALL_BEGIN)
        if tag:
            self._content(before)
            self._pending, self._step = after, self._in_head
            return True
        keep = next(
            (n for n in range(min(len(CALL_BEGIN) - 1, len(before)), 0, -1) if before.endswith(CALL_BEGIN[:n])), 0
        )
        self._content(before[: len(before) - keep])
        self._pending = before[len(before) - keep :]
        return False

    def _in_head(self) -> bool:
        end, name = _follow(self._pending, _HEAD)
        if end is None:
            return False
        if end < 0 or self._pending[end] != "{":
            self._content(CALL_BEGIN)
            self._step = self._in_content
            return True
        self._blanks = []
        self._out.append(CallBegun(self.count, call_id(self._seed, self.count, self._prefix), name))
        self.count += 1
        self._pending, self._step = self._pending[end:], self._in_arguments
        return True

    def _in_arguments(self) -> bool:
        end = self._end_of_arguments()
        text, self._pending = self._pending[:end], self._pending[end:]
        self._out.append(CallArguments(self.count - 1, text))
        if self._depth == 0:
            self._out.append(CallEnded(self.count - 1))
            self._step, self._in_text = self._in_tail, False
        return True

    def _end_of_arguments(self) -> int:
        """The position in the pending text at which the object is closed; else its length."""
        text, at = self._pending, 0
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
        end, _ = _follow(self._pending, _TAIL)
        if end is None:
            return False
        self._pending = self._pending[max(end, 0) :]
        self._step = self._in_content
        return True


def _follow(text: str, form: _Form) -> tuple[int | None, str]:
    """Where the form ends, and the name in it. None: more text is needed; -1: the text does not have this form.

    The result depends only on the position of the first mismatch, so it is the same however the text is cut. A form
    that ends with blanks is complete only when the character after them is there.
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
    """The quoted name at this position. Empty: there is none; None: more text is needed."""
    if at == len(text):
        return None
    end = text.find('"', at + 1)
    whole, name = end >= 0, text[at + 1 : end if end >= 0 else len(text)]
    if text[at] != '"' or (name and not TOOL_NAME.fullmatch(name)):
        return ""
    return name if whole else None


def call_id(seed: str, index: int, prefix: str = "call_") -> str:
    """The same id for the same call of the same answer."""
    return prefix + sha256(f"{seed}:{index}".encode()).hexdigest()[:24]


class PlainText:
    """The parser for an answer without tools: nothing in it is a call."""

    def feed(self, text: str) -> list[Delta]:
        return [Content(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


Parser = ToolCalls | PlainText


def parser_of(tools: bool, seed: str, prefix: str) -> Parser:
    return ToolCalls(seed, prefix=prefix) if tools else PlainText()


@dataclass(frozen=True, slots=True)
class CalledTool:
    """One call of a tool in an answer."""

    #: For the `tool_call_id` of the message with its result.
    id: str
    #: The name of the tool.
    name: str
    #: A JSON object, as text. It is cut off if the answer ended in the middle of it.
    arguments: str


def split_calls(text: str, seed: str) -> tuple[str, list[CalledTool]]:
    """A whole answer: the text beside its calls, and the calls."""
    parser = ToolCalls(seed)
    content: list[str] = []
    calls: list[tuple[CallBegun, list[str]]] = []
    for delta in [*parser.feed(text), *parser.finish()]:
        match delta:
            case Content(part):
                content.append(part)
            case CallBegun():
                calls.append((delta, []))
            case CallArguments(index, part):
                calls[index][1].append(part)
    return "".join(content), [CalledTool(begun.id, begun.name, "".join(parts)) for begun, parts in calls]
