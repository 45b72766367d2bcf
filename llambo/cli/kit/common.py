"""What every command gets: the flags that were given, the settings they result in, and how it reaches the mesh.

In a shell all commands share one client and one loop (`Session`); elsewhere each command has its own.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click
import msgspec

from llambo.mesh.wire.errors import Code, LlamboError

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client
    from llambo.mesh.settings.settings import Settings
    from llambo.mesh.wire.identity import PeerKey

T = TypeVar("T")

#: How long a connection may take that shows whether anything listens.
LISTENS_S = 1.0


def asked_model(name: str) -> str:
    """What the mesh calls a model: a download is served under the name of its file, if it is none of Ollama's."""
    from llambo.worker.models import model_files
    from llambo.worker.store import refs

    if not refs.is_ref(name):
        return name
    try:
        return model_files.resolve(name).served_as
    except model_files.NoSuchModel:  # another machine may have it
        return name


class Session(Protocol):
    """What a command uses of the shell it was typed in (`ShellSession`)."""

    #: Called at a signal while a stream is followed.
    on_signal: Callable[[int], None] | None
    #: The ids of the requests that were sent in this shell.
    sent: deque[str]

    def run(self, work: Coroutine[Any, Any, T]) -> T: ...
    def connected(self, common: Common) -> AbstractAsyncContextManager[Client]: ...


@dataclass
class Common:
    """Flags by setting name, of the group and of the command. The last one given counts."""

    flags: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    verbose: int = 0
    #: None outside a shell.
    session: Session | None = None

    @cached_property
    def settings(self) -> Settings:
        """Read when a command runs and not before: `--help` works with a broken file too."""
        import logging

        from llambo.cli.kit.std_streams import set_up_log
        from llambo.mesh.settings import settings

        loaded = settings.load(self.flags, config=self.config)
        if self.session is not None:
            return loaded  # the shell has set up the log and logged the warnings
        wanted = loaded.text("log_level").upper()
        # The more verbose of the two: the gateway's unit has `-v`, and its .env file may say `debug`.
        level = min(
            wanted, (wanted, "INFO", "DEBUG")[min(self.verbose, 2)], key=logging.getLevelNamesMapping().__getitem__
        )
        set_up_log(level)
        for warning in loaded.warnings:
            logging.getLogger("llambo").warning("%s", warning)
        return loaded


pass_common = click.make_pass_decorator(Common, ensure=True)


# --- the mesh ------------------------------------------------------------------------------------------


def connect(common: Common) -> Client:
    """A client with the settings in force. Enter it with `async with`."""
    import socket

    from llambo.mesh.client.client import Client

    address, key = where(common)
    name = f"{user_name()}@{socket.gethostname()}"
    return Client(address, name=name, connect_ms=common.settings.number("connect_ms"), key=key or "")


def user_name() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        return "unknown"


def key_of(settings: Settings) -> PeerKey | None:
    """The key of a client or a worker; None without keys."""
    from llambo.mesh.security import keys

    return keys.find(settings.text("key"), os.environ)


def address_of(settings: Settings, key: PeerKey | None) -> str:
    """The broker's address: the one in the key, unless a setting names another."""
    if key is not None and settings.sources["broker"] == "default":
        return key.address
    return settings.text("broker")


def key_hint(common: Common) -> str:
    """The hint for who was refused without a key, and is the operator: the admin's key of this machine, or empty."""
    from llambo.mesh.security.keyring import ISSUED, default_folder

    if common.settings.text("key"):
        return ""
    folders = [Path(common.settings.text("keys") or default_folder(os.environ)), Path("keys")]
    found = next((key for folder in folders if os.path.isfile(key := folder / ISSUED / "admin.key")), None)
    return f"an admin's key is here: --key {found}" if found else ""


def port_hint(common: Common) -> str:
    """The hint where a program listens and no broker answers; empty if none listens."""
    at = listens(common)
    return f"what listens at {at} is no broker, or hangs: `llambo doctor ports broker`" if at else ""


def no_model_hint(common: Common) -> str:
    """The hint where hosts would load models and have none; empty if that is not so."""
    try:
        hosts = ask(common, lambda client: client.hosts())
    except LlamboError:  # the first error is the one that is shown
        return ""
    if not hosts or any(host.models for host in hosts):
        return ""
    names = ", ".join(sorted(host.host for host in hosts))
    return f"{names} would load a model, and has none yet: `llambo pull hf:ORG/REPO` downloads one to its machine"


def listens(common: Common) -> str:
    """The first of the broker's addresses at which a program listens; empty if none does."""
    import socket

    from llambo.mesh.link.sockets import endpoint, split_all

    for host, port in split_all(where(common)[0]):
        with suppress(OSError), socket.create_connection((host, port), LISTENS_S):
            return endpoint(host, port)
    return ""


def where(common: Common) -> tuple[str, PeerKey | None]:
    """The broker's address and the key to use there."""
    key = key_of(common.settings)
    return address_of(common.settings, key), key


def connected(common: Common) -> AbstractAsyncContextManager[Client]:
    return connect(common) if common.session is None else common.session.connected(common)


def run(common: Common, work: Coroutine[Any, Any, T]) -> T:
    """Run it on a new loop, or in a shell on the loop of the shell."""
    import asyncio

    return asyncio.run(work) if common.session is None else common.session.run(work)


def ask(common: Common, question: Callable[[Client], Awaitable[T]]) -> T:
    """While a task waits, as for its model to be loaded, stderr says for what."""

    async def answer() -> T:
        from llambo.cli.kit.progress import wait_shown

        async with connected(common) as client:
            with wait_shown(client):
                return await question(client)

    return run(common, answer())


def query(common: Common, what: str, argument: str = "") -> Any:
    """The answer as it was sent, with fields that this version does not know: what `--json` prints."""
    return ask(common, lambda client: client.query(what, argument))


def rows_of(answer: Any, kind: type[T]) -> T:
    """The answer to a query as typed rows."""
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise LlamboError(Code.BAD_MESSAGE, f"the broker's answer cannot be read: {error}") from error


def state_folder(environ: Mapping[str, str], *parts: str) -> Path:
    """Where this user's state is: chats, histories, fleets."""
    base = environ.get("XDG_STATE_HOME") or os.path.join(environ.get("HOME", "/"), ".local", "state")
    return Path(base, "llambo", *parts)
