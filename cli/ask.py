"""Asking the mesh: a client, one question, an answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from llambo.cli.common import Common

if TYPE_CHECKING:
    from llambo.mesh.client import Client

T = TypeVar("T")


def connect(common: Common) -> Client:
    """A client with the settings in force, to be entered with `async with`."""
    import getpass
    import socket

    from llambo.mesh.client import Client

    settings = common.settings
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        user = "somebody"
    return Client(
        settings.text("broker"), name=f"{user}@{socket.gethostname()}", connect_ms=settings.number("connect_ms")
    )  # fmt: skip


def ask(common: Common, question: Callable[[Client], Awaitable[T]]) -> T:
    import asyncio

    async def answer() -> T:
        async with connect(common) as client:
            return await question(client)

    return asyncio.run(answer())
