"""What the Makefile calls before there is an environment: what pip says, and what is said to the person."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests import needs
from tools import needs as system
from tools.install import InstallError, Pip, lines, terminal
from tools.steps import Step


class Shown(Step):
    """A step that only notes what it is given."""

    def __init__(self) -> None:
        super().__init__("step")
        self.seen: list[tuple[str, float | None]] = []

    def at(self, doing: str, share: float | None = None) -> None:
        self.seen.append((doing, share))


def test_what_pip_draws_becomes_a_share_of_a_download(tmp_path: Path) -> None:
    pip, step = Pip(tmp_path), Shown()
    for line in (
        "Collecting numpy>=1.26",
        "  Downloading numpy-2.4-cp311.whl (16.5 MB)",
        "     ━━━━━━━╸            4.1/16.5 MB 9.1 MB/s eta 0:00:02",
        "     ━━━━━━━━━━━━━━━━━━ 16.5/16.5 MB 9.1 MB/s eta 0:00:00",
        "Collecting click>=8.1",
        "  Downloading click-8.3-py3-none-any.whl (500 kB)",
        "Installing collected packages: click, numpy",
        "  a line that says nothing",
    ):
        pip._show(line, step)
    assert pip.downloaded_bytes == 17_000_000
    shares = [(doing.split()[1].partition("-")[0], share) for doing, share in step.seen if share is not None]
    assert shares == [("numpy", 4.1 / 16.5), ("numpy", 1.0)]
    assert [doing.split()[0] for doing, share in step.seen if share is None] == [
        "Collecting", "Downloading", "Collecting", "Downloading", "Installing"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("ERROR: [Errno 28] No space left on device", "1 GB has to be free"),
        ("ERROR: No matching distribution found for xllamacpp==1", "make LLAMA=llama-native"),
        ("  CMake Error: CMAKE_CXX_COMPILER not set\nERROR: Failed to build llama-cpp-python", "make LLAMA=llama"),
        ("connection broken by 'NewConnectionError(...)'\nNo matching distribution found for click", "PIP_INDEX_URL"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] ... Max retries exceeded", "PIP_CERT"),
        ("something new", "the last lines above say why"),
    ],
)
def test_an_error_of_pip_comes_with_what_to_do(tmp_path: Path, said: str, hint: str) -> None:
    log = tmp_path / "install.log"
    log.write_text(said)
    text = str(InstallError(log))
    assert said.splitlines()[-1] in text and hint in text and str(log) in text


def test_a_pip_that_fails_is_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho \"pip $4: after connection broken by 'NewConnectionError'\"; exit 1\n")
    python.chmod(0o755)
    with pytest.raises(InstallError, match=r"--no-input: after connection(.|\n)*PIP_INDEX_URL(.|\n)*install.log"):
        Pip(tmp_path).install("a step", "x")
    assert capsys.readouterr().out == "a step ... failed\n"


def test_a_line_that_is_drawn_again_is_a_line_of_its_own() -> None:
    reading, writing = terminal()
    os.write(writing, b"\x1b[33mone\x1b[0m\r\x1b[2Ktwo\r\nthree")
    os.write(writing, b" and four\n")
    os.close(writing)
    assert [line for line in lines(reading) if line] == ["one", "two", "three and four"]


def test_the_command_names_each_package_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda name: name == "dnf")
    chosen = [system.BY_NAME["ip"], system.BY_NAME["sshd"], system.BY_NAME["ip"]]
    assert system.install_command(chosen) == "sudo dnf install -y util-linux iproute openssh-server openssh-clients"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert system.install_command(chosen[:1]) == "sudo apt-get install -y util-linux iproute2"


def test_what_was_skipped_is_counted_with_what_to_install() -> None:
    def skipped(*names: str) -> pytest.TestReport:
        return pytest.TestReport(
            "t", ("t", 0, "t"), {}, "skipped", None, "setup", user_properties=[(needs.MARK, name) for name in names]
        )

    assert needs.count([skipped()]) == ""
    line = needs.count([skipped("nc"), skipped("chromium"), skipped("chromium"), skipped("manager"), skipped()])
    assert line.startswith("4 tests were skipped: 2 need chromium, 1 needs nc, 1 needs manager; install: ")
    assert "netcat" in line and "chromium" in line
    assert needs.count([skipped("manager")]) == "1 test was skipped: 1 needs manager"


def test_every_need_that_a_test_names_is_known() -> None:
    here = Path(__file__).resolve().parents[1]
    named = {
        name
        for path in here.rglob("test_*.py")
        for call in re.findall(r"mark\.needs\(([^)]*)\)", path.read_text(encoding="utf-8"))
        for name in re.findall(r'"([^"]+)"', call)
    }
    assert {"chromium", "systemd", "nc", "manager"} <= named <= set(system.BY_NAME) | set(needs.CONDITIONS)
