"""The shell without a mesh: lines, completion, options, exit codes, signals, history."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llambo.cli import main
from llambo.cli.kit.common import Common
from llambo.cli.kit.failure import Exit
from llambo.cli.shell.language import (
    TABLE,
    WATCHED,
    BadLine,
    CommandCall,
    MeshNames,
    ModelPrompt,
    command_of,
    completions,
    options_of,
    parse,
    settable,
)
from llambo.cli.shell.shell import LINE_BYTES, Shell, ShellSession, stdin_lines
from llambo.cli.shell.shell_prompt import HISTORY_FILE, history, mesh_names
from llambo.mesh.wire.errors import LlamboError

pytestmark = pytest.mark.usefixtures("nothing_inherited")
#: Nothing listens there.
NOWHERE = "tcp://127.0.0.1:1"
WORKERS, MODELS, IDS = ("tiny-01", "tiny-02", "large"), ("smollm2", "tiny"), ("3f2a11", "9c0d22")


def shell(*words: str, stdin: str = "") -> Result:
    arguments = ("--broker", NOWHERE, "shell", "--connect-ms", "50", *words)
    return CliRunner().invoke(main.main, arguments, input=stdin, prog_name="llambo")


@pytest.fixture
def session() -> Iterator[ShellSession]:
    session = ShellSession(Common({"broker": NOWHERE}))
    yield session
    session.close()


# --- lines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("", []),
        ("  ; ;", []),
        ("# a remark; status", []),
        ("status", [CommandCall("status")]),
        ("status; nodes", [CommandCall("status"), CommandCall("nodes")]),
        ("status;nodes;", [CommandCall("status"), CommandCall("nodes")]),
        ("status; # and nothing else", [CommandCall("status")]),
        ("why  3f2a", [CommandCall("why", ("3f2a",), "3f2a")]),
        ('send "one; two" --seed 7', [CommandCall("send", ("one; two", "--seed", "7"), '"one; two" --seed 7')]),
        (r"send one\;two", [CommandCall("send", ("one;two",), r"one\;two")]),
        (r"send 'a\'; nodes", [CommandCall("send", ("a\\",), r"'a\'"), CommandCall("nodes")]),
        ('send "a\\"; b"', [CommandCall("send", ('a"; b',), '"a\\"; b"')]),
        ("llambo drain worker-1; nodes", [CommandCall("drain", ("worker-1",), "worker-1"), CommandCall("nodes")]),
        ("llambo is a mesh", [ModelPrompt("llambo is a mesh")]),
        ("cluster", [CommandCall("cluster")]),
        ("What is AI?; really?", [ModelPrompt("What is AI?; really?")]),
        ("status; don't panic; nodes", [CommandCall("status"), ModelPrompt("don't panic; nodes")]),
        ("> why is the sky blue?", [ModelPrompt("why is the sky blue?")]),
        ("nodes; >", [CommandCall("nodes"), ModelPrompt("")]),
        ("statusbar of what?", [ModelPrompt("statusbar of what?")]),
        ("hello", [ModelPrompt("hello")]),
    ],
)
def test_a_line_is_commands_and_at_its_end_maybe_a_prompt(line: str, meant: list[CommandCall | ModelPrompt]) -> None:
    assert parse(line, TABLE) == meant


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("status; send don't", "no closing quotation; begin a prompt to the model with `>`"),
        ("send a\\", "no escaped character"),
        ("statsu", "'statsu' is no command; 'status' is, and `> statsu` asks the model"),
        ("node", "'nodes' is"),
        ("llambo top", "leave it with `exit`"),
    ],
)
def test_a_bad_line_says_why(line: str, problem: str) -> None:
    with pytest.raises(BadLine) as caught:
        parse(line, TABLE)
    assert problem in str(caught.value)


def test_every_command_can_be_called_and_explains_itself() -> None:
    for name in TABLE:
        assert command_of(name).help
    assert set(WATCHED) < set(TABLE)
    listed = [name for name, command in TABLE.items() if command.about]
    assert set(TABLE) - set(listed) == {"cluster", "workers", "requests", "quit"}, (
        "other names of commands that are listed"
    )
    shown = shell("-c", "help").stdout
    assert all(f"\n{name} " in f"\n{shown}" for name in listed)
    assert max(map(len, shown.splitlines())) <= 80


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
    assert completions(line, MeshNames(WORKERS, MODELS, IDS)) == words


def test_without_a_broker_the_commands_are_completed_all_the_same(session: ShellSession) -> None:
    session.sent.extend(["3f2a11", "9c0d22"])
    assert completions("ev", mesh_names(session)) == ["events"]
    assert completions("why ", mesh_names(session)) == ["9c0d22", "3f2a11"]


# --- set -----------------------------------------------------------------------------------------------


def test_what_can_be_set_are_the_options_of_send() -> None:
    flags = {flag for option in options_of(command_of("send")) for flag in option.opts}
    assert {"model", "max_tokens", "temperature", "seed", "stop", "system", "deadline", "stats"} <= set(settable())
    assert {f"--{name.replace('_', '-')}" for name in settable()} - {"--stats"} <= flags


def test_set_shows_what_is_in_force_and_where_it_comes_from() -> None:
    lines = ["set model tiny", "set stop A B", "set system Be brief.", "set raw yes", "set max_tokens 7",
             "unset max_tokens"]  # fmt: skip
    shown = json.loads(shell("--max-tokens", "50", "-c", "; ".join([*lines, "set --json"])).stdout)
    assert shown["model"] == {"value": "tiny", "source": "set"}
    assert shown["stop"] == {"value": "A B", "source": "set"}
    assert shown["system"] == {"value": "Be brief.", "source": "set"}
    assert shown["raw"] == {"value": "yes", "source": "set"}
    assert shown["max_tokens"] == {"value": "50", "source": "flag --max-tokens"}
    assert shown["seed"] == {"value": "", "source": "default"}


@pytest.mark.parametrize(
    ("line", "problem"),
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
def test_what_is_no_value_is_refused_at_once(line: str, problem: str) -> None:
    done = shell("-c", line)
    assert done.exit_code == Exit.USAGE
    assert problem in done.stderr


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
    shown = json.loads(shell("--json", "-c", "status").stdout)
    assert (shown["type"], shown["code"], shown["exit"]) == ("error", "no_broker", Exit.NO_BROKER)


# --- stdin ---------------------------------------------------------------------------------------------


def lines_of(monkeypatch: pytest.MonkeyPatch, data: bytes) -> Iterator[str]:
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        yield from stdin_lines()


def test_lines_of_a_pipe_and_of_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert list(lines_of(monkeypatch, b"a\nbc\r\n\nd")) == ["a", "bc", "", "d"]
    (tmp_path / "script").write_text("status\nnodes\n")
    with (tmp_path / "script").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert list(stdin_lines()) == ["status", "nodes"]


def test_a_line_that_is_no_text_or_has_no_end_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(LlamboError, match="not UTF-8"):
        list(lines_of(monkeypatch, b"\xff\n"))
    for size, end in ((LINE_BYTES, b"\n"), (LINE_BYTES + 1, b"\n"), (LINE_BYTES + 1, b""), (LINE_BYTES * 2, b"")):
        (tmp_path / "long").write_bytes(b"a" * size + end)
        with (tmp_path / "long").open() as file:
            monkeypatch.setattr("sys.stdin", file)
            if size == LINE_BYTES:
                assert list(map(len, stdin_lines())) == [LINE_BYTES]
            else:
                with pytest.raises(LlamboError, match="longer than"):
                    list(stdin_lines())


# --- one loop, one connection ----------------------------------------------------------------------------


async def forever(started: threading.Event) -> None:
    started.set()
    await asyncio.Event().wait()


async def seven() -> int:
    return 7


def send_once(started: threading.Event, number: int) -> threading.Thread:
    """Sends a signal to this process once the command waits."""

    def send() -> None:
        assert started.wait(10)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_an_interrupt_ends_what_a_command_waits_for_and_not_the_next_command() -> None:
    shell, started = Shell(Common({"broker": NOWHERE})), threading.Event()
    with closing(shell.session), shell.signals():
        sender = send_once(started, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            shell.session.run(forever(started))
        sender.join()
        # A command that asks again after a Ctrl-C gets no answer.
        with pytest.raises(KeyboardInterrupt):
            shell.session.run(seven())
        shell.line("# the next one")
        assert shell.session.run(seven()) == 7


def test_sigterm_ends_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    shell, started = Shell(Common({"broker": NOWHERE}), keep_going=True), threading.Event()
    monkeypatch.setattr(shell, "_invoke", lambda name, words: shell.session.run(forever(started)))
    with closing(shell.session), shell.signals():
        sender = send_once(started, signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            shell.lines(["status; nodes", "queue"])
        sender.join()
        assert ended.value.code == 128 + signal.SIGTERM
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)  # while nothing runs
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_command_that_only_runs_in_a_shell_needs_no_connection() -> None:
    shell = Shell(Common({"broker": NOWHERE}))
    with closing(shell.session):
        shell.lines(["set seed 3", "unset seed", "# nothing"])
        assert (shell.failed, shell.session.client) == (Exit.OK, None)


# --- history -------------------------------------------------------------------------------------------


def test_the_history_is_kept_where_only_its_owner_can_read_it(tmp_path: Path) -> None:
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
        assert "no history is stored" in caplog.text
    full = history({"XDG_STATE_HOME": str(tmp_path)})
    (tmp_path / "llambo" / HISTORY_FILE).unlink()
    (tmp_path / "llambo" / HISTORY_FILE).mkdir()
    with caplog.at_level(logging.WARNING):
        full.append_string("status")
    assert caplog.text.count("no history is stored") == 2
