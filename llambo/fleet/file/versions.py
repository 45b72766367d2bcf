"""Which settings each class has had, in FOLDER/versions.json: so that an update can be taken back.

`now` is what its workers are brought to, `before` what they go back to: the last settings that all of them had, and
worked with. What was taken back stays so until the file says something else.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

import llambo
from llambo.fleet.model import Fleet, NodeClass
from llambo.fleet.world import NodeState, World
from llambo.mesh.wire.errors import Code, LlamboError

FILE, LOCK = "versions.json", "versions.lock"


class Version(msgspec.Struct, frozen=True):
    """What a worker is told, and what it takes. How many of them and where they are is no part of it."""

    #: `NodeClass.fingerprint()`.
    mark: str
    settings: dict[str, dict[str, str | int | float | bool]]
    slots: int
    memory_bytes: int
    cores: float
    cpu_weight: int


class Entry(msgspec.Struct, omit_defaults=True):
    now: Version | None = None
    #: All its workers had `now`, and one was ready.
    good: bool = False
    before: Version | None = None
    #: The mark of what the file says and is not to have.
    refused: str = ""
    #: How often all of them were to be begun again, and how many at a time the last time.
    restarts: int = 0
    at_once: int = 0
    #: Why the update to this fingerprint stopped.
    stopped: str = ""
    stopped_at: str = ""


class Book(msgspec.Struct, omit_defaults=True):
    classes: dict[str, Entry] = msgspec.field(default_factory=dict)
    #: Of each model's file, as it was when it was last there: one that is gone is no other one.
    stamps: dict[str, str] = msgspec.field(default_factory=dict)

    def of(self, name: str) -> Entry:
        return self.classes.setdefault(name, Entry())

    def in_force(self, fleet: Fleet) -> Fleet:
        """The file, but for settings that were taken back."""
        return replace(fleet, classes={name: self._in_force(kept) for name, kept in fleet.classes.items()})

    def _in_force(self, kept: NodeClass) -> NodeClass:
        entry = self.classes.get(kept.name, Entry())
        held = entry.now is not None and entry.refused == kept.fingerprint()
        return as_version(kept, entry.now) if held and entry.now is not None else kept

    def mark(self, kept: NodeClass, fleet: Fleet, still_s: float = 0.0) -> str:
        """What its workers are known by: besides the settings it is the release, and the bytes of the model.

        `still_s`: a model's file counts only when nobody has written into it for so long.
        """
        if kept.is_broker:
            return kept.fingerprint()
        more = [llambo.__version__, self._stamp(kept, fleet, still_s)]
        restarts = self.classes[kept.name].restarts if kept.name in self.classes else 0
        return kept.fingerprint(*more, *([f"restart {restarts}"] if restarts else []))

    def marks(self, fleet: Fleet, still_s: float = 0.0) -> dict[str, str]:
        return {kept.name: self.mark(kept, fleet, still_s) for kept in fleet.kept()}

    def note(self, fleet: Fleet, world: World, still_s: float = 0.0) -> Fleet:
        """What the file says now. Returns what is in force."""
        for kept in fleet.classes.values():
            entry = self.of(kept.name)
            if entry.now is not None:
                here = self.mark(as_version(kept, entry.now), fleet, still_s)
                nodes = world.of(kept.name)
                if nodes and all(node.fingerprint == here for node in nodes):
                    entry.good = entry.good or any(node.state is NodeState.READY for node in nodes)
            mark = kept.fingerprint()
            if entry.refused == mark:
                continue
            entry.refused = ""
            if entry.now is None or entry.now.mark != mark:
                if entry.now is not None and entry.good:
                    entry.before = entry.now
                entry.now, entry.good, entry.stopped, entry.stopped_at = version_of(kept), False, "", ""
        return self.in_force(fleet)

    def take_back(self, name: str) -> bool:
        """False: there is nothing before it."""
        entry = self.of(name)
        if entry.refused:
            return True
        if entry.now is None or entry.before is None or entry.before.mark == entry.now.mark:
            return False
        entry.refused, entry.now, entry.good = entry.now.mark, entry.before, True
        entry.stopped, entry.stopped_at = "", ""
        return True

    def restart(self, name: str, at_once: int) -> None:
        entry = self.of(name)
        entry.restarts += 1
        entry.at_once, entry.stopped, entry.stopped_at = at_once, "", ""

    def stop(self, name: str, fingerprint: str, why: str) -> None:
        entry = self.of(name)
        entry.stopped, entry.stopped_at = why, fingerprint

    def stopped(self, name: str, fingerprint: str) -> str:
        """Why no other one gets what has this fingerprint; empty: it may."""
        entry = self.classes.get(name, Entry())
        return entry.stopped if entry.stopped_at == fingerprint else ""

    def _stamp(self, kept: NodeClass, fleet: Fleet, still_s: float) -> str:
        path = Path(str(kept.settings.get("worker", {}).get("model", ""))).expanduser()
        here = any(not fleet.hosts[host].address for host in kept.hosts if host in fleet.hosts)
        if not path.is_absolute() or not here:
            return ""
        with contextlib.suppress(OSError):
            found = path.stat()
            if str(path) not in self.stamps or time.time() - found.st_mtime >= still_s:
                self.stamps[str(path)] = f"{found.st_size} {found.st_mtime_ns}"
        return self.stamps.get(str(path), "")


class Versions:
    """The book as a file. Whoever changes it holds its lock, for as long as that takes."""

    def __init__(self, folder: Path) -> None:
        self._path, self._lock = folder / FILE, folder / LOCK

    def read(self) -> Book:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Book)
        except FileNotFoundError:
            return Book()
        except msgspec.MsgspecError as error:
            raise LlamboError(Code.INTERNAL, f"{self._path} cannot be read: {error}") from error

    @contextlib.contextmanager
    def changing(self) -> Iterator[Book]:
        self._lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._lock.open("w", encoding="ascii") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            book = self.read()
            was = msgspec.json.encode(book)
            yield book
            if (text := msgspec.json.encode(book)) != was:
                draft = self._path.with_suffix(".new")
                draft.write_bytes(text)
                draft.replace(self._path)


def version_of(kept: NodeClass) -> Version:
    settings = {section: dict(told) for section, told in kept.settings.items()}
    return Version(kept.fingerprint(), settings, kept.slots, kept.memory_bytes, kept.cores, kept.cpu_weight)


def as_version(kept: NodeClass, version: Version) -> NodeClass:
    return replace(
        kept, settings=version.settings, slots=version.slots, memory_bytes=version.memory_bytes, cores=version.cores,
        cpu_weight=version.cpu_weight,
    )  # fmt: skip
