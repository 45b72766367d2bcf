"""`llambo keys` as an operator uses it, and a broker that does not start without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llambo.testing.commands import up

BIN = Path(sys.executable).parent
TIMEOUT_S = 60.0


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    program = words[0] if words[0].startswith("llambo") else "llambo"
    rest = words[1:] if words[0].startswith("llambo") else words
    environment = {**os.environ, **env}
    return subprocess.run(
        [str(BIN / program), *rest], check=False, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment
    )


@pytest.fixture
def place(tmp_path: Path) -> str:
    place = str(tmp_path / "keys")
    assert run("keys", "init", "--address", "tcp://box:7330", "--keys", place).returncode == 0
    return place


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_off_loopback_a_broker_wants_keys_and_says_how(host: str, tmp_path: Path) -> None:
    done = run("llambo-broker", "--bind", host, "--port", "0", HOME=str(tmp_path))
    assert done.returncode == 2
    assert "without keys a broker listens on loopback only" in done.stderr
    assert "llambo keys init" in done.stderr
    assert f"llambo-broker --bind {host} --keys " in done.stderr


def test_up_off_loopback_names_itself(tmp_path: Path) -> None:
    done = run("up", "--bind", "0.0.0.0", "--engine", "fake", HOME=str(tmp_path))
    assert done.returncode == 2
    assert "llambo keys init --address tcp://" in done.stderr and "llambo up --bind 0.0.0.0 --keys " in done.stderr


def test_a_folder_that_has_keys_stays_and_other_addresses_are_explained(place: str) -> None:
    done = run("keys", "init", "--address", "tcp://other:7330", "--keys", place)
    assert done.returncode == 2
    assert f"llambo keys export NAME --address tcp://HOST:7330 --keys {place}" in done.stderr


def test_with_keys_the_lines_that_up_prints_work(place: str) -> None:
    with up("--bind", "127.0.0.1", "--keys", place, "--engine", "fake", "--http-port", "0") as (mesh, running):
        shown = [line.strip() for line in running.out if line.startswith("    ")]
        assert [line.split()[0] for line in shown] == ["export", "llambo", "llambo", "llambo", "TOKEN=$(llambo", "curl"]
        curl = shown[-1].replace("curl http", "curl -sS http")
        script = "\n".join(["set -e", shown[0], *shown[2:5], curl])
        path = f"{BIN}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", script], check=False, capture_output=True, text=True, timeout=TIMEOUT_S,
            env={**os.environ, "PATH": path},
        )  # fmt: skip
        assert done.returncode == 0 and '"object":"chat.completion"' in done.stdout, done.stdout + done.stderr
        refused = run("status", "--broker", mesh.address, LLAMBO_KEYS=place)
        assert refused.returncode == 9
        assert f"an admin's key is here: --key {place}/issued/admin.key" in refused.stderr


def test_a_folder_without_keys_is_named_with_what_makes_them(tmp_path: Path) -> None:
    done = run("llambo-broker", "--port", "0", "--keys", str(tmp_path / "none"))
    assert done.returncode == 2
    assert f"llambo keys init --keys {tmp_path / 'none'}" in done.stderr


def test_keys_from_the_first_to_the_last(place: str, tmp_path: Path) -> None:
    def keys(*words: str) -> str:
        done = run("keys", *words, "--keys", place)
        assert done.returncode == 0, done.stderr
        return done.stdout

    keys("add", "laptop", "--role", "client", "--per-minute", "10", "--models", "tiny*", "--expires", "90d")
    keys("add", "gpu", "--role", "worker")
    listed = {entry["name"]: entry for entry in json.loads(keys("list", "--json"))}
    assert {name: entry["role"] for name, entry in listed.items()} == {
        "admin": "admin", "laptop": "client", "gpu": "worker",
    }  # fmt: skip
    assert listed["laptop"]["limits"] == "per minute 10, models tiny*"
    line = keys("export", "laptop").strip()
    assert line.startswith("llambo-key-1.")
    assert "secret" not in keys("list", "--json")
    keys("export", "gpu", "--output", str(tmp_path / "gpu.key"))
    assert (tmp_path / "gpu.key").stat().st_mode & 0o777 == 0o600
    keys("rotate", "laptop")
    assert keys("export", "laptop").strip() != line
    assert keys("list").count("laptop") == 2
    assert "2 keys of laptop revoked" in keys("revoke", "laptop")
    assert "laptop" not in keys("list")
    assert run("keys", "export", "laptop", "--keys", place).returncode != 0


def test_a_key_is_never_shown_by_the_settings(place: str) -> None:
    line = run("keys", "export", "admin", "--keys", place).stdout.strip()
    done = run("config", "--json", LLAMBO_KEY=line)
    assert json.loads(done.stdout)["settings"]["mesh.key"] == {"value": "(a key)", "source": "environment LLAMBO_KEY"}
    assert line not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--key", "admin.key"], "the key 'admin' has the role admin"),
        (["--key", "gpu.key", "--name", "box"], "the key 'gpu' is for workers called gpu or gpu-..., not 'box'"),
    ],
)
def test_a_worker_with_another_ones_key_ends_before_its_model_is_loaded(
    words: list[str], said: str, place: str
) -> None:
    run("keys", "add", "gpu", "--role", "worker", "--keys", place)
    key = f"{place}/issued/{words[1]}"
    done = run("llambo-worker", "--engine", "fake", "--key", key, *words[2:])
    assert done.returncode == 2 and said in done.stderr, done.stderr


def test_what_is_no_key_is_refused_without_repeating_it() -> None:
    done = run("status", "--key", "llambo-key-1.c2VjcmV0")
    assert done.returncode == 2
    assert "this is not a key" in done.stderr
    assert "c2VjcmV0" not in done.stderr
