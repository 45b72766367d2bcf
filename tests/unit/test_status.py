"""The table of identities in `llambo status`, from what a broker answers."""

from __future__ import annotations

import msgspec
import pytest

from llambo.cli.commands.status import show_identities
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import Identity
from llambo.mesh.wire.reports import MeshStatus
from tests.unit.broker_bench import Bench


def test_what_each_has_of_what_it_may_have(capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench()
    bench.keys(
        Identity("gpu", "worker"),
        Identity("boss", "admin"),
        Identity("friend", "client", max_in_flight=1, max_queued=2, max_bytes=2**20, priority_max="normal"),
        Identity("laptop", "client"),
    )
    bench.worker("gpu", slots=2, user="gpu")
    friend, laptop = bench.client(b"g", user="friend"), bench.client(b"l", user="laptop")
    for number in range(4):
        friend.submit(number)
    friend.submit(9, priority="interactive")
    laptop.submit(10)
    boss = bench.client(b"b", user="boss")
    boss.send(m.Query(1, "status"))
    show_identities(msgspec.msgpack.decode(boss.received(m.Result)[-1].data, type=MeshStatus).identities)
    boss_line, friend_line, laptop_line = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[1:]]
    assert boss_line == "boss 0 0 0 B 0 0 0"
    assert friend_line == "friend 1/1 2/2 6.765 KiB/1 MiB 3 0 2: 1 max_queued, 1 priority_max"
    assert laptop_line == "laptop 1 0 2.255 KiB 1 0 0"
