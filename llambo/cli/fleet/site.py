"""What the commands of `llambo fleet` share: the file, the folder of state, and the lock for changes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import getpass
import json
import os
import shlex
import socket
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llambo.cli.kit.common import Common, address_of, key_of, state_folder
from llambo.cli.kit.failure import Exit, Failure
from llambo.cli.kit.flags import Function, client_options, json_option
from llambo.cli.kit.std_streams import print_notice

if TYPE_CHECKING:
    from llambo.fleet.decide.plan import Wanted
    from llambo.fleet.model import Fleet, NodeClass, World
    from llambo.fleet.node_manager import NodeManager, Report
    from llambo.fleet.versions import VersionsFile
    from llambo.mesh.client.client import Client

T = TypeVar("T")

#: Held by a command while it changes what runs.
LOCK = "lock"
#: How many workers of each class an operator has asked for.
COUNTS = "counts.json"

FLEET_FILE = Path("fleet.toml")

FILE_OPTION = click.option(
    "-f", "--file", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), default=FLEET_FILE,
    show_default=True, help="What the fleet shall be.",
)  # fmt: skip
STATE_OPTION = click.option(
    "--state", metavar="DIR", type=click.Path(file_okay=False, path_type=Path),
    help="Where it is stored what runs.  [default: ~/.local/state/llambo/NAME]",
)  # fmt: skip


def pass_site(*, with_json: bool = True) -> Callable[[Function], Function]:
    """The options of every command of `llambo fleet`. The function gets the `Site` that they name."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def command(common: Common, /, file: Path, state: Path | None, **options: Any) -> None:
            function(site(common, file, state), **options)

        taken = client_options(command)
        return FILE_OPTION(STATE_OPTION(json_option(taken) if with_json else taken))

    return decorate


def report(text: str) -> None:
    print_notice(f"fleet: {text}", err=False)


def no_report(text: str) -> None:
    """Instead of `report`, where progress would be in the way of the output."""


@dataclass(slots=True)
class Site:
    fleet: Fleet
    file: Path
    state: Path
    common: Common
    #: Of the file, as it was read last.
    text: str

    def node_manager(self, report: Report) -> NodeManager:
        from llambo.fleet.node_manager import NodeManager

        address = address_of(self.common.settings, key_of(self.common.settings))
        return NodeManager(self.fleet, self.state, address, self.connect, report)

    def broker_flag(self, address: str) -> str:
        """What a command needs to reach the mesh there; empty if it goes there by itself."""
        settings = self.common.settings
        return "" if address == address_of(settings, key_of(settings)) else f" --broker {address}"

    @property
    def flags(self) -> str:
        """What a command needs to find this fleet; empty if it is where it looks."""
        words = [] if self.file == FLEET_FILE else ["--file", str(self.file)]
        words += [] if self.state == default_state(self.fleet) else ["--state", str(self.state)]
        return f" {shlex.join(words)}" if words else ""

    def connect(self, address: str) -> Client:
        """As an admin, if the mesh has keys: with the key of the settings, or else with that in the fleet's folder."""
        from llambo.mesh.client.client import Client
        from llambo.mesh.security import keys
        from llambo.mesh.security.keyring import ISSUED

        settings = self.common.settings
        key = key_of(settings)
        admin = Path(self.fleet.keys).expanduser() / ISSUED / "admin.key"
        if key is None and self.fleet.keys and admin.exists():
            key = keys.read(admin)
        name = f"fleet {self.fleet.name}, {getpass.getuser()}@{socket.gethostname()}"
        return Client(address, name=name, connect_ms=settings.number("connect_ms"), key=key or "")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """No other command on this machine changes the fleet meanwhile."""
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.state / LOCK).open("a+", encoding="ascii") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.seek(0)
                raise self._locked(lock.read()) from error
            lock.truncate(0)
            print(os.getpid(), file=lock, flush=True)
            yield

    def _locked(self, holder: str) -> Failure:
        """`holder`: what the lock file contains, the pid of the command that has it. An older version writes none."""
        from llambo.fleet.orchestrator import read_state

        state = read_state(self.state)
        if state is not None and holder.strip() == str(state.pid):
            text = f"`llambo fleet run` keeps this fleet as it is, pid {state.pid}"
            return Failure(text, f"end it first (Ctrl-C, or kill {state.pid}); what it has started stays", Exit.BUSY)
        text = f"another `llambo fleet` is at work in {self.state}"
        return Failure(text, "wait for it; `llambo fleet status` shows it", Exit.BUSY)

    def orchestrator(self) -> int:
        """The pid of the one that runs here; 0: there is none."""
        from llambo.fleet.orchestrator import read_state

        state = read_state(self.state)
        if state is None:
            return 0
        try:
            with self.lock():
                return 0  # it was killed, and its file is still there
        except Failure:
            return state.pid

    # --- how many ----------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """What was asked for, within the bounds of the file as it is now."""
        return {
            name: max(spec.min, min(count, spec.max))
            for name, count in self._stored_counts().items()
            if (spec := self.fleet.classes.get(name)) is not None
        }

    def wanted(self, manager: NodeManager, world: World, *, write: bool) -> Wanted:
        """The counts, and the settings in force: those of the file, except where they were rolled back."""
        from llambo.fleet.decide.plan import Wanted

        file = self.versions()
        with file.changing() if write else contextlib.nullcontext(file.read()) as versions:
            manager.fleet = versions.note(self.fleet, world)
            fingerprints = versions.fingerprints(manager.fleet)
        return Wanted(counts=self.counts(), fingerprints=fingerprints)

    def versions(self) -> VersionsFile:
        from llambo.fleet.versions import VersionsFile

        return VersionsFile(self.state)

    def ask_for(self, counts: dict[str, int]) -> None:
        for name, count in counts.items():
            spec = self.node_class(name)
            if not spec.min <= count <= spec.max:
                raise Failure(
                    f"{count} is not from {spec.min} to {spec.max}, the bounds of {name} in {self.file}:{spec.line}",
                    "change `min` or `max` there", Exit.USAGE,
                )  # fmt: skip
        self.store_counts(counts)

    def store_counts(self, counts: Mapping[str, int]) -> None:
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps({**self._stored_counts(), **counts}), encoding="ascii")
        draft.replace(self._path)

    def changed(self) -> Fleet | None:
        """The file, if it has changed since it was read."""
        try:
            text = self.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None  # it is just being replaced
        if text == self.text:
            return None
        from llambo.fleet.reader import parse

        self.text = text
        self.fleet = parse(text, str(self.file))
        return self.fleet

    def node_class(self, name: str) -> NodeClass:
        spec = self.fleet.classes.get(name)
        if spec is None:
            known = ", ".join(self.fleet.classes)
            raise Failure(f"there is no class {name!r} in {self.file}", f"there are {known}", Exit.USAGE)
        return spec

    @property
    def _path(self) -> Path:
        return self.state / COUNTS

    def _stored_counts(self) -> dict[str, int]:
        try:
            found = json.loads(self._path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise Failure(f"{self._path} cannot be read: {error}", "remove it, and set the counts again") from error
        return {str(name): int(count) for name, count in found.items()}


def site(common: Common, file: Path, state: Path | None) -> Site:
    from llambo.fleet.reader import parse

    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        hint = "write one, as docs/fleets.md shows, or name it with --file"
        raise Failure(f"there is no {file}", hint, Exit.USAGE) from error
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{file} cannot be read: {error}", "", Exit.USAGE) from error
    fleet = parse(text, str(file))
    return Site(fleet, file, state.expanduser().absolute() if state else default_state(fleet), common, text)


def default_state(fleet: Fleet) -> Path:
    return state_folder(os.environ, fleet.name).expanduser().absolute()


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)
