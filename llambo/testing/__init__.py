"""Meshes for tests: real brokers and workers with the fake engine, commands, terminals, and peers that misbehave."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llambo.testing.commands import Commands, up
    from llambo.testing.mesh import Mesh, truth
    from llambo.testing.processes import Process
    from llambo.testing.proxy import Proxy, ThreadedProxy
    from llambo.testing.raw_peer import RawPeer
    from llambo.testing.terminal import Terminal
    from llambo.worker.config import FakeOptions

# Loaded on first use: the processes that a mesh starts are measured, and import this package as well.
_HOME = {
    "Commands": "commands",
    "FakeOptions": "mesh",
    "Mesh": "mesh",
    "Process": "processes",
    "Proxy": "proxy",
    "RawPeer": "raw_peer",
    "Terminal": "terminal",
    "ThreadedProxy": "proxy",
    "truth": "mesh",
    "up": "commands",
}

__all__ = ["Commands", "FakeOptions", "Mesh", "Process", "Proxy", "RawPeer", "Terminal", "ThreadedProxy", "truth", "up"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llambo.testing' has no attribute {name!r}")
    return getattr(import_module(f"llambo.testing.{_HOME[name]}"), name)
