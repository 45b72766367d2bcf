"""What the commands of `llambo fleet` share: the file, the folder with what runs, and who may change it now."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import getpass
import json
import os
import socket
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llambo.cli.kit.ask import address_of, key_of
from llambo.cli.kit.common import Common
from llambo.cli.kit.failure import Exit, Failure

if TYPE_CHECKING:
    from llambo.fleet.decide.plan import Wanted
    from llambo.fleet.file.versions import Versions
    from llambo.fleet.model import Fleet, NodeClass
    from llambo.fleet.run.keeper import Keeper, Tell
    from llambo.fleet.world import World
    from llambo.mesh.client.client import Client

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

#: Held by whoever changes what runs.
LOCK = "lock"
#: How many of each class somebody has said there shall be.
COUNTS = "counts.json"


def fleet_options(function: F) -> F:
    file = click.option(
        "-f", "--file", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), default=Path("fleet.toml"),
        show_default=True, help="What the fleet shall be.",
    )  # fmt: skip
    state = click.option(
        "--state", metavar="DIR", type=click.Path(file_okay=False, path_type=Path),
        help="Where it is noted what runs.  [default: ~/.local/state/llambo/NAME]",
    )  # fmt: skip
    return file(state(function))


@dataclass(slots=True)
class Site:
    fleet: Fleet
    file: Path
    state: Path
    common: Common
    #: Of the file, as it was read last.
    text: str

    def keeper(self, tell: Tell) -> Keeper:
        from llambo.fleet.run.keeper import Keeper

        address = address_of(self.common.settings, key_of(self.common.settings))
        return Keeper(self.fleet, self.state, address, self.connect, tell)

    def connect(self, address: str) -> Client:
        """As an admin, if the mesh has keys: with the key that was given, or else with that of the fleet's folder."""
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
    def alone(self) -> Iterator[None]:
        """Nobody else changes anything meanwhile."""
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.state / LOCK).open("w", encoding="ascii") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise Failure(
                    f"another `llambo fleet` is at work in {self.state}", "wait for it; `llambo fleet status` shows it",
                    Exit.BUSY,
                ) from error  # fmt: skip
            yield

    def orchestrator(self) -> int:
        """The pid of the one that is at work here; 0: there is none."""
        from llambo.fleet.run.orchestrator import read_news

        news = read_news(self.state)
        if news is None:
            return 0
        try:
            with self.alone():
                return 0  # it has died, and left its news
        except Failure:
            return int(news["pid"])

    # --- how many ----------------------------------------------------------------------------------------

    def wanted(self) -> Wanted:
        """What somebody has said, as far as the file allows it now."""
        from llambo.fleet.decide.plan import Wanted

        counts = {
            name: max(kept.min, min(count, kept.max))
            for name, count in self._counts().items()
            if (kept := self.fleet.classes.get(name)) is not None
        }
        return Wanted(counts=counts)

    def settle(self, keeper: Keeper, world: World, *, write: bool) -> Wanted:
        """What the file says now, but for what was taken back, is what the keeper knows from here on."""
        from dataclasses import replace

        versions = self.versions()
        with versions.changing() if write else contextlib.nullcontext(versions.read()) as book:
            keeper.fleet = book.note(self.fleet, world)
            marks = book.marks(keeper.fleet)
        return replace(self.wanted(), fingerprints=marks)

    def versions(self) -> Versions:
        from llambo.fleet.file.versions import Versions

        return Versions(self.state)

    def want(self, counts: dict[str, int]) -> None:
        for name, count in counts.items():
            kept = self.node_class(name)
            if not kept.min <= count <= kept.max:
                raise Failure(
                    f"{count} are not from {kept.min} to {kept.max}, which {self.file}:{kept.line} says of {name}",
                    "change `min` or `max` there", Exit.USAGE,
                )  # fmt: skip
        self.remember(counts)

    def remember(self, counts: Mapping[str, int]) -> None:
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps({**self._counts(), **counts}), encoding="ascii")
        draft.replace(self._path)

    def counts(self) -> dict[str, int]:
        return dict(self.wanted().counts)

    def changed(self) -> Fleet | None:
        """The file, read again if it is another one than the last time."""
        try:
            text = self.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None  # somebody is just replacing it
        if text == self.text:
            return None
        from llambo.fleet.file.file import parse

        self.text = text
        self.fleet = parse(text, str(self.file))
        return self.fleet

    def node_class(self, name: str) -> NodeClass:
        kept = self.fleet.classes.get(name)
        if kept is None:
            known = ", ".join(self.fleet.classes)
            raise Failure(f"there is no class {name!r} in {self.file}", f"there are {known}", Exit.USAGE)
        return kept

    @property
    def _path(self) -> Path:
        return self.state / COUNTS

    def _counts(self) -> dict[str, int]:
        try:
            found = json.loads(self._path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise Failure(f"{self._path} cannot be read: {error}", "remove it, and say again how many") from error
        return {str(name): int(count) for name, count in found.items()}


def site(common: Common, file: Path, state: Path | None) -> Site:
    from llambo.fleet.file.file import parse

    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        hint = "write one, as docs/fleets.md shows, or name it with --file"
        raise Failure(f"there is no {file}", hint, Exit.USAGE) from error
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{file} cannot be read: {error}", "", Exit.USAGE) from error
    fleet = parse(text, str(file))
    return Site(fleet, file, (state or _default(fleet.name)).expanduser().absolute(), common, text)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def _default(name: str) -> Path:
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.environ.get("HOME", "/"), ".local", "state")
    return Path(base, "llambo", name)
