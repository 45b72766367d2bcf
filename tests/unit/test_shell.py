"""The shell without a mesh: lines, completion, options, exit codes, history."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llambo.cli import main
from llambo.cli.kit.common import Common
from llambo.cli.kit.exits import Exit
from llambo.cli.kit.shell_session import Session
from llambo.cli.shell.shell_lines import BadLine, Order, Prompt, parse
from llambo.cli.shell.shell_main import LINE_BYTES, stdin_lines
from llambo.cli.shell.shell_names import ALIASES, ENTRIES, WATCHED, Known, command_of, completions, options_of
from llambo.cli.shell.shell_prompt import HISTORY_FILE, history, known
from llambo.cli.shell.shell_run import Shell, settable
from llambo.mesh.wire.errors import LlamboError

#: Where nothing listens.
NOBODY = "tcp://127.0.0.1:1"
WORKERS, MODELS, IDS = ("tiny-01", "tiny-02", "large"), ("smollm2", "tiny"), ("3f2a11", "9c0d22")


@pytest.fixture(autouse=True)
def nothing_inherited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("LLAMBO_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def shell(*words: str, stdin: str = "") -> Result:
    told = ("--broker", NOBODY, "shell", "--connect-ms", "50", *words)
    return CliRunner().invoke(main.main, told, input=stdin, prog_name="llambo")


def known_here() -> Known:
    return Known(WORKERS, MODELS, IDS, settable())


# --- lines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("", []),
        ("  ; ;", []),
        ("# a remark; status", []),
        ("status", [Order("status")]),
        ("status; nodes", [Order("status"), Order("nodes")]),
        ("status;nodes;", [Order("status"), Order("nodes")]),
        ("status; # and nothing else", [Order("status")]),
        ("why  3f2a", [Order("why", ("3f2a",), "3f2a")]),
        ('send "one; two" --seed 7', [Order("send", ("one; two", "--seed", "7"), '"one; two" --seed 7')]),
        (r"send one\;two", [Order("send", ("one;two",), r"one\;two")]),
        (r"send 'a\'; nodes", [Order("send", ("a\\",), r"'a\'"), Order("nodes")]),
        ('send "a\\"; b"', [Order("send", ('a"; b',), '"a\\"; b"')]),
        ("What is AI?; really?", [Prompt("What is AI?; really?")]),
        ("status; don't panic; nodes", [Order("status"), Prompt("don't panic; nodes")]),
        ("> why is the sky blue?", [Prompt("why is the sky blue?")]),
        ("nodes; >", [Order("nodes"), Prompt("")]),
        ("statusbar of what?", [Prompt("statusbar of what?")]),
        ("hello", [Prompt("hello")]),
    ],
)
def test_a_line_is_commands_and_at_its_end_maybe_a_prompt(line: str, meant: list[Order | Prompt]) -> None:
    assert parse(line, ENTRIES) == meant


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("status; send don't", "no closing quotation; begin with `>`"),
        ("send a\\", "no escaped character"),
        ("statsu", "'statsu' is no command; 'status' is, and `> statsu` asks the model"),
        ("node", "'nodes' is"),
    ],
)
def test_a_bad_line_says_why(line: str, said: str) -> None:
    with pytest.raises(BadLine) as caught:
        parse(line, ENTRIES)

    assert said in str(caught.value)


def test_every_command_can_be_called_and_explains_itself() -> None:
    for name, entry in ENTRIES.items():
        assert command_of(name).help
        assert bool(entry.about) == (name not in ALIASES)
    assert set(WATCHED) < set(ENTRIES)
    said = shell("-c", "help").stdout
    assert all(f"\n{name} " in f"\n{said}" for name in ENTRIES if name not in ALIASES)
    assert max(map(len, said.splitlines())) <= 80


# --- completion ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sta", ["status"]),
        ("status; no", ["nodes"]),
        ('send "a; no', []),
        ("drain t", ["tiny-01", "tiny-02"]),
        ("undrain l", ["large"]),
        ("drain tiny-01 ", []),
        ("drain --mo", ["--move"]),
        ("drain --move tiny-02", ["tiny-02"]),
        ("why ", list(IDS)),
        ("cancel 9", ["9c0d22"]),
        ("models ", list(MODELS)),
        ("send --model s", ["smollm2"]),
        ("infer --priority b", ["batch"]),
        ("send hello --see", ["--seed"]),
        ("send hello", []),
        ("help w", ["why", "watch", "workers"]),
        ("watch s", ["status"]),
        ("watch why 3", ["3f2a11"]),
        ("set mod", ["model"]),
        ("set model t", ["tiny"]),
        ("set raw ", ["yes", "no"]),
        ("set priority i", ["interactive"]),
        ("unset max", ["max_tokens"]),
        ("unset model t", []),
        ("> wh", []),
        ("tell me wh", []),
    ],
)
def test_tab_completes_names(line: str, words: list[str]) -> None:
    assert completions(line, known_here()) == words


def test_without_a_broker_the_commands_are_completed_all_the_same() -> None:
    async def names() -> Known:
        return await known(Session(Common({"broker": NOBODY})))

    assert completions("ev", asyncio.run(names())) == ["events"]


# --- set -----------------------------------------------------------------------------------------------


def test_what_can_be_set_are_the_options_of_send() -> None:
    flags = {flag for option in options_of(command_of("send")) for flag in option.opts}

    assert {"model", "max_tokens", "temperature", "seed", "stop", "system", "deadline", "stats"} <= set(settable())
    assert {f"--{name.replace('_', '-')}" for name in settable()} - {"--stats"} <= flags


def test_set_shows_what_is_in_force_and_where_it_comes_from() -> None:
    lines = ["set model tiny", "set stop A B", "set system Be brief.", "set raw yes", "set max_tokens 7",
             "unset max_tokens"]  # fmt: skip
    told = json.loads(shell("--max-tokens", "50", "-c", "; ".join([*lines, "set --json"])).stdout)

    assert told["model"] == {"value": "tiny", "source": "set"}
    assert told["stop"] == {"value": "A B", "source": "set"}
    assert told["system"] == {"value": "Be brief.", "source": "set"}
    assert told["raw"] == {"value": "yes", "source": "set"}
    assert told["max_tokens"] == {"value": "50", "source": "flag --max-tokens"}
    assert told["seed"] == {"value": "", "source": "default"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("set max_tokens many", "expected a whole number"),
        ("set temperature -1", "expected 0 to 100"),
        ("set priority urgent", "interactive"),
        ("set raw maybe", "maybe"),
        ("set tokens 5", "there is no option 'tokens'; there is: "),
        ("set model", "what shall model be?"),
        ("unset tokens", "there is no option 'tokens'"),
    ],
)
def test_what_is_no_value_is_refused_at_once(line: str, said: str) -> None:
    done = shell("-c", line)

    assert done.exit_code == Exit.USAGE
    assert said in done.stderr


# --- scripts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "text", "code", "helped"),
    [
        ((), "help; help", Exit.OK, 2),
        ((), "status; help", Exit.NO_BROKER, 0),
        ((), "status\nhelp", Exit.NO_BROKER, 0),
        (("--keep-going",), "help; status; set nothing x\nhelp", Exit.NO_BROKER, 2),
        ((), "help\nexit\nhelp; status", Exit.OK, 1),
        (("--keep-going",), "set nothing x; quit; help", Exit.USAGE, 0),
        ((), "help; watch send hi", Exit.USAGE, 1),
        ((), "help; why is it so?", Exit.USAGE, 1),
        ((), "send --help", Exit.OK, 0),
        ((), "send -", Exit.USAGE, 0),
        ((), "", Exit.OK, 0),
    ],
)
def test_the_exit_code_is_that_of_the_first_failure(flags: tuple[str, ...], text: str, code: int, helped: int) -> None:
    done = shell(*flags, "-c", text)

    assert done.exit_code == code, done.stderr
    assert done.stdout.count("This list, or what one command does.") == helped


def test_a_sentence_that_begins_like_a_command_is_shown_the_way_to_the_model() -> None:
    assert "begin with `>`" in shell("-c", "why is the sky blue?").stderr
    assert "begin with `>`" not in shell("-c", "why 3f2a 4f2a").stderr


def test_with_json_an_error_is_an_object_too() -> None:
    told = json.loads(shell("--json", "-c", "status").stdout)

    assert (told["type"], told["code"], told["exit"]) == ("error", "no_broker", Exit.NO_BROKER)


# --- stdin ---------------------------------------------------------------------------------------------


async def read(*parts: bytes, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    reading, writing = os.pipe()
    with os.fdopen(reading) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        for part in parts:
            os.write(writing, part)
        os.close(writing)
        return [line async for line in stdin_lines()]


def test_lines_of_a_pipe_and_of_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert asyncio.run(read(b"a\nb", b"c\r\n\nd", monkeypatch=monkeypatch)) == ["a", "bc", "", "d"]

    async def read_file() -> list[str]:
        return [line async for line in stdin_lines()]

    (tmp_path / "script").write_text("status\nnodes\n")
    with (tmp_path / "script").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert asyncio.run(read_file()) == ["status", "nodes"]


def test_a_line_that_is_no_text_or_has_no_end_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(LlamboError, match="not UTF-8"):
        asyncio.run(read(b"\xff\n", monkeypatch=monkeypatch))

    (tmp_path / "long").write_bytes(b"a" * (LINE_BYTES + 1))

    async def read_file() -> list[str]:
        return [line async for line in stdin_lines()]

    with (tmp_path / "long").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        with pytest.raises(LlamboError, match="longer than"):
            asyncio.run(read_file())


# --- one loop, one connection ----------------------------------------------------------------------------


def outcome(session: Session, work: Coroutine[Any, Any, Any]) -> Any:
    try:
        return session.run(work)
    except KeyboardInterrupt:
        return "interrupted"


def test_an_interrupt_ends_what_a_command_waits_for_and_not_the_next_command() -> None:
    async def scenario() -> None:
        session = Session(Common())
        waits = asyncio.Event()

        async def forever() -> None:
            waits.set()
            await asyncio.Event().wait()

        async def seven() -> int:
            return 7

        session.begin()
        command = asyncio.create_task(asyncio.to_thread(outcome, session, forever()))
        await waits.wait()
        session.interrupt()
        assert await command == "interrupted"
        # It goes on asking after it was told to stop.
        assert await asyncio.to_thread(outcome, session, seven()) == "interrupted"
        session.begin()
        assert await asyncio.to_thread(outcome, session, seven()) == 7

    asyncio.run(scenario())


def test_a_command_that_only_runs_in_a_shell_needs_no_connection() -> None:
    async def scenario() -> None:
        session = Session(Common({"broker": NOBODY}))
        code = await Shell(Common({"broker": NOBODY}), session).lines(["set seed 3", "unset seed", "# nothing"])
        assert (code, session.client) == (Exit.OK, None)

    asyncio.run(scenario())


# --- history -------------------------------------------------------------------------------------------


def test_the_history_is_kept_where_nobody_else_can_read_it(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path / "state")}
    path = tmp_path / "state" / "llambo" / HISTORY_FILE

    history(environ).append_string("send a secret")

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(history(environ).load_history_strings()) == ["send a secret"]
    history({"HOME": str(tmp_path)})
    made = tmp_path / ".local" / "state" / "llambo"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert stat.S_IMODE((made / HISTORY_FILE).stat().st_mode) == 0o600


def test_no_history_is_no_reason_to_have_no_shell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        kept = history({"XDG_STATE_HOME": str(tmp_path / "file")})
        kept.append_string("status")
        assert list(kept.get_strings()) == ["status"]
        assert "no history is kept" in caplog.text

    full = history({"XDG_STATE_HOME": str(tmp_path)})
    (tmp_path / "llambo" / HISTORY_FILE).unlink()
    (tmp_path / "llambo" / HISTORY_FILE).mkdir()
    with caplog.at_level(logging.WARNING):
        full.append_string("status")
    assert caplog.text.count("no history is kept") == 2
