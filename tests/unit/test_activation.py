"""Sockets passed by a service manager: which is which, and what cannot be used."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from llambo.mesh.service.service_manager import NAMES, inherited
from llambo.mesh.wire.errors import Code, LlamboError

#: Far from the descriptors of the test itself.
FIRST = 300


class Four:
    """Four sockets that listen at ports in a row, and descriptors for them where a service would find them."""

    def __init__(self) -> None:
        while True:
            first = socket.create_server(("127.0.0.1", 0))
            self.port: int = first.getsockname()[1]
            self.held = [first]
            try:
                for number in (1, 2, 3):
                    self.held.append(socket.create_server(("127.0.0.1", self.port + number)))
                return
            except OSError:
                self.close()

    def give(self, *order: int) -> dict[str, str]:
        for number, place in enumerate(order):
            os.dup2(self.held[place].fileno(), FIRST + number)
        return {"LISTEN_PID": "7", "LISTEN_FDS": str(len(order))}

    def close(self) -> None:
        for there in self.held:
            there.close()


@pytest.fixture
def four() -> Iterator[Four]:
    made = Four()
    yield made
    made.close()
    for number in range(4):
        try:
            os.close(FIRST + number)
        except OSError:
            continue  # it was not passed


def test_nothing_is_there_unless_it_is_meant_for_us(four: Four) -> None:
    assert inherited({}, 7, FIRST) is None
    environ = four.give(0, 1, 2, 3)
    assert inherited(environ, 8, FIRST) is None
    assert not environ  # or a child process would take them for its own


@pytest.mark.parametrize("names", ["", "broker.socket:broker.socket:broker.socket:broker.socket"])
def test_without_names_of_their_own_the_ports_tell(four: Four, names: str) -> None:
    found = inherited(four.give(2, 0, 3, 1) | {"LISTEN_FDNAMES": names}, 7, FIRST)
    assert found is not None
    assert (found.host, found.port) == ("127.0.0.1", four.port)
    assert found.descriptors == (FIRST + 1, FIRST + 3, FIRST, FIRST + 2)
    assert not any(os.get_inheritable(descriptor) for descriptor in found.descriptors)


def test_names_tell(four: Four) -> None:
    names = ":".join(NAMES[place] for place in (3, 2, 1, 0))
    found = inherited(four.give(3, 2, 1, 0) | {"LISTEN_FDNAMES": names}, 7, FIRST)
    assert found is not None and found.descriptors == (FIRST + 3, FIRST + 2, FIRST + 1, FIRST)


@pytest.mark.parametrize(
    ("order", "names", "text"),
    [
        ((0, 1, 2), "", "four ports in a row"),
        ((0, 1, 3, 2), ":".join(NAMES), "four ports in a row"),
        ((0, 1, 2, 3), "clients:workers:tokens-in:other", "have the names clients"),
    ],
)
def test_what_does_not_fit_is_reported(four: Four, order: tuple[int, ...], names: str, text: str) -> None:
    with pytest.raises(LlamboError, match=text) as caught:
        inherited(four.give(*order) | {"LISTEN_FDNAMES": names}, 7, FIRST)
    assert caught.value.code is Code.BAD_SETTING


def test_only_sockets_that_listen_will_do() -> None:
    with socket.socket() as idle:
        os.dup2(idle.fileno(), FIRST)
    try:
        with pytest.raises(LlamboError, match="not all listening TCP sockets"):
            inherited({"LISTEN_PID": "7", "LISTEN_FDS": "1"}, 7, FIRST)
    finally:
        os.close(FIRST)
    with pytest.raises(LlamboError, match=f"descriptor {FIRST}"):
        inherited({"LISTEN_PID": "7", "LISTEN_FDS": "1"}, 7, FIRST)
