"""fleet.toml: read, checked, and made into a Fleet. Everything that is wrong is told at once, each with its line.

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

from llambo.fleet.file import schema
from llambo.fleet.file.lines import Lines
from llambo.fleet.file.schema import Key, by_name
from llambo.fleet.model import BROKER, Fleet, Host, NodeClass, Scaling
from llambo.mesh.settings.settings_table import SECTIONS, Value
from llambo.mesh.wire.errors import Code, LlamboError

FILE_NAME = "fleet.toml"
#: What a class or host may be called: it becomes part of names of workers, files and units.
NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
TOP = ("fleet", "hosts", "broker", "classes", "scale")
#: The one host of a file that names none.
HERE = "here"
_BROKER_BYTES = 256 * 1024 * 1024

Table = Mapping[str, Any]


def parse(text: str, name: str = FILE_NAME) -> Fleet:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise LlamboError(Code.BAD_SETTING, f"{name} is not TOML: {error}") from error
    reader = _Reader(name, Lines(text.replace("\r\n", "\n")))
    fleet = reader.fleet(content)
    if reader.wrong:
        raise LlamboError(Code.BAD_SETTING, "\n".join(text for _, text in sorted(reader.wrong)))
    return fleet


class _Reader:
    def __init__(self, name: str, lines: Lines) -> None:
        self._name = name
        self._lines = lines
        self.wrong: list[tuple[int, str]] = []

    def fleet(self, content: Table) -> Fleet:
        for key in content:
            if key not in TOP:
                self._unknown((key,), TOP)
        said = self._values(content, ("fleet",), schema.FLEET)
        hosts = {name: self._host(table, name) for name, table in self._tables(content, "hosts")}
        if "hosts" not in content:
            hosts = {HERE: Host(name=HERE)}
        scaling = self._scaling(content, ("scale",), Scaling())
        classes = {name: self._class(table, name, hosts, scaling) for name, table in self._tables(content, "classes")}
        if BROKER in classes:
            self._bad(("classes", BROKER), f"[classes.{BROKER}]: what is called so is the [broker] itself")
        if not classes and not self.wrong:
            self._bad((), "there is no class of workers in it: begin with [classes.tiny]")
        return Fleet(
            name=said["name"],
            broker_address=said["broker"],
            keys=said["keys"],
            max_unavailable=said["max_unavailable"],
            settle_ms=said["settle_ms"],
            hosts=hosts,
            classes=classes,
            broker=self._broker(content, hosts) if "broker" in content else None,
        )

    # --- parts ---------------------------------------------------------------------------------------

    def _host(self, table: Table, name: str) -> Host:
        path = ("hosts", name)
        said = self._values({"hosts": {name: table}}, path, schema.HOST)
        if said["provider"] == "process" and said["address"]:
            self._bad((*path, "address"), "address: processes are kept on this machine only; say provider = "
                      '"systemd" for another one')  # fmt: skip
        if said["address"]:
            if not re.fullmatch(r"[A-Za-z0-9._@:\[\]-]+", said["address"]) or said["address"].startswith("-"):
                self._bad((*path, "address"), f"address is {said['address']!r}, expected user@host")
            for key in ("memory", "cores"):
                if not table.get(key):
                    self._bad(path, f"[hosts.{name}] needs {key}: what another machine has is not looked up")
        return Host(
            name=name, provider=said["provider"], address=said["address"], user=said["user"],
            memory_bytes=said["memory"], cores=said["cores"], labels=frozenset(said["labels"]), line=self._line(path),
        )  # fmt: skip

    def _class(self, table: Table, name: str, hosts: Mapping[str, Host], scaling: Scaling) -> NodeClass:
        path = ("classes", name)
        own, told = by_name(schema.CLASS), schema.WORKER_SETTINGS
        said = self._values({"classes": {name: table}}, path, schema.CLASS, [*told, "fake", "scale"])
        worker = {key: self._value((*path, key), Key(told[key]), raw) for key, raw in table.items() if key in told}
        fake = self._sub(table, (*path, "fake"), {key: Key(row) for key, row in SECTIONS["fake"].items()})
        if not table.get("memory"):
            self._bad(path, f'[classes.{name}] needs memory: what one worker takes, as memory = "600MiB"')
        least, most = said["min"], said["max"] if "max" in table else max(said["min"], own["max"].setting.default)
        if most < least:
            self._bad((*path, "max"), f"max is {most}, which is less than min, {least}")
        chosen = self._hosts(path, said["hosts"], hosts)
        labels = frozenset(said["labels"])
        chosen = tuple(host for host in chosen if host not in hosts or labels <= hosts[host].labels)
        if not chosen and hosts:
            self._bad((*path, "labels"), f"labels: no host of [classes.{name}] has {_and(sorted(labels))}")
        cores = float(said["cores"] or worker.get("threads") or 1)
        # By default a worker takes every core there is, which is right for one that is alone.
        worker.setdefault("threads", max(1, math.ceil(cores)))
        return NodeClass(
            name=name,
            settings=_without_empty({"worker": worker, "fake": fake}),
            slots=int(worker.get("slots") or SECTIONS["worker"]["slots"].default),
            memory_bytes=said["memory"],
            cores=cores,
            cpu_weight=said["cpu_weight"],
            labels=labels,
            hosts=chosen,
            min=least,
            max=most,
            scaling=self._scaling({"scale": table.get("scale", {})}, ("scale",), scaling, path),
            line=self._line(path),
        )

    def _broker(self, content: Table, hosts: Mapping[str, Host]) -> NodeClass:
        table = content["broker"]
        told = schema.BROKER_SETTINGS
        said = self._values(content, ("broker",), schema.BROKER_KEYS, list(told))
        table = table if isinstance(table, dict) else {}
        own = {key: self._value(("broker", key), Key(told[key]), raw) for key, raw in table.items() if key in told}
        host = self._hosts(("broker", "host"), (said["host"],) if said["host"] else (), hosts)[:1]
        memory = said["memory"] or _BROKER_BYTES
        return NodeClass(
            name=BROKER, settings=_without_empty({"broker": own}), slots=0, memory_bytes=memory,
            cores=float(said["cores"]), cpu_weight=said["cpu_weight"], hosts=host, min=1, max=1,
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

    def _hosts(self, path: tuple[str, ...], said: Iterable[str], hosts: Mapping[str, Host]) -> tuple[str, ...]:
        said = tuple(said)
        for name in said:
            if name not in hosts:
                where = path if path[-1] == "host" else (*path, "hosts")
                self._bad(where, f"there is no host {name!r}{_meant(name, hosts)}")
        return tuple(name for name in said if name in hosts) or tuple(hosts)

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
                self._bad((section, name), f"{name!r} is no name: at most 32 of a-z, 0-9 and dashes within")
            else:
                tables.append((name, table))
        return tables

    def _values(self, content: Table, path: tuple[str, ...], known: Iterable[Key], more: Iterable[str] = ()) -> Any:
        """Every key of the table, those that are not said with their defaults."""
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
        """What is said in a table of this one, and nothing else."""
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
