"""A chat with a scripted mesh: the history sent with a question, what is saved, commands and signals."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llambo.cli.chat.dialogue import LEAST_ANSWER, AskOptions, Dialogue, Messages, Signals, most_that_fit
from llambo.cli.chat.screen import Screen
from llambo.cli.chat.slash_commands import COMMANDS, enter
from llambo.cli.chat.store import SavedChat, Store, Turn
from llambo.mesh.client.answer_stream import Answer, Piece
from llambo.mesh.client.task_results import Tokenized
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.messages import Usage
from llambo.mesh.wire.reports import MeshStatus, ModelRow

AT = 1_700_000_000


@pytest.fixture(autouse=True)
def a_fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: float(AT))


def turns(count: int) -> list[Turn]:
    return [Turn(f"question {number}", f"answer {number}") for number in range(1, count + 1)]


def words(messages: Messages) -> int:
    return sum(len(content.split()) for _, content in messages)


# --- the scripted mesh -------------------------------------------------------------------------------------


@dataclass
class Script:
    """The script of the next answer."""

    text: str = "Yes."
    reason: Any = "stop"
    error: LlamboError | None = None
    #: It does not end by itself; perhaps not even when it is cancelled.
    waits: bool = False
    ends_when_cancelled: bool = True
    prompt_tokens: int = 0


@dataclass
class AskedFor:
    model: str | None
    messages: Messages
    max_tokens: int
    seed: int | None


class ScriptedStream:
    def __init__(self, script: Script, model: str, waits: asyncio.Event) -> None:
        self.id, self.ahead, self.model, self.fake = "ab" * 16, None, model, False
        self.answer: Answer | None = None
        self.cancels = 0
        self._script = script
        self._waits = waits
        self._pieces = [script.text] if script.text else []
        self._cancelled = asyncio.Event()

    async def next_piece(self) -> Piece | None:
        if self._pieces:
            text = self._pieces.pop()
            return Piece(text, list(range(len(text.split()))), 0)
        script = self._script
        if script.waits:
            self._waits.set()
            await self._cancelled.wait()
        if script.error is not None:
            raise script.error
        ids = list(range(len(script.text.split())))
        reason: Any = "cancelled" if self.cancels else script.reason
        self.answer = Answer(script.text, ids, reason, Usage(prompt_tokens=script.prompt_tokens), "w1", 0, self.id, 0)
        return None

    async def cancel(self) -> None:
        self.cancels += 1
        if self._script.ends_when_cancelled:
            self._cancelled.set()

    async def __aenter__(self) -> ScriptedStream:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass


@dataclass
class ScriptedMesh:
    """Counts a token for each word that is sent."""

    context: Any = 0
    script: Script = field(default_factory=Script)
    #: Raised by the next call that asks for the size of the context.
    down: LlamboError | None = None
    address: str = "tcp://mesh:7330"
    asked: list[AskedFor] = field(default_factory=list)
    counted: int = 0
    learned: list[str | None] = field(default_factory=list)
    hangs: bool = False
    #: Set when the script is at its end.
    waits: asyncio.Event = field(default_factory=asyncio.Event)
    stream_open: ScriptedStream | None = None

    async def models(self) -> list[ModelRow]:
        return [ModelRow(model="large"), ModelRow(model="tiny")]

    async def status(self) -> MeshStatus:
        return MeshStatus(broker="one", policy="fair")

    async def model_info(self, *, model: str | None) -> dict[str, Any]:
        if self.hangs:
            self.waits.set()
            await asyncio.Event().wait()
        if self.down is not None:
            raise self.down
        self.learned.append(model)
        return {"context_tokens": self.context}

    async def tokenize(self, prompt: str, *, form: str, model: str | None) -> Tokenized:
        self.counted += 1
        return Tokenized([0] * words(_messages(prompt)), [])

    def stream(
        self, prompt: str, *, form: str, model: str | None, max_tokens: int, seed: int | None, temperature: Any
    ) -> ScriptedStream:
        assert form == "messages"
        self.asked.append(AskedFor(model, _messages(prompt), max_tokens, seed))
        self.stream_open = ScriptedStream(self.script, model or "large", self.waits)
        return self.stream_open


def _messages(prompt: str) -> Messages:
    return tuple((each["role"], each["content"]) for each in json.loads(prompt))


class _Output:
    """Collects the output."""

    columns = 0  # it is no terminal

    def __init__(self) -> None:
        self.text = ""

    def put(self, text: str) -> None:
        self.text += text

    async def room(self) -> None:
        pass

    async def flush(self) -> None:
        pass


class _Notices(Screen):
    def __init__(self) -> None:
        super().__init__(_Output(), None, colours=False, notices_to_stderr=False)  # type: ignore[arg-type]
        self.lines: list[str] = []

    def print(self, text: str, tone: Any = "plain") -> None:
        self.lines.append(text)


class _Saves(Store):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.saved: list[SavedChat] = []

    def save(self, chat: SavedChat) -> Path:
        self.saved.append(chat)
        return super().save(chat)


class User:
    """Types into a chat."""

    def __init__(
        self, folder: Path | None, saved: SavedChat | None = None, context: Any = 0, **options: Any
    ) -> None:  # fmt: skip
        self.mesh, self.screen, self.signals = ScriptedMesh(context), _Notices(), Signals()
        self.store = _Saves(folder) if folder is not None else None
        self.chat = Dialogue(
            self.mesh,  # type: ignore[arg-type]
            saved or SavedChat("mine", created=AT), self.store, self.screen, self.signals, AskOptions(**options),
        )  # fmt: skip
        self.stays: bool | None = True
        self.error: LlamboError | None = None

    def types(self, text: str, answer: str = "Yes.", reason: str = "stop", **script: Any) -> User:
        self.mesh.script = Script(answer, reason, **script)
        asyncio.run(self._enter(text, None))
        return self

    def interrupts(self, typed: str, *numbers: int, **script: Any) -> User:
        """Types, and sends signals once the answer is being read."""
        self.mesh.script = Script(**{"waits": True, **script})
        asyncio.run(self._enter(typed, numbers))
        return self

    async def _enter(self, text: str, numbers: tuple[int, ...] | None) -> None:
        self.screen.lines.clear()
        self.mesh.counted, self.mesh.waits, self.error = 0, asyncio.Event(), None
        work = asyncio.create_task(self.signals.run(enter(self.chat, text)))
        if numbers is not None:
            waits = asyncio.create_task(self.mesh.waits.wait())
            await asyncio.wait((work, waits), return_when=asyncio.FIRST_COMPLETED)
            assert waits.done(), f"it ended before it was interrupted: {work}"
            for number in numbers:
                await asyncio.sleep(0)
                self.signals.receive(number)
        try:
            self.stays = await work
        except LlamboError as error:
            self.error = error

    @property
    def asked(self) -> AskedFor:
        return self.mesh.asked[-1]

    @property
    def notices(self) -> str:
        return "\n".join(self.screen.lines)

    @property
    def turns(self) -> list[Turn]:
        return self.chat.saved.turns

    @property
    def saved(self) -> SavedChat:
        assert self.store is not None
        last = self.store.saved[-1]
        assert self.store.load(last.name) == last
        return last


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "chats"


Chats = Callable[..., User]


@pytest.fixture
def begin(folder: Path) -> Chats:
    return lambda *arguments, **options: User(folder, *arguments, **options)


# --- asking ----------------------------------------------------------------------------------------------


def test_a_question_is_sent_with_the_earlier_turns_and_saved_with_its_answer(begin: Chats) -> None:
    user = begin(SavedChat("mine", system="Be brief."), max_tokens=99).types("Is it day?").types("And now?", "No.")
    assert user.asked.messages == (
        ("system", "Be brief."), ("user", "Is it day?"), ("assistant", "Yes."), ("user", "And now?")
    )  # fmt: skip
    assert user.asked.max_tokens == 99
    assert [(turn.question, turn.answer, turn.at) for turn in user.saved.turns] == [
        ("Is it day?", "Yes.", AT), ("And now?", "No.", AT)
    ]  # fmt: skip
    assert user.screen.out.text == "Yes.\nNo.\n"  # type: ignore[attr-defined]


def test_the_size_of_the_context_is_asked_for_once(begin: Chats) -> None:
    assert begin().types("one").types("two").mesh.learned == [None]


@pytest.mark.parametrize("size", [-1, "many", None])
def test_a_worker_that_reports_nonsense_as_its_context_is_an_error(begin: Chats, size: Any) -> None:
    user = begin(context=size).types("one")
    assert user.error is not None and user.error.code is Code.BAD_MESSAGE


@pytest.mark.parametrize("text", ["", "   ", "\n\n"])
def test_an_empty_line_does_nothing(begin: Chats, text: str) -> None:
    user = begin().types(text)
    assert (user.mesh.asked, user.screen.lines, user.turns) == ([], [], [])


def test_two_slashes_begin_a_message_with_one(begin: Chats) -> None:
    assert begin().types("//etc/hosts?").asked.messages == (("user", "/etc/hosts?"),)


def test_half_a_character_from_a_terminal_can_be_sent_all_the_same(begin: Chats) -> None:
    ((_, content),) = begin().types("a\udcffb").asked.messages
    assert content == "a?b"


# --- what there is room for --------------------------------------------------------------------------------


def test_the_last_fifty_turns_are_sent_along(begin: Chats) -> None:
    user = begin(SavedChat("mine", turns=turns(60))).types("next")
    assert len(user.asked.messages) == 2 * 50 + 1
    assert user.asked.messages[0] == ("user", "question 11")
    assert "the first 10 turns are left out" in user.notices
    assert "--turns 50" in user.notices
    assert "'question 11'" in user.notices


def test_a_full_context_loses_its_oldest_turns_and_says_so(begin: Chats) -> None:
    # 4 words a turn and 1 for the question; 30 of 60 remain if the answer has its half.
    user = begin(SavedChat("mine", turns=turns(40)), context=60, max_tokens=1000).types("next")
    assert words(user.asked.messages) == 29
    assert user.asked.messages[0] == ("user", "question 34")
    assert user.asked.max_tokens == 30
    assert "the first 33 turns are left out" in user.notices
    assert "its context has 60 tokens" in user.notices
    assert user.mesh.counted <= 7


def test_omitted_turns_are_reported_when_they_change_and_not_each_time(begin: Chats) -> None:
    user = begin(SavedChat("mine", turns=turns(40)), context=60, max_tokens=30)
    user.types("next", "", error=LlamboError(Code.NO_BROKER, "the broker is gone"))
    assert "left out" in user.notices
    # A turn without an answer is not sent, so the same turns are left out.
    assert user.types("next", "a b c").screen.lines == []
    assert "the first 34 turns" in user.types("next").notices


def test_a_long_question_takes_the_room_of_its_answer_and_a_longer_one_is_not_sent(begin: Chats) -> None:
    long = begin(context=100, max_tokens=50).types("word " * 80)
    assert long.asked.max_tokens == 20
    assert "20 tokens are left" in long.notices
    longer = begin(context=100, max_tokens=50).types("word " * (100 - LEAST_ANSWER + 1))
    assert longer.error is not None and longer.error.code is Code.TOO_LONG
    assert (longer.mesh.asked, longer.turns) == ([], [])


def test_what_is_surely_small_enough_is_not_counted(begin: Chats) -> None:
    assert begin(SavedChat("mine", turns=turns(3)), context=10_000).types("next").mesh.counted == 0


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 50])
@pytest.mark.parametrize("room", [1, 2, 4, 5, 9, 20, 100, 1000])
def test_as_many_turns_are_sent_as_fit_and_not_one_less(count: int, room: int) -> None:
    counted = []

    async def count_tokens(number: int) -> int:
        counted.append(number)
        return 12 * number + 3

    found, tokens = asyncio.run(most_that_fit(count, room, count_tokens))
    fit = [number for number in range(count + 1) if 12 * number + 3 <= room]
    assert found == (fit[-1] if fit else -1)
    assert tokens == 12 * max(found, 0) + 3
    assert len(counted) <= 2 + count.bit_length()


def test_turns_without_an_answer_are_saved_and_not_sent(begin: Chats) -> None:
    user = begin().interrupts("one", signal.SIGINT, text="").types("two")
    assert user.asked.messages == (("user", "two"),)
    assert [turn.mark for turn in user.turns] == ["stopped", ""]


# --- how an answer ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "mark", "notice"),
    [("length", "cut", "--max-tokens"), ("deadline", "out of time", "out of time"),
     ("cancelled", "cancelled", "another client")],
)  # fmt: skip
def test_an_answer_that_is_not_whole_is_marked(begin: Chats, reason: str, mark: str, notice: str) -> None:
    user = begin().types("one", "Half of", reason)
    assert notice in user.notices
    assert f"Half of ({mark})" in user.types("/history").notices
    assert user.types("two").asked.messages[1] == ("assistant", "Half of")


def test_a_failure_keeps_what_there_is_and_the_chat_goes_on(begin: Chats) -> None:
    failed = LlamboError(Code.ENGINE_FAILED, "the engine died")
    user = begin().types("one", "Half", error=failed)
    assert user.error is failed
    assert user.saved.turns[0].mark == "failed"
    assert user.types("two").asked.messages[1] == ("assistant", "Half")


def test_a_question_that_was_never_sent_leaves_no_turn(begin: Chats) -> None:
    user = begin()
    user.mesh.down = LlamboError(Code.NO_BROKER, "no broker answers")
    assert user.types("one").error is user.mesh.down
    user.mesh.hangs = True
    user.interrupts("two", signal.SIGINT)
    assert (user.stays, user.mesh.asked, user.turns) == (None, [], [])


# --- signals ---------------------------------------------------------------------------------------------


def test_ctrl_c_cancels_the_answer_and_keeps_what_there_is(begin: Chats) -> None:
    user = begin().interrupts("one", signal.SIGINT, text="Half of")
    assert user.mesh.stream_open is not None and user.mesh.stream_open.cancels == 1
    assert (user.stays, user.notices, user.signals.ended_by) == (True, "stopped", 0)
    assert [(turn.answer, turn.mark) for turn in user.saved.turns] == [("Half of", "stopped")]
    assert user.types("two").saved.turns[1].mark == ""


def test_a_second_ctrl_c_does_not_wait_for_the_end(begin: Chats) -> None:
    user = begin().interrupts("one", signal.SIGINT, signal.SIGINT, text="Half of", ends_when_cancelled=False)
    assert [(turn.answer, turn.mark) for turn in user.saved.turns] == [("Half of", "stopped")]


def test_an_end_that_does_not_come_is_not_waited_for(begin: Chats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llambo.cli.kit.follow.END_WAIT_S", 0.01)
    assert (
        begin().interrupts("one", signal.SIGINT, text="Half", ends_when_cancelled=False).saved.turns[0].mark
        == "stopped"
    )


def test_sigterm_keeps_the_answer_and_ends_the_chat(begin: Chats) -> None:
    user = begin().interrupts("one", signal.SIGTERM, text="Half of")
    assert user.signals.ended_by == signal.SIGTERM
    assert user.saved.turns[0].mark == "stopped"


# --- commands ------------------------------------------------------------------------------------------------


def test_help_names_every_command(begin: Chats) -> None:
    shown = begin().types("/help").notices
    assert all(f"/{command.name}" in shown and command.help in shown for command in COMMANDS)
    assert max(map(len, shown.splitlines())) <= 80


def test_an_unknown_command_is_reported_and_not_sent(begin: Chats) -> None:
    user = begin().types("/frobnicate now")
    assert "no command /frobnicate" in user.notices
    assert user.mesh.asked == []


def test_history_lists_finds_and_shows(begin: Chats, capsys: pytest.CaptureFixture[str]) -> None:
    user = begin(SavedChat("mine", turns=turns(12), context_from=10))
    assert user.types("/history").screen.lines[0].splitlines()[-5:] == [
        "      -- begun anew --",
        "  11  you: question 11", "      model: answer 11",
        "  12  you: question 12", "      model: answer 12",
    ]  # fmt: skip
    assert user.types("/history ION 7").screen.lines == ["   7  you: question 7"]
    assert "no turn contains 'x'" in user.types("/history x").notices
    assert user.types("/history #3").screen.lines == ["3  you: question 3"]
    assert capsys.readouterr().out == "answer 3\n"
    assert "no turn #13" in user.types("/history #13").notices
    assert begin().types("/history").notices == "nothing was asked yet"


def test_a_long_history_is_shown_from_its_end(begin: Chats) -> None:
    lines = begin(SavedChat("mine", turns=turns(60))).types("/history").screen.lines[0].splitlines()
    assert lines[0] == "      (10 turns before these; /history TEXT finds them)"
    assert lines[1] == "  11  you: question 11"
    assert lines[-1] == "      model: answer 60"


def test_clear_makes_the_model_forget_and_keeps_the_history(begin: Chats) -> None:
    user = begin().types("one").types("/clear")
    assert user.saved.context_from == 1
    assert user.types("two").asked.messages == (("user", "two"),)
    assert "one" in user.types("/history").notices


def test_status_has_the_chat_and_the_mesh(begin: Chats, capsys: pytest.CaptureFixture[str]) -> None:
    begin(context=1000).types("one", prompt_tokens=11).types("/status")
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["session"] == "mine"
    assert shown["context"] == "1000 tokens, the last answer ended at 12"
    assert shown["answers"] == "at most 500 tokens"
    assert shown["broker"] == "one at tcp://mesh:7330"


def test_model_lists_and_chooses(begin: Chats) -> None:
    user = begin(context=1000).types("one")
    assert user.types("/model").screen.lines == ["  large\n  tiny"]
    assert "no worker serves huge; there is: large, tiny" in user.types("/model huge").notices
    assert user.types("/model tiny").saved.model == "tiny"
    assert user.types("/model").screen.lines == ["  large\n* tiny"]
    assert user.types("two").asked.model == "tiny"
    assert user.mesh.learned == [None, "tiny"], "another model has another context"


def test_system_is_shown_set_and_removed(begin: Chats) -> None:
    user = begin().types("one")
    assert "no system message" in user.types("/system").notices
    assert user.types("/system Be brief.").saved.system == "Be brief."
    assert user.types("/system").notices == "Be brief."
    assert user.types("two").asked.messages[0] == ("system", "Be brief.")
    assert user.types("/system -").saved.system == ""
    assert "at most" in user.types(f"/system {'x' * 20_000}").notices


def test_save_gives_a_name(begin: Chats, folder: Path) -> None:
    user = begin().types("one").types("/save travel")
    assert user.chat.saved.name == "travel"
    assert user.notices == f"saved as travel, in {folder}/travel.json"
    assert user.types("two").saved.name == "travel"
    assert "not a valid name" in user.types("/save ../../etc/passwd").notices


def test_session_changes_to_another_chat(begin: Chats, folder: Path) -> None:
    Store(folder).save(SavedChat("other", turns=turns(2)))
    user = begin().types("one").types("/session other")
    assert user.chat.saved.name == "other"
    assert "other: 2 turns so far" in user.notices
    assert user.types("two").asked.messages[0] == ("user", "question 1")


def test_retry_asks_again_without_the_answer_and_replaces_it(begin: Chats) -> None:
    user = begin(seed=7).types("one").types("two", "Wrong.").types("/retry", "Right.")
    assert [content for _, content in user.asked.messages] == ["one", "Yes.", "two"]
    assert user.asked.seed == 8, "another try must not give the same again"
    assert [turn.answer for turn in user.turns] == ["Yes.", "Right."]
    assert user.types("/retry").asked.seed == 9
    assert user.types("three").asked.seed == 7
    assert user.types("/retry").asked.seed == 8


def test_a_retry_that_gives_nothing_keeps_the_earlier_answer(begin: Chats) -> None:
    user = begin().types("one", "Good.").interrupts("/retry", signal.SIGINT, text="")
    assert [turn.answer for turn in user.turns] == ["Good."]
    assert "the earlier answer stays" in user.notices


def test_there_is_nothing_to_retry_in_a_new_chat(begin: Chats) -> None:
    assert "nothing was asked yet" in begin().types("/retry").notices
    assert "nothing was asked yet" in begin(SavedChat("mine", turns=turns(2), context_from=2)).types("/retry").notices


@pytest.mark.parametrize("typed", ["/exit", "/quit", "/bye", "/EXIT"])
def test_exit_leaves(begin: Chats, typed: str) -> None:
    assert begin().types(typed).stays is False


def test_a_private_chat_saves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    user = User(None).types("one")
    for typed in ("/save travel", "/session travel"):
        assert "not saved" in user.types(typed).notices
    user.types("/status")
    assert "session   none: this chat is not saved" in capsys.readouterr().out
    assert user.chat.saved.name == "mine"
    assert list(tmp_path.iterdir()) == []
