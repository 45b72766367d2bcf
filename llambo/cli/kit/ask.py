"""How a command reaches the mesh: which broker and key, a client, a question and its answer.

In a shell all commands share one client and one loop; elsewhere each command has its own.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from llambo.cli.kit.common import Common

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client
    from llambo.mesh.settings.settings import Settings
    from llambo.mesh.wire.identity import PeerKey

T = TypeVar("T")


def connect(common: Common) -> Client:
    """A client with the settings in force. Enter it with `async with`."""
    import getpass
    import socket

    from llambo.mesh.client.client import Client

    settings = common.settings
    address, key = where(common)
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        user = "unknown"
    return Client(
        address,
        name=f"{user}@{socket.gethostname()}",
        connect_ms=settings.number("connect_ms"),
        key=key or "",
    )


def key_of(settings: Settings) -> PeerKey | None:
    """The key of a client or a worker; None without keys."""
    from llambo.mesh.security import keys

    return keys.find(settings.text("key"), os.environ)


def address_of(settings: Settings, key: PeerKey | None) -> str:
    """The broker's address: the one in the key, unless a setting names another."""
    if key is not None and settings.sources["broker"] == "default":
        return key.address
    return settings.text("broker")


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
    async def answer() -> T:
        async with connected(common) as client:
            return await question(client)

    return run(common, answer())
