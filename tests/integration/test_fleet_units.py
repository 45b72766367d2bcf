"""A fleet whose workers are units of a real service manager."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_systemd import LLAMBO, Services

pytestmark = pytest.mark.needs("systemd", "ip", "manager")

FILE = """
[fleet]
name = "rig"

[hosts.here]
provider = "systemd"
user = true
memory = "8GiB"
cores = 8

[hosts.broker]
memory = "1GiB"
cores = 1

[broker]
host = "broker"
port = 7330

[classes.tiny]
engine = "fake"
slots = SLOTS
memory = "100MiB"
hosts = ["here"]
min = COUNT
max = 5
cpu_weight = 50
[classes.tiny.fake]
tokens_per_s = 200
"""


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    made = Services(tmp_path)
    try:
        yield made
    finally:
        made.manager.close()


def fleet(services: Services, *words: str) -> Any:
    output = services.manager.run(LLAMBO, "fleet", *words, "--file", "/run/rig/fleet.toml", "--state", "/run/rig/state",
                                "--json")  # fmt: skip
    return json.loads(output)


def write(services: Services, count: int, slots: int) -> None:
    services.write("fleet.toml", FILE.replace("COUNT", str(count)).replace("SLOTS", str(slots)))


def pids(services: Services) -> dict[str, int]:
    return {node["node"]: node["pid"] for node in fleet(services, "status")["nodes"] if node["class"] == "tiny"}


def test_workers_are_units_and_only_the_difference_is_changed(services: Services) -> None:
    write(services, 2, 3)
    fleet(services, "apply")
    before = pids(services)
    assert sorted(before) == ["tiny-0001", "tiny-0002"]
    for name, pid in before.items():
        shown = services.manager.show(f"llambo-worker@{name}.service", "MainPID", "ActiveState", "CPUWeight")
        assert shown == {"MainPID": str(pid), "ActiveState": "active", "CPUWeight": "50"}
        assert (services.rig / f"etc/llambo/worker-{name}.env").stat().st_mode & 0o077 == 0
    output = services.manager.run(LLAMBO, "send", "--class", "tiny", "--max-tokens", "3", "hello")
    assert output.strip()

    # Nothing is to be done, and nothing is.
    assert fleet(services, "plan")["steps"] == []
    fleet(services, "apply")
    assert pids(services) == before

    # One more: the others stay as they are.
    write(services, 3, 3)
    fleet(services, "apply")
    after = pids(services)
    assert after.keys() - before.keys() == {"tiny-0003"} and before.items() <= after.items()

    # Killed, it is begun again by its manager, and is none of ours to begin.
    since = services.manager.mark()
    services.manager.run("kill", "-9", str(after["tiny-0003"]))
    services.manager.notified("READY=1", ["llambo-worker@tiny-0003.service"], since)
    assert fleet(services, "plan")["steps"] == []

    fleet(services, "down")
    assert pids(services) == {}
    assert not list((services.rig / "etc/llambo").glob("worker-tiny-*"))
