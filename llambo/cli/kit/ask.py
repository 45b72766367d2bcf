"""Asking the mesh: a client, one question, an answer. In a shell the client is the one that is there already."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from llambo.cli.kit.common import Common
from llambo.cli.kit.keyfile import address_of, key_of
from llambo.mesh.wire.errors import Code, LlamboError

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client
    from llambo.mesh.wire.identity import PeerKey

T = TypeVar("T")


def connect(common: Common) -> Client:
    """A client with the settings in force, to be entered with `async with`."""
    import getpass
    import socket

    from llambo.mesh.client.client import Client

    settings = common.settings
    address, key = where(common)
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        user = "somebody"
    return Client(
        address,
        name=f"{user}@{socket.gethostname()}",
        connect_ms=settings.number("connect_ms"),
        key=key or "",
    )


def where(common: Common) -> tuple[str, PeerKey | None]:
    """Which broker is meant, and who asks it."""
    key = key_of(common.settings)
    return address_of(common.settings, key), key


def connected(common: Common) -> AbstractAsyncContextManager[Client]:
    return connect(common) if common.session is None else common.session.connected(common)


def run(common: Common, work: Coroutine[Any, Any, T]) -> T:
    """On a loop of its own, or on that of the shell this command was typed in."""
    import asyncio

    return asyncio.run(work) if common.session is None else common.session.run(work)


def ask(common: Common, question: Callable[[Client], Awaitable[T]]) -> T:
    async def answer() -> T:
        async with connected(common) as client:
            return await question(client)

    return run(common, answer())


def rows_of(answer: Any, kind: type[T]) -> T:
    """The answer to a query as typed rows. `--json` prints the answer as it was sent, with fields unknown here."""
    import msgspec

    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise LlamboError(Code.BAD_MESSAGE, f"the broker's answer cannot be read: {error}") from error
