"""Addresses, before any socket is made of them."""

from __future__ import annotations

import pytest

from llambo.mesh.link import sockets
from llambo.mesh.wire.errors import Code, LlamboError


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("tcp://box:7000", ("box", 7000)),
        ("box", ("box", sockets.DEFAULT_PORT)),
        ("tcp://127.0.0.1", ("127.0.0.1", sockets.DEFAULT_PORT)),
        ("tcp://[::1]:9", ("::1", 9)),
    ],
)
def test_an_address_is_host_and_port(address: str, parts: tuple[str, int]) -> None:
    assert sockets.split(address) == parts


@pytest.mark.parametrize("address", ["", "http://box", "tcp://", "tcp://box:port", "tcp://box:99999", "tcp://box/x"])
def test_what_is_no_address_is_named(address: str) -> None:
    with pytest.raises(LlamboError) as caught:
        sockets.split(address)
    assert caught.value.code is Code.BAD_SETTING
    assert repr(address) in caught.value.text


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost"])
def test_loopback_is_this_machine_alone(host: str) -> None:
    assert sockets.is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", "10.0.0.1", "box", "localhost.example"])
def test_anything_else_may_be_reached(host: str) -> None:
    assert not sockets.is_loopback(host)
