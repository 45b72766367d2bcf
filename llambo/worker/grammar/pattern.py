r"""A regular expression of a JSON schema, as a grammar rule for the text between the quotes of a JSON string.

Literals, classes, groups, alternatives, repetitions and anchors at the ends are supported; without an anchor any text
is allowed at that end. Look-around, back-references and other anchors are not. Characters that JSON escapes can be
matched by a literal (`\"`, `\\`, `\n`), and are left out of classes: the grammar then allows less than the expression.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

#: llama.cpp refuses more repetitions.
MOST_TIMES = 2_000
#: Levels of nested groups.
MOST_DEEP = 50

#: Code points from the first to the last.
Span = tuple[int, int]
_LAST = 0x10FFFF
#: Characters that need no escape in a JSON string.
_PLAIN: list[Span] = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0x80, 0xD7FF), (0xE000, _LAST)]
_DIGIT: list[Span] = [(0x30, 0x39)]
_WORD: list[Span] = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_SPACE: list[Span] = [(0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x2028, 0x2029), (0xFEFF, 0xFEFF)]
_SHORT = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CONTROL = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_JSON = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\f": "\\f"}


def pattern_rule(pattern: str, rule: Callable[[str], str]) -> str:
    """`rule` adds a rule and returns its name. Raises ValueError."""
    reader = _Reader(pattern, rule)
    body = reader.alternatives(0)
    if reader.at < len(pattern):
        reader.fail("a closing bracket too many")
    return body


class _Reader:
    def __init__(self, pattern: str, rule: Callable[[str], str]) -> None:
        self._pattern = pattern
        self._rule = rule
        self.at = 0

    def fail(self, why: str) -> NoReturn:
        raise ValueError(f"the pattern {self._pattern[:100]!r} cannot be used: {why}, at character {self.at}")

    @property
    def _next(self) -> str:
        return self._pattern[self.at : self.at + 1]

    def _take(self) -> str:
        char = self._next
        if not char:
            self.fail("it ends too early")
        self.at += 1
        return char

    def alternatives(self, depth: int) -> str:
        if depth > MOST_DEEP:
            self.fail(f"more than {MOST_DEEP} groups within each other")
        ways = [self._sequence(depth)]
        while self._next == "|":
            self.at += 1
            ways.append(self._sequence(depth))
        return f"({' | '.join(ways)})"

    def _sequence(self, depth: int) -> str:
        """At the ends of the whole pattern, where there is no anchor, any text is allowed."""
        parts: list[str] = []
        begins = ends = False
        while self._next not in ("", "|", ")"):
            if ends:
                self.fail("there is something after the end")
            if self._next == "^" and depth == 0 and not parts and not begins:
                begins, self.at = True, self.at + 1
            elif self._next == "$" and depth == 0:
                ends, self.at = True, self.at + 1
            else:
                parts.append(self._repeated(self._one(depth)))
        if depth == 0:
            anything = f"{self._rule(_written(_PLAIN))}*"
            parts = [anything] * (not begins) + parts + [anything] * (not ends)
        return " ".join(parts) or '""'

    def _one(self, depth: int) -> str:
        char = self._take()
        if char == "(":
            if self._next == "?":
                self.at += 1
                if self._take() != ":":
                    self.fail("this kind of group is not supported")
            body = self.alternatives(depth + 1)
            if self._take() != ")":
                self.fail("a bracket is not closed")
            return body
        if char == "[":
            return self._class()
        if char == ".":
            return _written(_PLAIN)
        if char == "\\":
            return self._escaped()
        if char in "*+?{^$":
            self.fail(f"{char!r} is not expected")
        return _literal(char)

    def _repeated(self, one: str) -> str:
        start, times = self.at, self._next
        match times:
            case "*" | "+" | "?":
                self.at += 1
            case "{":
                end = self._pattern.find("}", start)
                low, comma, high = self._pattern[start + 1 : max(end, start)].partition(",")
                if not low.isdecimal() or (high and not high.isdecimal()) or max(len(low), len(high)) > 5:
                    self.fail("a number of times is expected")
                if int(low) > MOST_TIMES or (high and int(high) < int(low)):
                    self.fail(f"from {low} to {high} times")
                most = "" if comma and not high else min(int(high or low), MOST_TIMES)
                times = f"{{{int(low)},{most}}}"
                self.at = end + 1
            case _:
                return one
        if self._next == "?":  # lazy: makes no difference to what matches
            self.at += 1
        if self._next in ("*", "+", "?", "{"):
            self.fail("repeated twice")
        return f"{self._rule(one)}{times}"

    def _escaped(self) -> str:
        char = self._take()
        if char.lower() in _SHORT:
            spans = _SHORT[char.lower()]
            return _written(_both(_PLAIN, _all_but(spans) if char.isupper() else spans))
        return _literal(self._plain(char))

    def _plain(self, char: str) -> str:
        """The character that an escape stands for."""
        if char in "xu":
            digits = self._pattern[self.at : self.at + (2 if char == "x" else 4)]
            if len(digits) != (2 if char == "x" else 4) or any(each not in "0123456789abcdefABCDEF" for each in digits):
                self.fail("a number in hexadecimal digits is expected")
            self.at += len(digits)
            return chr(int(digits, 16))
        if char in _CONTROL:
            return _CONTROL[char]
        if char.isalnum():
            self.fail(f"\\{char} is not supported")
        return char

    def _class(self) -> str:
        negated = self._next == "^"
        self.at += negated
        spans: list[Span] = []
        while (char := self._take()) != "]":
            if char == "\\" and self._next.lower() in _SHORT:
                name = self._take()
                spans += _all_but(_SHORT[name.lower()]) if name.isupper() else _SHORT[name]
                continue
            low = self._plain(self._take()) if char == "\\" else char
            high = low
            if self._next == "-" and self._pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self._take()
                high = self._plain(self._take()) if high == "\\" else high
            if high < low:
                self.fail("a range from back to front")
            spans.append((ord(low), ord(high)))
        left = _both(_PLAIN, _all_but(spans) if negated else spans)
        if not left:
            self.fail("no character of this class can be written in a JSON string")
        return _written(left)


def _literal(char: str) -> str:
    inner = _JSON.get(char) or (f"\\u{ord(char):04x}" if char < " " or char == "\x7f" else char)
    return '"' + inner.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _written(spans: list[Span]) -> str:
    return "[" + "".join(_point(low) + (f"-{_point(high)}" if high > low else "") for low, high in spans) + "]"


def _point(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\U{code:08X}"


def _all_but(spans: list[Span]) -> list[Span]:
    left, at = [], 0
    for low, high in sorted(spans):
        if low > at:
            left.append((at, low - 1))
        at = max(at, high + 1)
    return [*left, (at, _LAST)] if at <= _LAST else left


def _both(these: list[Span], those: list[Span]) -> list[Span]:
    pairs = ((max(a, c), min(b, d)) for a, b in these for c, d in those)
    return sorted({(low, high) for low, high in pairs if low <= high})
