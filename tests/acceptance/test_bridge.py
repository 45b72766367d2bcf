"""`llambo bridge` by netcat, as docs/bridge.md shows it."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llambo.testing.commands import ROOT, Commands, environment, up
from llambo.testing.processes import TIMEOUT_S, Process

PAGE = (ROOT / "docs" / "bridge.md").read_text(encoding="utf-8")
CROWD = 200


@pytest.fixture(scope="module")
def mesh() -> Iterator[Commands]:
    with up("--engine", "fake", "--workers", "1") as (mesh, _):
        yield mesh


@contextmanager
def bridge(mesh: Commands, *words: str) -> Iterator[Process]:
    with mesh.start("bridge", *words) as running:
        running.line("listening at")
        yield running


def netcat(*words: str, text: str) -> str:
    """What it prints until the bridge has closed."""
    done = subprocess.run(["nc", "-N", *words], input=text.encode(), capture_output=True, timeout=TIMEOUT_S, check=True)
    return done.stdout.decode()


# --- the page ----------------------------------------------------------------------------------------------


def session() -> list[tuple[str, str]]:
    found = re.search(r"<!-- session -->\n```text\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return [(line[0], line[2:]) for line in found[1].splitlines()]


def shown(lines: list[str]) -> list[str]:
    """Without what is another time otherwise: ids, moments, and which tokens came together."""
    shortened: list[str] = []
    text = ""
    for line in lines:
        if line.endswith('"final":false}'):
            text += json.loads(line)["token"]
            continue
        if text:
            shortened.append(text)
            text = ""
        shortened.append(re.sub(r'("id":)"\w{32}"|("queued_ms":)\d+', r"\1\2_", line))
    return shortened


def test_the_session_of_the_page(mesh: Commands, tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    sent = "".join(f"{text}\n" for side, text in session() if side == ">")
    expected = shown([text for side, text in session() if side == "<"])
    with bridge(mesh, "--socket", str(path)):
        answered = shown(netcat("-U", str(path), text=sent).splitlines())
    assert len(answered) == len(expected) > 10
    for line, wanted in zip(answered, expected, strict=True):
        begin, cut, _ = wanted.partition("...")
        assert (line[: len(begin)] if cut else line) == begin


def test_the_program_of_the_page(mesh: Commands, tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    with bridge(mesh, "--socket", str(tmp_path / "b.sock")):
        done = subprocess.run(
            [sys.executable, "-c", found[1]], cwd=tmp_path, env=environment(), capture_output=True, text=True,
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 20


# --- netcat --------------------------------------------------------------------------------------------------


def test_many_netcats_at_once(mesh: Commands, tmp_path: Path) -> None:
    """All of them are connected when the first one asks."""
    path = str(tmp_path / "b.sock")
    with bridge(mesh, "--socket", path, "--connections", str(CROWD)):
        crowd = [
            subprocess.Popen(["nc", "-N", "-U", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(CROWD)
        ]
        try:
            answers = []
            for each in crowd:
                assert each.stdin is not None and each.stdout is not None
                each.stdin.write(b"PING\n")
                each.stdin.flush()
            for each in crowd:
                assert each.stdout is not None and b"pong" in each.stdout.readline()
            assert "connections are open" in netcat("-U", path, text="")
            for number, each in enumerate(crowd):
                request = json.dumps({"prompt": "hi", "seed": number, "max_tokens": 5})
                assert each.stdin is not None
                each.stdin.write(f"INFER {request}\n".encode())
                each.stdin.close()
                each.stdin = None
            for each in crowd:
                answers.append(json.loads(each.communicate(timeout=TIMEOUT_S)[0])["data"])
        finally:
            for each in crowd:
                each.kill()
                each.wait(TIMEOUT_S)
    assert len({answer["text"] for answer in answers}) == CROWD
    assert {answer["tokens"] for answer in answers} == {5}


def test_lines_that_mean_nothing_are_answered(mesh: Commands, tmp_path: Path) -> None:
    path = str(tmp_path / "b.sock")
    lines = ["frob", "PING x", "INFER", "INFER {", 'INFER {"prompt": 1}', "LOAD nope", "INFER " + 2_000 * "x", "\0"]
    with bridge(mesh, "--socket", path, "--line-bytes", "1024"):
        answered = [json.loads(line) for line in netcat("-U", path, text="\r\n".join([*lines, "PING"])).splitlines()]
    assert [line["status"] for line in answered] == len(lines) * ["error"] + ["ok"]
    assert all(line["message"] and line["data"]["hint"] for line in answered[:-1])


def test_tcp_and_quit(mesh: Commands) -> None:
    with mesh.start("bridge", "--tcp", "0", "--quit-stops") as running:
        port = running.line(r"listening at 127\.0\.0\.1 (\d+); try: nc 127")[1]
        assert "pong" in netcat("127.0.0.1", port, text="PING\n")
        assert "bye" in netcat("127.0.0.1", port, text="QUIT\n")
        assert running.end() == 0


# --- the process ---------------------------------------------------------------------------------------------


def test_a_bridge_that_is_ended_takes_its_socket_along(mesh: Commands, tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    with bridge(mesh, "--socket", str(path)) as running:
        second = mesh.llambo("bridge", "--socket", str(path))
        assert second.code == 2 and f"a bridge is already running at {path}" in second.err
        running.send(signal.SIGTERM)
        assert running.end() == 0, running.story("it should have ended well")
    assert not path.exists()


def test_what_a_killed_bridge_has_left_is_replaced(mesh: Commands, tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    with bridge(mesh, "--socket", str(path)) as running:
        running.send(signal.SIGKILL)
        running.end()
    assert path.is_socket()
    with bridge(mesh, "--socket", str(path)):
        assert "pong" in netcat("-U", str(path), text="PING\n")


def test_without_a_broker_it_does_not_begin(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        away = Commands(f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        done = away.llambo("bridge", "--socket", str(tmp_path / "b.sock"), "--connect-ms", "300")
    assert done.code == 3 and "no broker answers" in done.err
    assert not list(tmp_path.iterdir())
