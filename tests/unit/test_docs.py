"""The documentation says what the code does, as far as a program can tell."""

from __future__ import annotations

import ast
import re
import shlex
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import msgpack
import pytest

from docs import generate, protocol_parts
from llambo.cli import docs as cli_docs
from llambo.cli.commands import status, workers
from llambo.cli.services import up
from llambo.mesh.link.sockets import DEFAULT_PORT, endpoint
from llambo.mesh.wire import codec
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.reports import MeshStatus
from tests.sim.mutants import GUARDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# --- generated parts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_generated_parts_are_current(name: str) -> None:
    assert generate.fill(text_of(name), ROOT / name) == text_of(name), "run `make docs`"


def test_every_part_that_can_be_generated_is_shown_somewhere() -> None:
    shown = {part for name in NAMES for part in re.findall(r"<!-- generated: ([\w-]+) -->", text_of(name))}
    assert shown >= {"broker-path", "rooms", "engine-states", *protocol_parts.GENERATORS}


@pytest.mark.parametrize("message", m.Message.__subclasses__())
def test_every_message_has_prose_and_fields(message: type[m.Message]) -> None:
    tag = protocol_parts.tag_of(message)
    section = re.search(
        rf"\n#### `{tag}`\n(.*?)<!-- generated: message-{tag} -->", text_of("docs/protocol-reference.md"), re.DOTALL
    )
    assert section is not None, f"docs/protocol-reference.md does not say what {tag} means"
    assert len(section[1].split()) > 2
    assert f"`{tag}" in text_of("docs/protocol-reference.md").split("## What if it is lost?")[1], (
        f"what if {tag} is lost?"
    )


def test_every_error_code_is_explained() -> None:
    rows = text_of("docs/protocol-reference.md").split("\n## Errors\n")[1].split("\n## ")[0]
    assert not [code.value for code in Code if f"`{code.value}`" not in rows]


def test_every_guard_of_the_simulator_is_explained_and_found_in_the_source() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", text_of("docs/simulation.md").split("## Teeth")[1], re.MULTILINE)
    assert rows == list(GUARDS)
    moved = [name for name, guard in GUARDS.items() if guard.path.read_text(encoding="utf-8").count(guard.with_it) != 1]
    assert moved == [], "their lines have changed: change tests/sim/mutants.py, too"


# --- references ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name} leads to {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{name} leads to {target}"


def anchors(text: str) -> set[str]:
    """The anchor of a heading on GitHub: lower case, no punctuation, hyphens."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_that_are_named_are_there(name: str) -> None:
    for file, function in re.findall(r"`([\w/]+\.py)(?::(\w+))?`", text_of(name)):
        if "/" not in file:
            continue
        # Documents name files of the package without the package: `broker/core.py`.
        here = file if (ROOT / file).exists() else f"llambo/{file}"
        assert (ROOT / here).exists(), f"{name} names {file}"
        defined = {
            node.name
            for node in ast.walk(ast.parse(text_of(here)))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        }
        assert not function or function in defined, f"{name} names {file}:{function}"


def commands_in(text: str) -> list[str]:
    """Lines of code that call one of our programs: indented ones, and in fenced blocks those behind a `$`."""
    found: list[str] = []
    fence = False
    for line in text.replace("\\\n", " ").splitlines():
        fence ^= line.startswith("```")
        shown = re.match(r"\$ " if fence else r" {4}(?=\S)", line)
        # An explanation follows behind some blanks.
        command = re.split(r" {3,}", line[shown.end() :])[0] if shown else ""
        if re.match(r"([A-Z_]+=\S+ |sudo |\(|.* && |.*\| )*llambo(-broker|-worker)? ([a-z-]+( |$)|-)", command):
            found.append(command)
    return found


@pytest.mark.parametrize("name", [name for name in NAMES if name != "docs/cli.md"])
def test_commands_that_are_shown_have_these_options(name: str) -> None:
    for line in commands_in(text_of(name)):
        for program, *rest in calls(line):
            parse(cli_docs.COMMANDS[program], program, rest, f"{name}: {line}")


def calls(line: str) -> Iterator[list[str]]:
    """Each call of one of our programs in a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    call: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;<>"):
            if call:
                yield call
            call = []
        elif call or word in cli_docs.COMMANDS:
            call.append(word)


def parse(command: click.Command, name: str, words: list[str], shown: str, parent: click.Context | None = None) -> None:
    """Fails for a command or an option that there is not; values are not looked at."""
    context = command.context_class(command, parent, info_name=name, **command.context_settings)
    try:
        _, rest, _ = command.make_parser(context).parse_args(list(words))
    except click.UsageError as error:
        pytest.fail(f"{shown}: {error.format_message()}")
    if isinstance(command, click.Group) and rest:
        found = command.get_command(context, rest[0])
        assert found is not None, f"{shown}: there is no {rest[0]}"
        parse(found, rest[0], rest[1:], shown, context)


def test_a_wrong_option_would_be_noticed() -> None:
    shown = commands_in("    sudo llambo keys add gpu --rôle worker\n    git diff | llambo chat --no 'x; y'   # it is")
    assert [list(calls(line)) for line in shown] == [
        [["llambo", "keys", "add", "gpu", "--rôle", "worker"]],
        [["llambo", "chat", "--no", "x; y"]],
    ]
    for line in shown:
        with pytest.raises(pytest.fail.Exception, match="No such option"):
            parse(cli_docs.COMMANDS["llambo"], "llambo", next(calls(line))[1:], line)


# --- the first hour --------------------------------------------------------------------------------------


def test_the_first_hour_shows_what_is_printed_today(capsys: pytest.CaptureFixture[str]) -> None:
    page = text_of("docs/first-hour.md")
    made = up.MeshCommands("", [], [("worker-1", [])], is_default=True)
    up.show_first_commands(endpoint("127.0.0.1", DEFAULT_PORT), made, "http://127.0.0.1:7340")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 8
    assert printed in page

    facts = page.split("$ llambo status\n")[1].partition("\n\n")[0].splitlines()
    shown = [name for name, _ in status.mesh_facts(MeshStatus(), "tcp://x")]
    assert [line.partition("  ")[0] for line in facts] == shown
    for head in re.findall(r"\$ llambo workers\n(.*)", page):
        assert [column.lower() for column in head.split()] == list(workers.COLUMNS)


# --- the conversation in bytes ---------------------------------------------------------------------------


def conversation() -> list[list[bytes]]:
    """The frames of the page, read back from their hex."""
    part = re.search(
        r"<!-- generated: example -->\n```text\n(.*?)```", text_of("docs/protocol-reference.md"), re.DOTALL
    )
    assert part is not None
    blocks = []
    for paragraph in part[1].strip().split("\n\n"):
        joined = re.sub(r"\n      (?=[0-9a-f])", " ", paragraph)  # lines of hex that go on
        blocks.append([bytes.fromhex(line) for line in re.findall(r"^    - ([0-9a-f ]+)$", joined, re.MULTILINE)])
    return blocks


def body(frames: list[bytes]) -> list[dict[str, Any]]:
    assert frames[0][:4] == b"llb\x01"
    decoded: list[dict[str, Any]] = msgpack.unpackb(frames[1], strict_map_key=False)
    return decoded


def test_the_conversation_can_be_read_by_hand() -> None:
    hello, welcome, beat, submit, accepted, chunk, end, replay, page, ack = conversation()
    assert body(hello) == [{"type": "client_hello"}]
    assert hello[0][4:] == welcome[0][4:] == bytes(8)

    session, topic = body(welcome)[0]["session"], body(welcome)[0]["topic"]
    assert beat == [topic + b"B" + struct.pack(">Q", 1) + session]
    assert [message["type"] for message in body(submit)] == ["client_heartbeat", "inference_request"]
    assert submit[2] == b"What is AI?"
    id = body(submit)[1]["id"]
    assert submit[0][4:] == session and body(accepted)[0]["id"] == id

    tokens = {**read_chunk(chunk[0].removeprefix(topic), id), **read_chunk(body(page)[0]["chunks"][0], id)}
    assert [tokens[index] for index in range(body(end)[0]["count"])] == [(77, b"A"), (1234, b" mesh")]
    assert (body(replay)[0]["first"], body(replay)[0]["until"]) == (0, 1)
    assert body(ack) == [{"type": "end_ack", "ids": [id]}]


def read_chunk(frame: bytes, id: bytes) -> dict[int, tuple[int, bytes]]:
    """As docs/protocol.md lays it out."""
    assert frame[:1] == b"T" and frame[1:17] == id
    first, count, _flags = struct.unpack_from(">IHB", frame, 25)
    ids, pieces = msgpack.unpackb(frame[32:])
    assert len(ids) == len(pieces) == count
    return {first + at: pair for at, pair in enumerate(zip(ids, pieces, strict=True))}


def test_the_conversation_is_understood_by_the_mesh() -> None:
    for frames, (title, _) in zip(conversation(), protocol_parts.EXAMPLE, strict=True):
        if "token plane" in title:
            continue
        decoder = codec.from_client if "client" in title else codec.to_client
        bundle = decoder.decode(frames)
        assert bundle.messages and not bundle.problems, title


# --- promises ------------------------------------------------------------------------------------------


def test_every_promise_names_a_test_that_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text_of("docs/guarantees.md")))
    assert len(named) > 30
    missing = [f"{file}::{test}" for file, test in named if not re.search(rf"def {test}\(", text_of(file))]
    assert missing == []


def test_every_section_of_the_promises_names_a_test() -> None:
    _, *sections = text_of("docs/guarantees.md").split("\n## ")
    assert not [section.splitlines()[0] for section in sections if "tests/" not in section]
