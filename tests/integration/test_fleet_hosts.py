"""A fleet on three hosts: a broker with keys on the first, workers on two others, reached by a real ssh."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llambo.testing.processes import line_of
from tests.integration.far_hosts import BOX, Box, Far
from tests.integration.manager import LIMIT_S
from tests.integration.test_systemd import LLAMBO

pytestmark = pytest.mark.needs("systemd", "ip", "sshd", "manager")

FILE = f"""
[fleet]
name = "rig"
broker = "tcp://{BOX}:7330"
keys = "/run/rig/keys"

[hosts.box]
cores = 1

[hosts.far1]
provider = "systemd"
address = "far1"
user = true
memory = "1GiB"
cores = 8

[hosts.far2]
provider = "systemd"
address = "root@far2"
user = true
memory = "1GiB"
cores = 8

[broker]
host = "box"
bind = "0.0.0.0"

[classes.tiny]
engine = "fake"
memory = "100MiB"
hosts = ["far1", "far2"]
min = COUNT
max = 5
[classes.tiny.fake]
tokens_per_s = 500
"""
PLACE = ("--file", "/run/rig/fleet.toml", "--state", "/run/rig/state")


class Rig:
    def __init__(self, folder: Path) -> None:
        with ThreadPoolExecutor() as pool:
            self.box = Box(folder / "box")
            self.far1, self.far2 = self.fars = [Far(folder / f"far{n}", n, self.box) for n in (1, 2)]
            try:
                list(pool.map(Far.switch_on, self.fars))
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        for far in self.fars:
            far.switch_off()
        self.box.manager.close()

    def write(self, count: int) -> None:
        (self.box.rig / "fleet.toml").write_text(FILE.replace("COUNT", str(count)))

    def fleet(self, command: str, fails: bool = False) -> Any:
        """What it says as JSON."""
        output = self.box.manager.run(LLAMBO, "fleet", command, *PLACE, "--json", fails=fails)
        return json.loads(output)

    def nodes(self) -> dict[str, dict[str, Any]]:
        return {node["node"]: node for node in self.fleet("status")["nodes"] if node["class"] == "tiny"}

    def pids(self) -> dict[str, int]:
        return {name: node["pid"] for name, node in self.nodes().items()}

    def send(self) -> str:
        return self.box.manager.run(
            LLAMBO, "send", "--class", "tiny", "--max-tokens", "5", "hello", LLAMBO_KEY="/run/rig/me.key"
        )


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    try:
        yield made
    finally:
        made.close()


def output_until(process: subprocess.Popen[str], text: str) -> str:
    """All that it says until then."""
    output = ""
    while text not in output:
        try:
            output += line_of(process, LIMIT_S)
        except AssertionError as error:
            raise AssertionError(f"nothing of {text!r}: {error}\n{output}") from error
    return output


def llambo(rig: Rig, *words: str) -> None:
    rig.box.manager.run(LLAMBO, *words)


def test_workers_on_other_hosts_come_by_ssh_and_one_that_is_switched_off_is_waited_for(rig: Rig) -> None:
    far1, far2 = rig.far1, rig.far2
    keys = ("--keys", "/run/rig/keys")
    llambo(rig, "keys", "init", "--address", f"tcp://{BOX}:7330", *keys)
    llambo(rig, "keys", "add", "me", "--role", "client", *keys)
    llambo(rig, "keys", "export", "me", *keys, "--output", "/run/rig/me.key")
    rig.write(2)

    # A host whose key was never verified is not used, and the error says what to do.
    rig.box.knows(far1)
    away = rig.fleet("plan")["away"]
    assert away.keys() == {"far2"}
    assert "Host key verification failed: `ssh root@far2 true` has to work here without a prompt" in away["far2"]
    rig.box.knows(far2)

    # One without units of llambo gets no worker, and nothing of it is left there.
    far1.install()
    far1.on.systemctl("daemon-reload")
    report = rig.fleet("apply", fails=True)
    (failed,) = report["failed"]
    assert "did not start on far2: the units of llambo are missing: llambo systemd install" in failed["how"]
    assert (report["done"], far2.files()) == (2, {})
    assert far1.files().keys() == {"worker-tiny-0001.env", "worker-tiny-0001.key"}

    # With units it does, and the one that runs is left alone.
    far2.install()
    far2.on.systemctl("daemon-reload")
    first = rig.pids()
    assert rig.fleet("apply")["done"] == 1
    before = rig.nodes()
    assert {name: (node["host"], node["state"]) for name, node in before.items()} == {
        "tiny-0001": ("far1", "ready"), "tiny-0002": ("far2", "ready")
    }  # fmt: skip
    pids = rig.pids()
    assert first.items() < pids.items()
    for far, name in ((far1, "tiny-0001"), (far2, "tiny-0002")):
        shown = far.on.show(f"llambo-worker@{name}.service", "MainPID", "ActiveState")
        assert shown == {"MainPID": str(pids[name]), "ActiveState": "active"}
    assert rig.send().strip()

    # Their key came by ssh: no other user can read it, and no command line or log has it.
    key = (rig.box.rig / "keys/issued/tiny.key").read_text()
    for far, name in ((far1, "tiny-0001"), (far2, "tiny-0002")):
        put = far.files()
        assert put[f"worker-{name}.key"].read_text() == key
        assert {path.stat().st_mode & 0o777 for path in put.values()} == {0o600}
        assert f"worker-{name}.key" in far.ran()
        assert "llambo-key-1." not in far.ran()
        assert "llambo-key-1." not in json.dumps(far.on.entries)

    # Nothing is to be done, and nothing is.
    report = rig.fleet("apply")
    assert (report["steps"], report["done"], report["away"]) == ([], 0, {})
    assert rig.pids() == pids

    # A host is switched off: that is reported, and its nodes are neither forgotten nor started elsewhere.
    far2.switch_off()
    report = rig.fleet("apply")
    assert (report["steps"], report["failed"], report["away"].keys()) == ([], [], {"far2"}), report
    lost = rig.nodes()["tiny-0002"]
    assert (lost["host"], lost["note"]) == ("far2", "far2 is away")
    assert rig.send().strip()

    # A further worker is started where there is a host, under a name that no other has.
    rig.write(3)
    (step,) = rig.fleet("apply")["steps"]
    assert (step["do"], step["name"], step["host"]) == ("spawn", "tiny-0003", "far1")

    # Switched on again, it has its worker back, which only its own manager has started.
    ran = far2.ran()
    far2.switch_on()
    far2.on.notified("READY=1", ["llambo-worker@tiny-0002.service"])
    report = rig.fleet("apply")
    assert (report["steps"], report["away"]) == ([], {}), report
    assert "enable --quiet --now" not in far2.ran().removeprefix(ran)
    after = rig.nodes()
    assert {name: (node["host"], node["state"]) for name, node in after.items()} == {
        "tiny-0001": ("far1", "ready"), "tiny-0002": ("far2", "ready"), "tiny-0003": ("far1", "ready")
    }  # fmt: skip
    assert after["tiny-0001"]["pid"] == pids["tiny-0001"]

    # The orchestrator tells the same, and begins nothing either.
    orchestrator = rig.box.manager.begin(LLAMBO, "fleet", "run", *PLACE)
    output = output_until(orchestrator, "runs rig")
    far1.switch_off()
    output += output_until(orchestrator, "far1 is away: it cannot be asked: ")
    far1.switch_on()
    output += output_until(orchestrator, "far1 is back")
    for name in ("tiny-0001", "tiny-0003"):
        far1.on.notified("READY=1", [f"llambo-worker@{name}.service"])
    rig.box.manager.run("kill", str(rig.fleet("status")["orchestrator"]["pid"]))
    output += orchestrator.communicate(timeout=LIMIT_S)[0]
    assert "is ready after" not in output and "has left" not in output, output
    assert rig.nodes().keys() == after.keys()

    assert sorted(rig.fleet("down")["ended"]) == ["broker", "tiny-0001", "tiny-0002", "tiny-0003"]
    assert (far1.files(), far2.files()) == ({}, {})
