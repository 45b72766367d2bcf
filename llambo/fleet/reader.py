"""fleet.toml: read, checked, and made into a Fleet. All errors are reported at once, each with its line.

[hosts.box]                   [classes.tiny]            [classes.tiny.scale]
provider = "systemd"          model = "smollm2"         high_percent = 70
address = "root@box"          memory = "600MiB"
memory = "8GiB"               min = 1
cores = 4                     max = 8
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from llambo.fleet import schema
from llambo.fleet.model import BROKER, Fleet, Host, NodeClass, Scaling
from llambo.fleet.schema import Key, by_name
from llambo.mesh.settings.settings_table import SECTIONS, Value
from llambo.mesh.wire.errors import Code, LlamboError

FILE_NAME = "fleet.toml"
#: Names of fleets, classes and hosts become part of the names of workers, folders and units.
NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
NAME_RULE = "at most 32 of a-z, 0-9 and inner dashes"
TOP = ("fleet", "hosts", "broker", "classes", "scale")
#: The only host of a file without hosts.
HERE = "here"
_BROKER_BYTES = 256 * 1024 * 1024

Table = Mapping[str, Any]


def parse(text: str, name: str = FILE_NAME) -> Fleet:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise LlamboError(Code.BAD_SETTING, f"{name} is not TOML: {error}") from error
    reader = _Reader(name, KeyLines(text.replace("\r\n", "\n")))
    fleet = reader.fleet(content)
    if reader.wrong:
        raise LlamboError(Code.BAD_SETTING, "\n".join(text for _, text in sorted(reader.wrong)))
    return fleet


class _Reader:
    def __init__(self, name: str, lines: KeyLines) -> None:
        self._name = name
        self._lines = lines
        self.wrong: list[tuple[int, str]] = []

    def fleet(self, content: Table) -> Fleet:
        for key in content:
            if key not in TOP:
                self._unknown((key,), TOP)
        values = self._values(content, ("fleet",), schema.FLEET)
        if not NAME.fullmatch(values["name"]):
            self._bad(("fleet", "name"), f"name is {values['name']!r}, expected {NAME_RULE}")
        hosts = {name: self._host(table, name) for name, table in self._tables(content, "hosts")}
        if "hosts" not in content:
            hosts = {HERE: Host(name=HERE)}
        scaling = self._scaling(content, ("scale",), Scaling())
        classes = {name: self._class(table, name, hosts, scaling) for name, table in self._tables(content, "classes")}
        if BROKER in classes:
            self._bad(("classes", BROKER), f"[classes.{BROKER}]: that name is reserved for the [broker]")
        if not classes and not self.wrong:
            self._bad((), "it has no class of workers: begin with [classes.tiny]")
        return Fleet(
            name=values["name"],
            broker_address=values["broker"],
            keys=values["keys"],
            max_unavailable=values["max_unavailable"],
            settle_ms=values["settle_ms"],
            hosts=hosts,
            classes=classes,
            broker=self._broker(content, hosts) if "broker" in content else None,
        )

    # --- parts ---------------------------------------------------------------------------------------

    def _host(self, table: Table, name: str) -> Host:
        path = ("hosts", name)
        values = self._values({"hosts": {name: table}}, path, schema.HOST)
        if values["provider"] == "process" and values["address"]:
            self._bad((*path, "address"), "address: processes are started on this machine only; use provider = "
                      '"systemd" for another one')  # fmt: skip
        if values["address"]:
            if not re.fullmatch(r"[A-Za-z0-9._@:\[\]-]+", values["address"]) or values["address"].startswith("-"):
                self._bad((*path, "address"), f"address is {values['address']!r}, expected user@host")
            for key in ("memory", "cores"):
                if not table.get(key):
                    self._bad(path, f"[hosts.{name}] needs {key}: what another machine has is not detected")
        return Host(
            name=name, provider=values["provider"], address=values["address"], user=values["user"],
            memory_bytes=values["memory"], cores=values["cores"], labels=frozenset(values["labels"]),
            line=self._line(path),
        )  # fmt: skip

    def _class(self, table: Table, name: str, hosts: Mapping[str, Host], scaling: Scaling) -> NodeClass:
        path = ("classes", name)
        own, rows = by_name(schema.CLASS), schema.WORKER_SETTINGS
        values = self._values({"classes": {name: table}}, path, schema.CLASS, [*rows, "fake", "scale"])
        worker = {
            key: self._value((*path, key), Key(rows[key], words=isinstance(raw, list) and key == "models"), raw)
            for key, raw in table.items()
            if key in rows
        }
        self._models(path, worker, values)
        fake = self._sub(table, (*path, "fake"), {key: Key(row) for key, row in SECTIONS["fake"].items()})
        if not table.get("memory"):
            self._bad(path, f'[classes.{name}] needs memory: what one worker needs, as memory = "600MiB"')
        least, most = values["min"], values["max"] if "max" in table else max(values["min"], own["max"].setting.default)
        if most < least:
            self._bad((*path, "max"), f"max is {most}, which is less than min, {least}")
        chosen = self._hosts(path, values["hosts"], hosts)
        labels = frozenset(values["labels"])
        chosen = tuple(host for host in chosen if host not in hosts or labels <= hosts[host].labels)
        if not chosen and hosts:
            self._bad((*path, "labels"), f"labels: no host of [classes.{name}] has {_and(sorted(labels))}")
        cores = float(values["cores"] or worker.get("threads") or 1)
        # By default a worker takes every core, which is right only for a single worker.
        worker.setdefault("threads", max(1, math.ceil(cores)))
        spec = NodeClass(
            name=name,
            settings=_without_empty({"worker": worker, "fake": fake}),
            slots=int(worker.get("slots") or SECTIONS["worker"]["slots"].default),
            memory_bytes=values["memory"],
            cores=cores,
            cpu_weight=values["cpu_weight"],
            labels=labels,
            hosts=chosen,
            min=least,
            max=most,
            scaling=self._scaling({"scale": table.get("scale", {})}, ("scale",), scaling, path),
            line=self._line(path),
        )
        if spec.is_host and not spec.min and "" in spec.model_names:
            self._bad((*path, "models"), "models: what a folder or a reference is called is known only while a node of "
                      f"[classes.{name}] runs: set min = 1, or name files")  # fmt: skip
        return spec

    def _models(self, path: tuple[str, ...], worker: dict[str, Any], values: Mapping[str, Any]) -> None:
        """With `models` the nodes of a class are hosts, and the memory of one is for all that it has loaded."""
        models = worker.get("models")
        if not models:
            return
        if worker.get("model"):
            self._bad(
                (*path, "model"), "model and models: a node has one model, or several; name all of them in models"
            )
        worker["models"] = models if isinstance(models, str) else ",".join(models)
        worker["memory_bytes"] = values["memory"]

    def _broker(self, content: Table, hosts: Mapping[str, Host]) -> NodeClass:
        table = content["broker"]
        rows = schema.BROKER_SETTINGS
        values = self._values(content, ("broker",), schema.BROKER_KEYS, list(rows))
        table = table if isinstance(table, dict) else {}
        own = {key: self._value(("broker", key), Key(rows[key]), raw) for key, raw in table.items() if key in rows}
        host = self._hosts(("broker", "host"), (values["host"],) if values["host"] else (), hosts)[:1]
        memory = values["memory"] or _BROKER_BYTES
        return NodeClass(
            name=BROKER, settings=_without_empty({"broker": own}), slots=0, memory_bytes=memory,
            cores=float(values["cores"]), cpu_weight=values["cpu_weight"], hosts=host, min=1, max=1,
            line=self._line(("broker",)),
        )  # fmt: skip

    def _scaling(self, content: Table, path: tuple[str, ...], base: Scaling, above: tuple[str, ...] = ()) -> Scaling:
        table = content.get("scale", {})
        known = by_name(schema.SCALE)
        scaling = replace(base, **self._sub({"scale": table}, (*above, *path), known))
        if not scaling.low_percent < scaling.aim_percent < scaling.high_percent:
            self._bad(
                (*above, *path),
                f"low_percent, aim_percent and high_percent are {scaling.low_percent}, {scaling.aim_percent} and "
                f"{scaling.high_percent}; each must be more than the one before it",
            )
        return scaling

    def _hosts(self, path: tuple[str, ...], wanted: Iterable[str], hosts: Mapping[str, Host]) -> tuple[str, ...]:
        wanted = tuple(wanted)
        for name in wanted:
            if name not in hosts:
                where = path if path[-1] == "host" else (*path, "hosts")
                self._bad(where, f"there is no host {name!r}{_meant(name, hosts)}")
        return tuple(name for name in wanted if name in hosts) or tuple(hosts)

    # --- tables and values -----------------------------------------------------------------------------

    def _tables(self, content: Table, section: str) -> list[tuple[str, Table]]:
        """The tables of a section, by name."""
        found = content.get(section, {})
        if not isinstance(found, dict):
            self._bad((section,), f"{section}: expected tables, as [{section}.NAME]")
            return []
        tables: list[tuple[str, Table]] = []
        for name, table in found.items():
            if not isinstance(table, dict):
                self._bad((section, name), f"{name} in [{section}]: expected a table, as [{section}.{name}]")
            elif not NAME.fullmatch(name):
                self._bad((section, name), f"{name!r} is not a valid name: {NAME_RULE}")
            else:
                tables.append((name, table))
        return tables

    def _values(self, content: Table, path: tuple[str, ...], known: Iterable[Key], more: Iterable[str] = ()) -> Any:
        """Every key of the table; missing ones with their defaults."""
        table: Any = content
        for name in path:
            table = table.get(name, {})
        names = by_name(known)
        found: dict[str, Any] = {name: () if key.words else key.setting.default for name, key in names.items()}
        if not isinstance(table, dict):
            self._bad(path, f"{path[-1]}: expected a table, [{'.'.join(path)}]")
            return found
        for key, raw in table.items():
            if key in names:
                found[key] = self._value((*path, key), names[key], raw, found[key])
            elif key not in more:
                self._unknown((*path, key), [*names, *more])
        return found

    def _sub(self, table: Table, path: tuple[str, ...], known: Mapping[str, Key]) -> dict[str, Any]:
        """The keys that are present in a sub-table, without defaults."""
        sub = table.get(path[-1], {})
        if not isinstance(sub, dict):
            self._bad(path, f"{path[-1]}: expected a table, [{'.'.join(path)}]")
            return {}
        found = {}
        for key, raw in sub.items():
            if key not in known:
                self._unknown((*path, key), known)
            elif (value := self._value((*path, key), known[key], raw)) is not None:
                found[key] = value
        return found

    def _value(self, path: tuple[str, ...], key: Key, raw: Any, default: Value | None = None) -> Any:
        try:
            return key.parse(raw)
        except ValueError as error:
            self._bad(path, f"{path[-1]} is {raw!r}, {error}")
            return default

    # --- what is wrong -------------------------------------------------------------------------------

    def _line(self, path: tuple[str, ...]) -> int:
        return self._lines.of(*path)

    def _unknown(self, path: tuple[str, ...], known: Iterable[str]) -> None:
        home = f" in [{'.'.join(path[:-1])}]" if path[:-1] else ""
        self._bad(path, f"unknown key {path[-1]!r}{home}{_meant(path[-1], known)}")

    def _bad(self, path: tuple[str, ...], text: str) -> None:
        line = self._line(path)
        self.wrong.append((line, f"{self._name}:{line}: {text}" if line else f"{self._name}: {text}"))


def _meant(word: str, known: Iterable[str]) -> str:
    known = list(known)
    also = schema.ALSO_CALLED.get(word)
    close = [also] if also in known else difflib.get_close_matches(word, known, n=2)
    return f"; did you mean {' or '.join(map(str, close))}?" if close else f"; there are {', '.join(known)}"


def _and(words: list[str]) -> str:
    return " and ".join(words)


def _without_empty(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {section: table for section, table in settings.items() if table}


# --- Line numbers ----------------------------------------------------------------------------------------
#
# `tomllib` reads the values and drops their positions. This scans the same text once more and records positions only.
# It understands what can surround a key (tables, arrays of tables, dotted and quoted keys, inline tables, strings of
# four kinds), and of a value only where it ends. Only for text that `tomllib` has accepted: it checks nothing.

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


class KeyLines:
    """The first line on which each table, key and array element appears. Lines count from 1."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line, self._counted = 1, 0
        self._lines: dict[Path, int] = {}
        #: How many elements of each array of tables there have been.
        self._arrays: dict[Path, int] = {}
        self._document()

    def of(self, *path: str | int) -> int:
        """Its line, or that of the nearest table around it that has one; 0: the whole file."""
        for end in range(len(path), 0, -1):
            if path[:end] in self._lines:
                return self._lines[path[:end]]
        return 0

    def all_lines(self) -> dict[Path, int]:
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
        """The path of a table. On the way to it, the name of an array of tables means its last element."""
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
        """True at the end of the array or inline table; otherwise moves to its next element."""
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
