"""Asking the mesh: a client, one question, an answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from llambo.cli.common import Common
from llambo.cli.keyfile import address_of, key_of

if TYPE_CHECKING:
    from llambo.mesh.client import Client

T = TypeVar("T")


def connect(common: Common) -> Client:
    """A client with the settings in force, to be entered with `async with`."""
    import getpass
    import socket

    from llambo.mesh.client import Client

    settings = common.settings
    key = key_of(settings)
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        user = "somebody"
    return Client(
        address_of(settings, key),
        name=f"{user}@{socket.gethostname()}",
        connect_ms=settings.number("connect_ms"),
        key=key or "",
    )


def ask(common: Common, question: Callable[[Client], Awaitable[T]]) -> T:
    import asyncio

    async def answer() -> T:
        async with connect(common) as client:
            return await question(client)

    return asyncio.run(answer())
