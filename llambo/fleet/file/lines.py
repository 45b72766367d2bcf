"""On which line of a TOML file each key stands, for messages that say where to look.

`tomllib` reads the values and forgets the places. This goes over the same text once more and notes places only: it
understands what may stand around a key (tables, arrays of tables, dotted and quoted keys, inline tables, strings of
four kinds), and of a value nothing but where it ends. Only for text that `tomllib` has accepted: it checks nothing.
"""

from __future__ import annotations

import re
import tomllib

#: Keys of tables and numbers of elements, from the top.
Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
#: Strings, longest quotes first. In a literal one a backslash is a backslash.
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}(?!")|' + r"'''.*?'{3,5}(?!')|" + r'"(?:\\.|[^"\\\n])*"|' + r"'[^'\n]*'", re.DOTALL
)
#: Numbers, dates (one kind has a space in it) and switches end where something else must follow.
_PLAIN = re.compile(r"[^,\]}#\n]+")


class Lines:
    """The first line on which each table, key and element is named. Lines count from 1."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line, self._counted = 1, 0
        self._lines: dict[Path, int] = {}
        #: Of each array of tables, how many there have been.
        self._arrays: dict[Path, int] = {}
        self._document()

    def of(self, *path: str | int) -> int:
        """Where it stands, or else the nearest thing around it that does; 0: the file as a whole."""
        for end in range(len(path), 0, -1):
            if path[:end] in self._lines:
                return self._lines[path[:end]]
        return 0

    def known(self) -> dict[Path, int]:
        return dict(self._lines)

    # --- inside --------------------------------------------------------------------------------------

    def _document(self) -> None:
        table: Path = ()
        while self._skip(_BLANK) < len(self._text):
            if self._take("[["):
                table = self._header(self._key(), array=True)
                self._take("]]")
            elif self._take("["):
                table = self._header(self._key(), array=False)
                self._take("]")
            else:
                self._pair(table)

    def _header(self, names: list[str], *, array: bool) -> Path:
        """A table; on the way to it, a name that is an array of tables means the last one of them."""
        path: Path = ()
        for number, name in enumerate(names):
            path = (*path, name)
            self._mark(path)
            if array and number == len(names) - 1:
                self._arrays[path] = self._arrays.get(path, 0) + 1
            if path in self._arrays:
                path = (*path, self._arrays[path] - 1)
                self._mark(path)
        return path

    def _pair(self, table: Path) -> None:
        path = table
        for name in self._key():
            path = (*path, name)
            self._mark(path)
        self._take("=")
        self._skip(_SPACE)
        self._value(path)

    def _value(self, path: Path) -> None:
        if self._take("["):
            number = 0
            while not self._ends("]"):
                self._mark((*path, number))
                self._value((*path, number))
                number += 1
        elif self._take("{"):
            while not self._ends("}"):
                self._pair(path)
        else:
            found = _STRING.match(self._text, self._at) or _PLAIN.match(self._text, self._at)
            self._at = found.end() if found else len(self._text)

    def _ends(self, bracket: str) -> bool:
        """Whether the array or inline table is over; otherwise what is between here and its next part is behind us."""
        self._skip(_BLANK)
        self._take(",")
        self._skip(_BLANK)
        return self._take(bracket) or self._at >= len(self._text)

    def _key(self) -> list[str]:
        names = []
        while True:
            self._skip(_SPACE)
            if found := _BARE_KEY.match(self._text, self._at):
                names.append(found[0])
            elif found := _STRING.match(self._text, self._at):
                names += tomllib.loads(f"{found[0]} = 0")  # what its escapes stand for
            else:
                self._at = len(self._text)
                return names
            self._at = found.end()
            self._skip(_SPACE)
            if not self._take("."):
                return names

    def _mark(self, path: Path) -> None:
        if path not in self._lines:
            self._line += self._text.count("\n", self._counted, self._at)
            self._counted = self._at
            self._lines[path] = self._line

    def _skip(self, what: re.Pattern[str]) -> int:
        found = what.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return self._at

    def _take(self, text: str) -> bool:
        there = self._text.startswith(text, self._at)
        self._at += len(text) if there else 0
        return there
