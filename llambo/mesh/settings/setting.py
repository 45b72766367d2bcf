"""What a setting is: a row of the table (see `settings_table`), and how its value is read and shown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

Value = str | int | float | bool

MIB = 1024 * 1024
#: A value that begins like this is a key itself, and never shown.
KEY_PREFIX = "llambo-key-"
_BYTE_UNITS = {"": 1, "B": 1, "KIB": 1024, "MIB": MIB, "GIB": 1024 * MIB}
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Kind(Enum):
    """What a value is; the text is what `--help` shows in its place."""

    TEXT = "TEXT"
    NUMBER = "NUMBER"
    REAL = "REAL"
    MS = "MS"
    BYTES = "BYTES"
    SWITCH = "YES/NO"
    KEY = "FILE|LINE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of the table. `key` names it in its section of the file; flag and variable follow from the names."""

    name: str
    section: str
    kind: Kind
    default: Value
    help: str
    roles: frozenset[str]
    key: str
    flag: str
    env: str
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = math.inf

    @property
    def metavar(self) -> str:
        return "|".join(self.choices) or self.kind.value

    def parse(self, raw: Any) -> Value:
        """The value that `raw` stands for, typed (from a file) or as text. ValueError says what was expected."""
        value = _PARSERS[self.kind](raw)
        if self.choices and value not in self.choices:
            raise ValueError(f"expected one of {', '.join(self.choices)}")
        if not isinstance(value, str) and not self.low <= value <= self.high:
            raise ValueError(f"expected {self._range()}")
        return value

    def show(self, value: Value) -> str:
        """The value as a person would write it."""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if self.kind is Kind.KEY and str(value).startswith(KEY_PREFIX):
            return "(a key)"
        if self.kind is Kind.BYTES and isinstance(value, int):
            return _show_bytes(value)
        return str(value)

    def _range(self) -> str:
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        return f"{self.low:g} to {self.high:.12g}"


# --- reading values ----------------------------------------------------------------------------------


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError("expected text")
    return raw


def _whole(raw: Any, what: str = "a whole number") -> int:
    try:
        if isinstance(raw, str):
            return int(raw)
    except ValueError:
        pass
    # True is an int to Python, but not to the person who wrote `port = true`.
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    raise ValueError(f"expected {what}")


def _real(raw: Any) -> float:
    try:
        if isinstance(raw, (str, int, float)) and not isinstance(raw, bool) and math.isfinite(float(raw)):
            return float(raw)
    except (ValueError, OverflowError):
        pass
    raise ValueError("expected a number")


def _switch(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.lower() in _YES + _NO:
        return raw.lower() in _YES
    raise ValueError("expected yes or no")


def _bytes(raw: Any) -> int:
    if isinstance(raw, str):
        found = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", raw)
        if found and found[2].upper() in _BYTE_UNITS:
            return int(found[1]) * _BYTE_UNITS[found[2].upper()]
    return _whole(raw, "a size such as 65536, 512KiB, 64MiB or 2GiB")


def _show_bytes(value: int) -> str:
    for unit, size in (("GiB", 1024 * MIB), ("MiB", MIB), ("KiB", 1024)):
        if value and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


_PARSERS: dict[Kind, Callable[[Any], Value]] = {
    Kind.TEXT: _text,
    Kind.NUMBER: _whole,
    Kind.REAL: _real,
    Kind.MS: lambda raw: _whole(raw, "a whole number of milliseconds"),
    Kind.BYTES: _bytes,
    Kind.SWITCH: _switch,
    Kind.KEY: _text,
}


# --- writing rows ------------------------------------------------------------------------------------


def row(
    where: str,
    kind: Kind,
    default: Value,
    text: str,
    *,
    roles: str = "",
    name: str = "",
    env: str = "",
    flag: str = "",
    choices: tuple[str, ...] = (),
    low: float = 0,
    high: float = math.inf,
) -> Setting:
    """`where` is "section.key"; the rest is derived from it unless it is given."""
    section, key = where.split(".")
    name = name or key
    return Setting(
        name=name,
        section=section,
        kind=kind,
        default=default,
        help=text,
        roles=frozenset((roles or section).split()),
        key=key,
        flag="--" + (flag or key).replace("_", "-"),
        env="LLAMBO_" + (env or name).upper(),
        choices=choices,
        low=low,
        high=high,
    )


def fake(
    key: str,
    kind: Kind,
    default: Value,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = 0,
    high: float = math.inf,
) -> Setting:
    # Its knobs would read as settings of the real engine, so they wear a prefix wherever there are no sections.
    name = f"fake_{key}"
    where = f"fake.{key}"
    return row(where, kind, default, text, roles="worker", name=name, flag=name, choices=choices, low=low, high=high)
