"""What grammars of JSON are made of: the rules that all have, and integers between bounds."""

from __future__ import annotations

from typing import Any

#: Digits of a number that has no bounds.
DIGITS = 16

PRIMITIVES = {
    "ws": '" "?',
    "char": r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-Ce-fE-F] [0-9a-fA-F]{3} | [dD] [0-7] hex{2}))',
    "hex": "[0-9a-fA-F]",
    "string": r'"\"" char* "\""',
    "natural": f'"0" | [1-9] [0-9]{{0,{DIGITS - 1}}}',
    "integer": '"-"? natural',
    "number": f'"-"? natural ("." [0-9]{{1,{DIGITS}}})? ([eE] [-+]? [0-9]{{1,2}})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "pair": 'string ":" ws value',
    "object": '"{" (pair ("," ws pair)*)? "}"',
    "array": '"[" (value ("," ws value)*)? "]"',
    "value": "object | array | string | number | boolean | null",
    "day": '"0" [1-9] | [12] [0-9]',
    "month-and-day": (
        '("0" [13578] | "1" [02]) "-" (day | "3" [01]) | ("0" [469] | "11") "-" (day | "30")'
        ' | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8])'
    ),
    "date": '[0-9]{4} "-" month-and-day',
    "hours-and-minutes": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9]',
    "time": 'hours-and-minutes ":" [0-5] [0-9] ("." [0-9]{1,6})? ("Z" | [-+] hours-and-minutes)',
}
#: Formats of strings. The 29th of February is left out; all other formats are strings like any other.
FORMATS = {
    "date": r'"\"" date "\""',
    "time": r'"\"" time "\""',
    "date-time": r'"\"" date "T" time "\""',
    "uuid": r'"\"" hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12} "\""',
}


class Bad(Exception):
    """What is wrong with a schema; where is added on the way up."""


def quoted(text: str) -> str:
    """A literal of a grammar."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def integer(schema: dict[str, Any]) -> str:
    low, high = _bound(schema, "minimum", 1), _bound(schema, "maximum", -1)
    if low is None and high is None:
        return "integer"
    edge = 10**DIGITS - 1
    low, high = max(-edge, -edge if low is None else low), min(edge, edge if high is None else high)
    if low > high:
        raise Bad(f"no integer of {DIGITS} digits is within these bounds")
    ways = [f'"-" ({_span(max(1, -high), -low)})'] if low < 0 else []
    return " | ".join([*ways, _span(max(0, low), high)] if high >= 0 else ways)


def _bound(schema: dict[str, Any], name: str, step: int) -> int | None:
    """The first integer within it. `exclusive...` is a bound of its own, or, in an old draft, a bool beside it."""
    found, exclusive = schema.get(name), schema.get(f"exclusive{name.capitalize()}")
    bounds = []
    for value, shut in ((found, exclusive is True), (exclusive, True)):
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 10.0**300:
            whole = int(value) if int(value) == value else int(value // 1) + (step > 0)
            bounds.append(whole + step if shut and whole == value else whole)
    return (max(bounds) if step > 0 else min(bounds)) if bounds else None


def _span(low: int, high: int) -> str:
    """The integers from here to there, neither below 0."""
    ways = []
    for length in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (length - 1) if length > 1 else 0)
        ways.append(_digits(str(first), str(min(high, 10**length - 1))))
    return " | ".join(ways)


def _digits(low: str, high: str) -> str:
    """Of one length."""
    rest = len(low) - 1
    if low == high:
        return f'"{low}"'
    if set(low) == {"0"} and set(high) == {"9"}:
        return f"[0-9]{{{len(low)}}}"
    if low[0] == high[0]:
        return f'"{low[0]}" ({_digits(low[1:], high[1:])})'
    if rest == 0:
        return f"[{low}-{high}]"
    first, last = int(low[0]), int(high[0])
    ways = []
    if low[1:] != "0" * rest:
        ways.append(f'"{first}" ({_digits(low[1:], "9" * rest)})')
        first += 1
    tail = f'"{last}" ({_digits("0" * rest, high[1:])})' if high[1:] != "9" * rest else ""
    last -= 1 if tail else 0
    if first <= last:
        ways.append(f"[{first}-{last}] [0-9]{{{rest}}}")
    return " | ".join([*ways, tail] if tail else ways)
