"""Which settings each class has had, in FOLDER/versions.json, so that an update can be rolled back.

`now` is what the workers of a class are brought to. `before` is what a rollback goes back to: the last settings that
all of them had, and worked with. A rollback stays in force until the file changes.
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
from llambo.fleet.model import Fleet, NodeClass, NodeState, World
from llambo.mesh.wire.errors import Code, LlamboError

FILE, LOCK = "versions.json", "versions.lock"


class Version(msgspec.Struct, frozen=True):
    """The settings of a class and what a worker needs. The count and the hosts are not part of it."""

    #: `NodeClass.fingerprint()`.
    mark: str
    settings: dict[str, dict[str, str | int | float | bool]]
    slots: int
    memory_bytes: int
    cores: float
    cpu_weight: int


class ClassVersions(msgspec.Struct, omit_defaults=True):
    now: Version | None = None
    #: All its workers had `now`, and one was ready.
    good: bool = False
    before: Version | None = None
    #: The mark of the settings in the file, while a rollback keeps them out of force.
    refused: str = ""
    #: How many rolling restarts were asked for, and how many workers at a time the last one replaces.
    restarts: int = 0
    at_once: int = 0
    #: Why the update to the fingerprint `stopped_at` stopped.
    stopped: str = ""
    stopped_at: str = ""


class Versions(msgspec.Struct, omit_defaults=True):
    classes: dict[str, ClassVersions] = msgspec.field(default_factory=dict)
    #: Size and time of each model file, as it was last seen: a file that is missing has not changed.
    stamps: dict[str, str] = msgspec.field(default_factory=dict)

    def of(self, name: str) -> ClassVersions:
        return self.classes.setdefault(name, ClassVersions())

    def in_force(self, fleet: Fleet) -> Fleet:
        """The file, except for settings that were rolled back."""
        return replace(fleet, classes={name: self._in_force(spec) for name, spec in fleet.classes.items()})

    def _in_force(self, spec: NodeClass) -> NodeClass:
        versions = self.classes.get(spec.name, ClassVersions())
        rolled_back = versions.now is not None and versions.refused == spec.fingerprint()
        return as_version(spec, versions.now) if rolled_back and versions.now is not None else spec

    def fingerprint(self, spec: NodeClass, fleet: Fleet, still_s: float = 0.0) -> str:
        """Of its workers: besides the settings it contains the release and the version of the model file.

        `still_s`: a change of the model file counts only when it is so old, as a file may still be being copied.
        """
        if spec.is_broker:
            return spec.fingerprint()
        more = [llambo.__version__, self._stamp(spec, fleet, still_s)]
        restarts = self.classes[spec.name].restarts if spec.name in self.classes else 0
        return spec.fingerprint(*more, *([f"restart {restarts}"] if restarts else []))

    def fingerprints(self, fleet: Fleet, still_s: float = 0.0) -> dict[str, str]:
        return {spec.name: self.fingerprint(spec, fleet, still_s) for spec in fleet.all_classes()}

    def note(self, fleet: Fleet, world: World, still_s: float = 0.0) -> Fleet:
        """Compare with the file and with what runs now. Returns what is in force."""
        for spec in fleet.classes.values():
            versions = self.of(spec.name)
            if versions.now is not None:
                current = self.fingerprint(as_version(spec, versions.now), fleet, still_s)
                nodes = world.of(spec.name)
                if nodes and all(node.fingerprint == current for node in nodes):
                    versions.good = versions.good or any(node.state is NodeState.READY for node in nodes)
            mark = spec.fingerprint()
            if versions.refused == mark:
                continue
            versions.refused = ""
            if versions.now is None or versions.now.mark != mark:
                if versions.now is not None and versions.good:
                    versions.before = versions.now
                versions.now, versions.good, versions.stopped, versions.stopped_at = version_of(spec), False, "", ""
        return self.in_force(fleet)

    def roll_back(self, name: str) -> bool:
        """False: there is nothing to go back to."""
        versions = self.of(name)
        if versions.refused:
            return True
        if versions.now is None or versions.before is None or versions.before.mark == versions.now.mark:
            return False
        versions.refused, versions.now, versions.good = versions.now.mark, versions.before, True
        versions.stopped, versions.stopped_at = "", ""
        return True

    def restart(self, name: str, at_once: int) -> None:
        versions = self.of(name)
        versions.restarts += 1
        versions.at_once, versions.stopped, versions.stopped_at = at_once, "", ""

    def stop(self, name: str, fingerprint: str, why: str) -> None:
        versions = self.of(name)
        versions.stopped, versions.stopped_at = why, fingerprint

    def stopped(self, name: str, fingerprint: str) -> str:
        """Why no further worker is updated to this fingerprint; empty: the update may go on."""
        versions = self.classes.get(name, ClassVersions())
        return versions.stopped if versions.stopped_at == fingerprint else ""

    def _stamp(self, spec: NodeClass, fleet: Fleet, still_s: float) -> str:
        path = Path(str(spec.settings.get("worker", {}).get("model", ""))).expanduser()
        here = any(not fleet.hosts[host].address for host in spec.hosts if host in fleet.hosts)
        if not path.is_absolute() or not here:
            return ""
        with contextlib.suppress(OSError):
            found = path.stat()
            if str(path) not in self.stamps or time.time() - found.st_mtime >= still_s:
                self.stamps[str(path)] = f"{found.st_size} {found.st_mtime_ns}"
        return self.stamps.get(str(path), "")


class VersionsFile:
    """A process that changes it holds its lock for the time of the change."""

    def __init__(self, folder: Path) -> None:
        self._path, self._lock = folder / FILE, folder / LOCK

    def read(self) -> Versions:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Versions)
        except FileNotFoundError:
            return Versions()
        except msgspec.MsgspecError as error:
            raise LlamboError(Code.INTERNAL, f"{self._path} cannot be read: {error}") from error

    @contextlib.contextmanager
    def changing(self) -> Iterator[Versions]:
        self._lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._lock.open("w", encoding="ascii") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            versions = self.read()
            before = msgspec.json.encode(versions)
            yield versions
            if (text := msgspec.json.encode(versions)) != before:
                draft = self._path.with_suffix(".new")
                draft.write_bytes(text)
                draft.replace(self._path)


def version_of(spec: NodeClass) -> Version:
    settings = {section: dict(values) for section, values in spec.settings.items()}
    return Version(spec.fingerprint(), settings, spec.slots, spec.memory_bytes, spec.cores, spec.cpu_weight)


def as_version(spec: NodeClass, version: Version) -> NodeClass:
    return replace(
        spec, settings=version.settings, slots=version.slots, memory_bytes=version.memory_bytes, cores=version.cores,
        cpu_weight=version.cpu_weight,
    )  # fmt: skip
