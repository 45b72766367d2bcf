"""What helps at a terminal: the pages of the documentation, and completion in the shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llambo.cli.commands import completion
from llambo.cli.commands.help import COLUMNS, drawn, pages
from llambo.cli.kit.failure import Exit
from llambo.cli.main import main

pytestmark = pytest.mark.usefixtures("nothing_inherited")
ROOT = Path(__file__).resolve().parents[2]


def llambo(*words: str, **environ: str) -> Result:
    return CliRunner().invoke(main, words, prog_name="llambo", env=environ)


# --- pages ---------------------------------------------------------------------------------------------


def test_every_page_is_listed_with_its_first_sentence() -> None:
    lines = llambo("help").stdout.splitlines()
    assert lines[0].split() == ["PAGE", "ABOUT"]
    listed = {line.split()[0]: line.partition(" ")[2].strip() for line in lines[1:-1]}
    assert set(listed) == {path.stem for path in (ROOT / "docs").glob("*.md")} | {"readme", "security", "changelog"}
    assert all(len(about) > 20 and not set(about) & set("#`*") for about in listed.values()), listed


def test_in_a_pipe_a_page_is_as_it_was_written() -> None:
    assert llambo("help", "Operations.md").stdout == (ROOT / "docs/operations.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(pages()))
def test_on_a_terminal_a_page_fits_and_names_the_command_behind_each_link(name: str) -> None:
    shown = re.sub(r"\x1b\[[0-9;]*m", "", drawn(pages()[name].read_text(encoding="utf-8"), 80))
    assert max(map(len, shown.splitlines())) <= 80 < COLUMNS
    named = set(re.findall(r"\(llambo help\s+([\w-]+)\)", " ".join(shown.split())))
    assert named <= set(pages())
    assert ".md#" not in shown, "the target of a link, which leads nowhere here"


def test_the_help_of_a_command_is_a_topic() -> None:
    assert llambo("help", "keys", "add").stdout == llambo("keys", "add", "--help").stdout


def test_what_is_neither_page_nor_command_is_refused() -> None:
    result = llambo("help", "cluster")
    assert (result.exit_code, result.stderr) == (
        Exit.USAGE,
        "llambo: there is no page and no command 'cluster'\n  `llambo help` lists the pages\n",
    )


def test_a_topic_of_another_name_points_to_its_page() -> None:
    assert "`llambo help operations`" in llambo("help", "uninstall").stderr


# --- completion ----------------------------------------------------------------------------------------


def test_every_program_is_completed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == completion.PROGRAMS


def test_a_real_bash_completes_a_command_and_a_value(tmp_path: Path) -> None:
    assert llambo("completion", "bash", "--install", HOME=str(tmp_path), XDG_DATA_HOME="").exit_code == 0
    program = tmp_path / "llambo"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llambo.cli "$@"\n')
    program.chmod(0o755)
    script = f"""
    complete() {{ :; }}  # it works in interactive shells only
    . "{tmp_path}/.local/share/bash-completion/completions/llambo"
    for line in "llambo dra" "llambo completion f" "llambo help oper"; do
        COMP_WORDS=($line) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) COMPREPLY=()
        _llambo_completion "{program}"; echo "${{COMPREPLY[*]}}"
    done
    """
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["drain", "fish", "operations"], done.stderr


@pytest.mark.parametrize("shell", completion.SHELLS)
@pytest.mark.parametrize("package", [True, False])
def test_a_second_install_adds_no_second_line(shell: str, package: bool, tmp_path: Path) -> None:
    places = completion.places(shell, {"HOME": str(tmp_path)}, bash_completion=package)
    (tmp_path / ".zshrc").write_text("setopt x")  # without a line break at its end
    for _ in range(2):
        completion.install_at(places, shell)
    names = {places.file.format(program) for program in completion.PROGRAMS}
    assert {path.name for path in places.folder.iterdir()} == names
    assert (places.startup is None) == (shell == "fish" or (shell == "bash" and package))
    if places.startup is not None:
        lines = places.startup.read_text().splitlines()
        assert lines == [*(["setopt x"] if shell == "zsh" else []), places.line + completion.MARK]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_uninstall_removes_the_files_and_the_line_and_nothing_else(shell: str, tmp_path: Path) -> None:
    places = completion.places(shell, {"HOME": str(tmp_path)}, bash_completion=False)
    startup = places.startup or tmp_path / "other"
    startup.write_text("alias x=y\n")
    startup.chmod(0o640)
    completion.install_at(places, shell)
    other = places.folder / "another"
    other.touch()

    result = llambo("completion", "--uninstall", HOME=str(tmp_path), XDG_DATA_HOME="", XDG_CONFIG_HOME="", ZDOTDIR="")

    assert result.exit_code == 0 and result.stdout.count("removed") == 3 + (places.startup is not None), result.output
    assert list(places.folder.iterdir()) == [other]
    assert startup.read_text() == "alias x=y\n" and startup.stat().st_mode & 0o777 == 0o640
    assert llambo("completion", "--uninstall", HOME=str(tmp_path)).stdout == ""


def test_a_bash_whose_completions_were_deleted_starts_without_an_error(tmp_path: Path) -> None:
    line = completion.places("bash", {"HOME": str(tmp_path)}, bash_completion=False).line
    done = subprocess.run(["bash", "-ec", line], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""


def test_without_the_variable_the_login_shell_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llambo.cli.commands.completion.login_shell", lambda: "/usr/bin/fish")
    assert "fish" in llambo("completion", SHELL="").stdout
    assert isinstance(completion.login_shell(), str)


def test_a_shell_that_is_not_known_is_refused() -> None:
    result = llambo("completion", SHELL="/bin/dash")
    assert result.exit_code == Exit.USAGE
    assert "name a shell: bash, zsh, fish" in result.stderr


# --- options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "near"), [("--kv-typ", "--kv-type"), ("--wokers", "--workers"), ("--quantisation", "")]
)
def test_an_option_that_is_proposed_is_like_the_one_that_was_given(option: str, near: str) -> None:
    result = llambo("up", option, "1")
    assert result.exit_code == Exit.USAGE and f"No such option '{option}'." in result.stderr
    assert ("Did you mean" in result.stderr) == bool(near) and near in result.stderr


def test_a_whole_mesh_takes_the_options_that_save_memory() -> None:
    assert {"--kv-type", "--flash-attn", "--ctx", "--slots"} <= set(llambo("up", "--help").stdout.split())
