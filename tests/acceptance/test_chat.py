"""`llambo chat` at a terminal and in a pipe, against real brokers and workers."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llambo import SyncClient
from llambo.cli.chat.store import SavedChat, Store, Turn
from llambo.cli.kit.answer_views import FAKE
from llambo.cli.kit.failure import Exit
from llambo.testing.commands import BROKER, LLAMBO, WORKER, Commands, Done, command, environment, up
from llambo.testing.processes import TIMEOUT_S
from llambo.testing.terminal import ALT_ENTER, CTRL_C, CTRL_D, CTRL_R, ENTER, PASTE, TAB, Terminal

#: An answer of the fake engine that is longer than any test waits.
ENDLESS = ("--max-tokens", "20000")
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[0-9;]*)?m")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Commands]:
    with up("--workers", "2", "--fake-tokens-per-s", "100", "--fake-context-tokens", "30000") as (mesh, _):
        yield mesh


class Home:
    """A person's own folder, and the chats that are had there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.env: dict[str, str | None] = {"XDG_STATE_HOME": str(path), "NO_COLOR": None}

    def chat(self, mesh: Commands, *words: str, **env: str | None) -> Terminal:
        return Terminal("--broker", mesh.address, "chat", *words, env={**self.env, **env})

    def run(self, mesh: Commands, *words: str, stdin: str | None = None) -> Done:
        env = {**environment(), "XDG_STATE_HOME": str(self.path)}
        finished = subprocess.run(
            [sys.executable, "-m", LLAMBO, "--broker", mesh.address, "chat", *words],
            stdin=subprocess.DEVNULL if stdin is None else None, input=stdin,
            capture_output=True, text=True, env=env, cwd="/", timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        return Done(("chat", *words), finished)

    def session(self, name: str) -> dict[str, Any]:
        text = (self.path / "llambo" / "chats" / f"{name}.json").read_text(encoding="utf-8")
        return dict(json.loads(text))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def idle(mesh: Commands) -> bool:
    return bool(mesh.ok("requests", "--json").json() == [])


def truth(mesh: Commands, messages: list[tuple[str, str]], seed: int, tokens: int) -> str:
    """What the fake engine says to exactly these messages; to any others it says something else."""
    prompt = json.dumps([{"role": role, "content": content} for role, content in messages], ensure_ascii=False)
    with SyncClient(mesh.address) as client:
        return client.generate(prompt, form="messages", seed=seed, max_tokens=tokens).text


# --- a conversation ----------------------------------------------------------------------------------------


def test_every_command_of_a_conversation(mesh: Commands, home: Home) -> None:
    with home.chat(mesh, "--session", "mine", "--seed", "7", "--max-tokens", "6") as chat:
        chat.until("/help lists the commands")
        chat.ask("/help", "Alt-Enter begins a new line")
        chat.ask("first question", "tokens/s", after="first question")
        chat.ask("/history", "1  you: first question")
        chat.ask("second question", "tokens/s", after="second question")
        chat.ask("/history SECOND", "   2  you: second question")
        chat.ask("/history #1", "1  you: first question", after="/history #1")
        shown = chat.ask("/status", "policy", after="> /status")
        assert "mine" in shown and "2, 2 since the model began" in shown and "30000 tokens" in shown
        assert "2 ready of 2" in shown
        chat.ask("/model", "* fake")
        chat.ask("/model gpt-9", "no worker serves gpt-9; there is: fake")
        chat.ask("/model fake", "fake is asked from now on")
        chat.ask("/system Be brief.", "from now on", after="/system Be brief.")
        chat.ask("/retry", "tokens/s", after="> /retry")
        chat.ask("/clear", "the model begins anew")
        chat.ask("third question", "tokens/s", after="third question")
        chat.ask("/save travel", "saved as travel, in ")
        chat.ask("/session other", "other: 0 turns so far")
        chat.ask("/frobnicate", "there is no command /frobnicate")
        chat.ask("/session travel", "travel: 3 turns so far")
        chat.enter("/exit")
        assert chat.end() == Exit.OK, chat.story("/exit")
        assert "llambo chat --session travel" in chat.text

    saved = home.session("travel")
    assert (saved["model"], saved["system"], saved["context_from"]) == ("fake", "Be brief.", 2)
    one, two, three = saved["turns"]
    assert one["answer"] == truth(mesh, [("user", "first question")], 7, 6)
    system, earlier = ("system", "Be brief."), [("user", "first question"), ("assistant", one["answer"])]
    # Asked again, with the next seed and a system prompt.
    assert two["answer"] == truth(mesh, [system, *earlier, ("user", "second question")], 8, 6)
    assert three["answer"] == truth(mesh, [system, ("user", "third question")], 7, 6)
    assert [turn["ending"] for turn in saved["turns"]] == ["length"] * 3
    # `mine` was a name of choice, so it stays.
    assert len(home.session("mine")["turns"]) == 3


def test_ctrl_c_stops_the_answer_and_not_the_program(mesh: Commands, home: Home) -> None:
    with home.chat(mesh, "--session", "mine", *ENDLESS) as chat:
        chat.until("\n>")
        chat.ask("talk on", lambda text: len(text.split()) > 20, after="> talk on")
        chat.press(CTRL_C)
        stopped = chat.until("stopped", after="> talk on")
        assert "tokens/s" in stopped
        assert idle(mesh)
        chat.press("half a line")
        chat.until("half a line", after="stopped")
        chat.press(CTRL_C)
        chat.until("/exit or Ctrl-D leaves")
        chat.ask("/history", "(stopped)")
        chat.press(CTRL_D)
        assert chat.end() == Exit.OK, chat.story("Ctrl-D")

    (turn,) = home.session("mine")["turns"]
    assert turn["ending"] == "stopped"
    assert len(turn["answer"].split()) > 10
    assert " ".join(turn["answer"].split()[:8]) in " ".join(stopped.split())


def test_a_session_goes_on_where_it_was(mesh: Commands, home: Home) -> None:
    words = ("--session", "mine", "--max-tokens", "4")
    with home.chat(mesh, *words, "--seed", "1", "--system", "Be kind.") as chat:
        chat.until("\n>")
        chat.ask("first", "tokens/s")
        # No second process may write into it meanwhile.
        second = home.run(mesh, *words, "hello")
        assert second.code == Exit.USAGE, second.story
        assert "open in another `llambo chat`" in second.err
        chat.press(CTRL_D)
        assert chat.end() == Exit.OK

    with home.chat(mesh, *words, "--seed", "2") as chat:
        chat.until("1 turn so far, the last: first")
        chat.ask("second", "tokens/s", after="> second")
        chat.enter("/exit")
        chat.end()

    one, two = home.session("mine")["turns"]
    messages = [("system", "Be kind."), ("user", "first"), ("assistant", one["answer"]), ("user", "second")]
    assert two["answer"] == truth(mesh, messages, 2, 4)
    assert "first" in home.run(mesh, "--list").out
    assert home.run(mesh, "--search", "second", "--json").json()[0]["turn"] == 2
    folder = home.path / "llambo" / "chats"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "mine.json").stat().st_mode) == 0o600


def test_typing_several_lines_completion_and_lines_of_another_day(mesh: Commands, home: Home) -> None:
    words = ("--session", "mine", "--max-tokens", "2")
    with home.chat(mesh, *words) as chat:
        chat.until("\n>")
        chat.press(f"one{ALT_ENTER}two")
        chat.until(". two")
        chat.press(ENTER)
        chat.until("tokens/s", after="two")
        chat.press(PASTE.format("three\nfour\nfive"))
        chat.until(". five")
        chat.press(ENTER)
        chat.until("tokens/s", after="five")
        chat.press("/mod")
        chat.until("which models there are", after="tokens/s")
        chat.press(TAB)
        chat.until("> /model", after="tokens/s")
        chat.press(" f")
        chat.until("fake", after="> /model")
        chat.press(TAB)
        chat.until("> /model fake", after="tokens/s")
        chat.press(ENTER)
        chat.until("fake is asked from now on")
        chat.press(CTRL_D)
        chat.end()
    assert [turn["question"] for turn in home.session("mine")["turns"]] == ["one\ntwo", "three\nfour\nfive"]

    with home.chat(mesh, *words) as chat:
        chat.until("\n>", after="2 turns so far")
        chat.press(f"{CTRL_R}thre")
        chat.until(". five", after="2 turns so far")
        chat.press(ENTER)
        chat.until(lambda text: "I-search" not in text, after="2 turns so far")
        chat.press(ENTER)
        chat.until("tokens/s")
        chat.press(CTRL_D)
        chat.end()
    assert home.session("mine")["turns"][2]["question"] == "three\nfour\nfive"
    assert stat.S_IMODE((home.path / "llambo" / "chat_history").stat().st_mode) == 0o600


def test_what_is_typed_while_an_answer_comes_is_the_next_line(mesh: Commands, home: Home) -> None:
    with home.chat(mesh, "--session", "mine", "--max-tokens", "60") as chat:
        chat.until("\n>")
        chat.ask("first", lambda text: len(text.split()) > 5, after="> first")
        chat.ask("second", "tokens/s", after="> second")
        chat.press(CTRL_D)
        chat.end()

    assert [turn["question"] for turn in home.session("mine")["turns"]] == ["first", "second"]


def test_a_private_chat_leaves_nothing_behind(mesh: Commands, home: Home) -> None:
    with home.chat(mesh, "--private", "--max-tokens", "2") as chat:
        chat.until("\n>")
        chat.ask("a secret", "tokens/s")
        chat.press(CTRL_D)
        assert chat.end() == Exit.OK

    assert [path for path in home.path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("how", ["flag", "variable", "neither"])
def test_colours_can_be_switched_off(mesh: Commands, home: Home, how: str) -> None:
    words = ["--no-color"] if how == "flag" else []
    with home.chat(mesh, "--max-tokens", "3", *words, NO_COLOR="1" if how == "variable" else None) as chat:
        chat.until("\n>")
        chat.ask("/model gpt-9", "there is: fake")  # a warning is yellow
        chat.ask("hello", "tokens/s")
        chat.press(CTRL_D)
        chat.end()

    assert bool(COLOUR.search(chat.raw)) == (how == "neither"), repr(chat.raw)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_answer_that_is_ended_with_the_program_is_kept(mesh: Commands, home: Home, number: signal.Signals) -> None:
    with home.chat(mesh, "--session", "mine", *ENDLESS) as chat:
        chat.until("\n>")
        chat.ask("talk on", lambda text: len(text.split()) > 10, after="> talk on")
        chat.send(number)
        assert chat.end() == 128 + number, chat.story("the exit status")
    assert home.session("mine")["turns"][0]["ending"] == "stopped"

    with home.chat(mesh, "--session", "mine") as chat:
        chat.until("1 turn so far")
        chat.send(number)
        assert chat.end() == 128 + number, chat.story("the exit status, while nothing was asked")
    assert idle(mesh)


# --- what goes wrong on the way --------------------------------------------------------------------------------


def test_what_has_no_room_is_left_out_with_a_notice(home: Home) -> None:
    with up("--workers", "1", "--fake-context-tokens", "600", "--fake-tokens-per-s", "1000") as (mesh, _):
        # A byte is a token of the fake engine; each turn has about 150 of them, with what stands around.
        Store(home.path / "llambo" / "chats").save(
            SavedChat(
                "mine", turns=[Turn(f"question {number} {'x' * 40}", f"answer {'y' * 40}") for number in range(6)]
            )
        )
        with home.chat(mesh, "--session", "mine", "--max-tokens", "200", "--seed", "5") as chat:
            chat.until("6 turns so far")
            screen = chat.ask("and now?", "tokens/s", after="> and now?")
            chat.ask("y" * 700, "it was not sent")
            chat.press(CTRL_D)
            chat.end()

        turns = home.session("mine")["turns"]
        assert [turn["question"][:10] for turn in turns[:6]] == [f"question {number}" for number in range(6)]
        found = re.search(r"the first (\d) turns are left out of what the model sees", " ".join(screen.split()))
        assert found is not None, screen
        left = int(found[1])
        assert 0 < left < 6
        assert "600 tokens" in screen
        sent = [part for turn in turns[left:6] for part in (("user", turn["question"]), ("assistant", turn["answer"]))]
        assert turns[6]["answer"] == truth(mesh, [*sent, ("user", "and now?")], 5, 200)
        assert len(turns) == 7, "what was not sent is no turn"


def test_a_worker_that_dies_is_a_stall_and_nothing_more(home: Home) -> None:
    with up("--workers", "2", "--fake-tokens-per-s", "100") as (mesh, running), SyncClient(mesh.address) as client:
        with home.chat(mesh, "--session", "mine", "--seed", "3", "--max-tokens", "100") as chat:
            chat.until("\n>")
            chat.ask("hello", lambda text: len(text.split()) > 20, after="> hello")
            (request,) = client.requests()
            os.kill(int(running.line(rf"{request.worker} is ready, pid (\d+)")[1]), signal.SIGKILL)
            chat.until("moved 1 time")
            chat.press(CTRL_D)
            chat.end()

        (turn,) = home.session("mine")["turns"]
        assert turn["answer"] == truth(mesh, [("user", "hello")], 3, 100)


def test_a_broker_that_goes_away_is_shown_and_the_answer_goes_on(home: Home) -> None:
    with command(BROKER, "--port", "0") as broker:
        port = broker.line(r"listening at tcp://\S+:(\d+)")[1]
        mesh = Commands(f"tcp://127.0.0.1:{port}")
        with command(WORKER, "--broker", mesh.address, "--fake-tokens-per-s", "40") as worker:
            worker.line("is ready")
            # A client with two addresses tries the second as soon as the first is gone; no broker is at the second.
            both = Commands(f"{mesh.address},tcp://127.0.0.1:1")
            # The answer takes five seconds, so that it is not over before the broker is killed.
            with home.chat(both, "--session", "mine", "--seed", "3", "--max-tokens", "200") as chat:
                chat.until("\n>")
                chat.ask("hello", lambda text: len(text.split()) > 5, after="> hello")
                broker.send(signal.SIGKILL)
                broker.end()
                chat.until("lost the broker")
                with command(BROKER, "--port", port) as again:
                    again.line("listening")
                    screen = chat.until("tokens/s", after="> hello")
                    assert "lost the broker" not in screen, "the line is gone with its reason"
                    chat.until("\n>", after="tokens/s")
                    answer = home.session("mine")["turns"][0]["answer"]
                    assert answer == truth(mesh, [("user", "hello")], 3, 200)
                    again.send(signal.SIGKILL)
                    again.end()
                    chat.until("no broker answers")
                    chat.press(CTRL_D)
                    assert chat.end() == Exit.OK


def test_a_damaged_session_is_reported_and_left_alone(mesh: Commands, home: Home) -> None:
    folder = home.path / "llambo" / "chats"
    folder.mkdir(parents=True)
    (folder / "mine.json").write_text('{"turns": [{"ques')

    done = home.run(mesh, "--session", "mine", "hello")

    assert done.code == Exit.USAGE, done.story
    assert "mine.json cannot be read" in done.err
    assert (folder / "mine.json").read_text() == '{"turns": [{"ques'


def test_without_a_place_to_keep_it_an_answer_is_an_answer(mesh: Commands, home: Home) -> None:
    (home.path / "llambo").write_text("a file in the way")

    assert home.run(mesh, "--max-tokens", "3", "hello").code == Exit.OK
    refused = home.run(mesh, "--session", "mine", "--max-tokens", "3", "hello")
    assert refused.code == Exit.USAGE, refused.story
    assert "cannot be used" in refused.err


# --- a single answer -----------------------------------------------------------------------------------------


def test_a_question_from_arguments_a_pipe_or_both(mesh: Commands, home: Home) -> None:
    words = ("--seed", "7", "--max-tokens", "9")

    asked = home.run(mesh, *words, "What is AI?")
    assert (asked.code, asked.out) == (0, truth(mesh, [("user", "What is AI?")], 7, 9) + "\n"), asked.story
    assert "\x1b" not in asked.out
    assert home.run(mesh, *words, "What", "is", "AI?").out == asked.out
    assert home.run(mesh, *words, stdin="What is AI?\n").out == asked.out
    assert home.run(mesh, *words, "-", stdin="What is AI?\n").out == asked.out
    both = home.run(mesh, *words, "Explain:", stdin="a\nb\n")
    assert both.out == truth(mesh, [("user", "Explain:\n\na\nb")], 7, 9) + "\n"
    assert home.run(mesh, *words, "/help").out == truth(mesh, [("user", "/help")], 7, 9) + "\n"
    assert home.run(mesh, *words, "--system", "Be brief.", "x").out.strip() == truth(
        mesh, [("system", "Be brief."), ("user", "x")], 7, 9
    ).strip()  # fmt: skip
    assert not (home.path / "llambo").exists(), "a single answer is saved only with an option"


def test_a_single_answer_as_json_lines(mesh: Commands, home: Home) -> None:
    accepted, *tokens, end = home.run(mesh, "--json", "--seed", "7", "--max-tokens", "5", "hi").lines()

    assert (accepted["type"], end["type"], end["tokens"], end["reason"]) == ("accepted", "end", 5, "length")
    assert "".join(token["text"] for token in tokens) == truth(mesh, [("user", "hi")], 7, 5)


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["--model", "gpt-9", "hi"], Exit.REFUSED, "there is: fake"),
        (["--connect-ms", "200", "--broker", "tcp://127.0.0.1:1", "hi"], Exit.NO_BROKER, "no broker answers"),
        (["x" * 40_000], Exit.REFUSED, "it was not sent"),
        ([""], Exit.REFUSED, "the prompt is empty"),
    ],
)
def test_what_is_wrong_has_its_exit_code(mesh: Commands, home: Home, words: list[str], code: int, problem: str) -> None:
    done = home.run(mesh, *words)

    assert (done.code, done.out) == (code, ""), done.story
    assert problem in done.err


def test_an_interrupted_answer_is_cancelled_and_what_there_is_of_it_stays(mesh: Commands, home: Home) -> None:
    with home.chat(mesh, *ENDLESS, "hello") as chat:
        chat.until(lambda text: len(text.split()) > 10)
        chat.press(CTRL_C)
        assert chat.end() == Exit.INTERRUPTED, chat.story("the exit status")
        assert len(chat.text.split()) > 10

    assert idle(mesh)


def test_a_reader_that_leaves_ends_it_quietly(mesh: Commands, home: Home) -> None:
    command = [sys.executable, "-m", LLAMBO, "--broker", mesh.address, "chat", *ENDLESS, "hello"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as asking:
        assert asking.stdout is not None and asking.stderr is not None
        assert asking.stdout.read(10)
        asking.stdout.close()
        assert asking.wait(TIMEOUT_S) == Exit.OK
        assert asking.stderr.read().decode() == f"llambo: {FAKE}\n"

    assert idle(mesh)


# --- a real model --------------------------------------------------------------------------------------------


def test_smollm2_remembers_the_conversation_and_its_tokens_are_counted(home: Home) -> None:
    with up(
        "--workers", "1", "--engine", "llama", "--model", "smollm2", "--ctx", "256", "--slots", "2", "--threads", "1"
    ) as (mesh, _):
        with home.chat(mesh, "--session", "mine", "--temperature", "0", "--max-tokens", "24", "--seed", "1") as chat:
            chat.until("\n>")
            chat.ask("What is the capital of France? Answer in one word.", "Paris")
            chat.until("tokens/s")
            for number in range(1, 4):
                question = f"Question {number}: what is the capital {'of another country ' * 12}in Europe?"
                chat.ask(question, "tokens/s", after=f"Question {number}:")
            chat.ask("/status", "256 tokens, the last answer ended at")
            chat.press(CTRL_D)
            assert chat.end() == Exit.OK

        assert "left out of what the model sees (its context has 256 tokens)" in " ".join(chat.text.split())
        assert len(home.session("mine")["turns"]) == 4
