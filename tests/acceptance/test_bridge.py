"""`llambo bridge` as docs/bridge.md shows it: by a socket of our own, and once by netcat."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


@contextmanager
def connected(address: str | int) -> Iterator[socket.socket]:
    """To a Unix socket, or to a port of loopback."""
    family, where = (socket.AF_UNIX, address) if isinstance(address, str) else (socket.AF_INET, ("127.0.0.1", address))
    with socket.socket(family) as peer:
        peer.settimeout(TIMEOUT_S)
        peer.connect(where)
        yield peer


def ask(address: str | int, text: str) -> str:
    """Send this, end our direction as `nc -N` does, and read until the bridge has closed."""
    with connected(address) as peer:
        peer.sendall(text.encode())
        peer.shutdown(socket.SHUT_WR)
        with peer.makefile("rb") as answers:
            return answers.read().decode()


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
        answered = shown(ask(str(path), sent).splitlines())
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


# --- other peers ---------------------------------------------------------------------------------------------


@pytest.mark.needs("nc")
def test_netcat_gets_its_answers(mesh: Commands, tmp_path: Path) -> None:
    path = str(tmp_path / "b.sock")
    with bridge(mesh, "--socket", path):
        done = subprocess.run(
            ["nc", "-N", "-U", path], input=b"PING\nINFER hi\n", capture_output=True, timeout=TIMEOUT_S, check=True
        )
    pong, answer = map(json.loads, done.stdout.splitlines())
    assert (pong["message"], answer["status"]) == ("pong", "ok")


def test_many_connections_at_once(mesh: Commands, tmp_path: Path) -> None:
    """All of them are connected when the first one asks."""
    path = str(tmp_path / "b.sock")
    with bridge(mesh, "--socket", path, "--connections", str(CROWD)), ExitStack() as open_ones:
        crowd = [open_ones.enter_context(connected(path)) for _ in range(CROWD)]
        for peer in crowd:
            peer.sendall(b"PING\n")
        replies = [open_ones.enter_context(peer.makefile("rb")) for peer in crowd]
        assert all(b"pong" in reply.readline() for reply in replies)
        assert "connections are open" in ask(path, "")
        for number, peer in enumerate(crowd):
            request = json.dumps({"prompt": "hi", "seed": number, "max_tokens": 5})
            peer.sendall(f"INFER {request}\n".encode())
            peer.shutdown(socket.SHUT_WR)
        answers = [json.loads(reply.read())["data"] for reply in replies]
    assert len({answer["text"] for answer in answers}) == CROWD
    assert {answer["tokens"] for answer in answers} == {5}


def test_lines_that_mean_nothing_are_answered(mesh: Commands, tmp_path: Path) -> None:
    path = str(tmp_path / "b.sock")
    lines = ["frob", "PING x", "INFER", "INFER {", 'INFER {"prompt": 1}', "LOAD nope", "INFER " + 2_000 * "x", "\0"]
    with bridge(mesh, "--socket", path, "--line-bytes", "1024"):
        answered = [json.loads(line) for line in ask(path, "\r\n".join([*lines, "PING"])).splitlines()]
    assert [line["status"] for line in answered] == len(lines) * ["error"] + ["ok"]
    assert all(line["message"] and line["data"]["hint"] for line in answered[:-1])


def test_tcp_and_quit(mesh: Commands) -> None:
    with mesh.start("bridge", "--tcp", "0", "--quit-stops") as running:
        port = int(running.line(r"listening at 127\.0\.0\.1 (\d+); try: nc 127")[1])
        assert "pong" in ask(port, "PING\n")
        assert "bye" in ask(port, "QUIT\n")
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
        assert "pong" in ask(str(path), "PING\n")


def test_without_a_broker_it_does_not_begin(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        away = Commands(f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        done = away.llambo("bridge", "--socket", str(tmp_path / "b.sock"), "--connect-ms", "300")
    assert done.code == 3 and "no broker answers" in done.err
    assert not list(tmp_path.iterdir())
