"""Fixtures of several of these tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from llambo.testing.mesh import Mesh
from llambo.testing.raw_peer import RawPeer
from llambo.worker.config import FakeOptions
from tests.integration.healthy import Healthy


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    """The setting holds for engines in this process, too: test_llama_libraries.py runs some of these tests with it."""
    if configured := os.environ.get("LLAMBO_LLAMA_LIB"):
        from llambo.worker.llama import llama

        llama.open_library(configured)


@pytest.fixture(scope="module")
def steady_mesh() -> Iterator[Mesh]:
    """One broker, whose invariants are checked after each turn, and one worker with free slots."""
    with Mesh(workers=1, fake=FakeOptions(slots=8, tokens_per_s=500), check=True) as mesh:
        yield mesh


@pytest.fixture
def healthy(steady_mesh: Mesh) -> Iterator[Healthy]:
    with Healthy(steady_mesh) as stream:
        yield stream


@pytest.fixture
def raw_client(steady_mesh: Mesh, healthy: Healthy) -> Iterator[RawPeer]:
    """A client that has joined and will misbehave, while a healthy stream runs."""
    with RawPeer(steady_mesh.port) as peer:
        peer.join_as_client()
        yield peer
