"""Fixtures of several of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llambo.testing.mesh import Mesh
from llambo.testing.raw_peer import RawPeer
from llambo.worker.config import FakeOptions
from tests.integration.healthy import Healthy


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
