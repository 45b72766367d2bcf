"""A chat without a mesh or a terminal: what its core orders, what goes along with a question, what a search finds."""

from __future__ import annotations

from typing import Any

import pytest

from llambo.cli.chat import chat_events as e
from llambo.cli.chat.chat_commands import COMMANDS
from llambo.cli.chat.chat_core import LEAST_ANSWER, ChatCore
from llambo.cli.chat.chat_fitting import Fitting
from llambo.cli.chat.chat_session import Session, Turn, is_name, matches

AT = 1_700_000_000


def turns(count: int) -> list[Turn]:
    return [Turn(f"question {number}", f"answer {number}") for number in range(1, count + 1)]


class Person:
    """Types into a chat, and plays the mesh to it: a token is a word of what is sent."""

    def __init__(self, session: Session | None = None, context: int = 0, **settings: Any) -> None:
        self.core = ChatCore(session or Session("mine", created=AT), **settings)
        self.context = context
        self.counted = 0
        self.said: list[str] = []
        self.orders: list[e.Order] = []

    def types(self, text: str) -> Person:
        self.said, self.orders, self.counted = [], [], 0
        return self.told(e.Entered(text, AT))

    def told(self, event: e.Event) -> Person:
        facts = [event]
        while facts:
            for order in self.core.handle(facts.pop(0)):
                self.orders.append(order)
                match order:
                    case e.Say(text):
                        self.said.append(text)
                    case e.Learn():
                        facts.append(e.Learned(self.context))
                    case e.Count(messages=messages):
                        self.counted += 1
                        facts.append(e.Counted(words(messages)))
                    case e.KeepAs(session, name):
                        facts.append(e.Kept(Session(name, turns=session.turns), f"/there/{name}.json"))
                    case e.FindModels(wanted):
                        facts.append(e.ModelsFound(("large", "tiny"), wanted))
                    case e.Open(name):
                        facts.append(e.Opened(Session(name, turns=turns(2))))
        return self

    def answered(self, text: str = "Yes.", ending: Any = "stop", **more: Any) -> Person:
        return self.told(e.Answered(text, ending, tokens=len(text.split()), **more))

    def asks(self, question: str, answer: str = "Yes.") -> Person:
        return self.types(question).answered(answer)

    def ask(self) -> e.Ask:
        (found,) = [order for order in self.orders if isinstance(order, e.Ask)]
        return found

    @property
    def asked(self) -> bool:
        return any(isinstance(order, e.Ask) for order in self.orders)

    @property
    def kept(self) -> list[Session]:
        return [order.session for order in self.orders if isinstance(order, e.Keep)]

    @property
    def heard(self) -> str:
        return "\n".join(self.said)


def words(messages: e.Messages) -> int:
    return sum(len(content.split()) for _, content in messages)


# --- asking ----------------------------------------------------------------------------------------------


def test_a_question_goes_with_what_was_said_before_and_is_kept_with_its_answer() -> None:
    person = Person(Session("mine", system="Be brief."), max_tokens=99).asks("Is it day?").asks("And now?", "No.")

    assert person.ask().messages == (
        ("system", "Be brief."), ("user", "Is it day?"), ("assistant", "Yes."), ("user", "And now?")
    )  # fmt: skip
    assert person.ask().max_tokens == 99
    assert [(turn.question, turn.answer, turn.at) for turn in person.kept[-1].turns] == [
        ("Is it day?", "Yes.", AT), ("And now?", "No.", AT)
    ]  # fmt: skip


def test_what_the_model_has_room_for_is_asked_once() -> None:
    person = Person().types("one")
    assert any(isinstance(order, e.Learn) for order in person.orders)

    person.answered().types("two")

    assert not any(isinstance(order, e.Learn) for order in person.orders)


@pytest.mark.parametrize("text", ["", "   ", "\n\n"])
def test_nothing_is_nothing(text: str) -> None:
    assert Person().types(text).orders == []


def test_two_slashes_begin_a_message_with_one() -> None:
    assert Person().types("//etc/hosts?").ask().messages == (("user", "/etc/hosts?"),)


def test_half_a_character_from_a_terminal_can_be_sent_all_the_same() -> None:
    ((_, content),) = Person().types("a\udcffb").ask().messages

    assert content.encode() == b"a?b"


# --- what there is room for --------------------------------------------------------------------------------


def test_the_last_fifty_turns_go_along() -> None:
    person = Person(Session("mine", turns=turns(60))).types("next")

    assert len(person.ask().messages) == 2 * 50 + 1
    assert person.ask().messages[0] == ("user", "question 11")
    assert "the first 10 turns are left out" in person.heard
    assert "--turns 50" in person.heard
    assert "'question 11'" in person.heard


def test_a_full_context_loses_its_oldest_turns_and_says_so() -> None:
    # 4 words a turn and 1 for the question; 30 remain of 60 when the answer has its half.
    person = Person(Session("mine", turns=turns(40)), context=60, max_tokens=1000).types("next")

    ask = person.ask()
    assert words(ask.messages) == 29
    assert ask.messages[0] == ("user", "question 34")
    assert ask.max_tokens == 30
    assert "the first 33 turns are left out" in person.heard
    assert "its context has 60 tokens" in person.heard
    assert person.counted <= 7


def test_what_is_left_out_is_told_when_it_changes_and_not_each_time() -> None:
    person = Person(Session("mine", turns=turns(40)), context=60, max_tokens=30).types("next")
    assert person.said

    person.told(e.Failed("the broker is gone"))  # no turn was added
    assert person.types("next").said == []
    assert "the first 34 turns" in person.answered("a b c").types("next").heard


def test_a_long_question_takes_the_room_of_its_answer_and_a_longer_one_is_not_sent() -> None:
    long = Person(context=100, max_tokens=50).types("word " * 80)
    assert long.ask().max_tokens == 20
    assert "20 tokens are left" in long.heard

    longer = Person(context=100, max_tokens=50).types("word " * (100 - LEAST_ANSWER + 1))
    assert not longer.asked
    assert [order for order in longer.orders if isinstance(order, e.Refuse)]
    assert longer.core.session.turns == []


def test_what_is_surely_small_enough_is_not_counted() -> None:
    assert Person(Session("mine", turns=turns(3)), context=10_000).types("next").counted == 0


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 50])
@pytest.mark.parametrize("room", [1, 2, 4, 5, 9, 20, 100, 1000])
def test_as_many_turns_go_along_as_fit_and_not_one_less(count: int, room: int) -> None:
    fitting = Fitting("", [Turn("x " * 7, "y " * 5)] * count, "z", room)
    counted = 0
    while (messages := fitting.question()) is not None:
        counted += 1
        fitting.told(words(messages))

    fit = [number for number in range(count + 1) if 12 * number + 1 <= room]
    assert fitting.kept == (fit[-1] if fit else -1)
    assert counted <= 2 + count.bit_length()


def test_turns_without_an_answer_are_kept_and_not_sent() -> None:
    person = Person().types("one").answered("", "stopped").asks("two")

    assert person.ask().messages == (("user", "two"),)
    assert [turn.mark for turn in person.core.session.turns] == ["stopped", ""]


# --- how an answer ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "mark", "said"),
    [("length", "cut", "--max-tokens"), ("stopped", "stopped", "stopped"), ("cancelled", "cancelled", "somebody")],
)
def test_an_answer_that_is_not_whole_is_marked(ending: Any, mark: str, said: str) -> None:
    person = Person().types("one").answered("Half of", ending)

    assert said in person.heard
    assert f"Half of ({mark})" in person.types("/history").heard
    assert person.types("two").ask().messages[1] == ("assistant", "Half of")


def test_a_failure_keeps_what_there_is_and_the_chat_goes_on() -> None:
    person = Person().types("one").answered("Half", "failed", problem="the engine died", hint="look at its log")
    assert "the engine died\n  look at its log" in person.heard
    assert person.core.session.turns[0].mark == "failed"

    assert person.types("two").asked


def test_a_question_that_was_never_sent_leaves_no_turn() -> None:
    person = Person().types("one").told(e.Failed("no broker answers", "start one"))
    assert person.heard == "no broker answers\n  start one"

    person.types("two").told(e.Interrupted())
    assert person.core.session.turns == []
    # A fact that comes too late finds nobody.
    assert person.core.handle(e.Counted(5)) == []
    assert person.core.handle(e.Answered("late", "stop")) == []


# --- commands ------------------------------------------------------------------------------------------------


def test_help_tells_of_every_command() -> None:
    heard = Person().types("/help").heard

    assert all(f"/{command.name}" in heard and command.help in heard for command in COMMANDS)
    assert max(map(len, heard.splitlines())) <= 80


def test_an_unknown_command_is_said_and_not_sent() -> None:
    person = Person().types("/frobnicate now")

    assert "no command /frobnicate" in person.heard
    assert not person.asked


def test_history_lists_finds_and_shows() -> None:
    person = Person(Session("mine", turns=turns(12), context_from=10))

    assert person.types("/history").said[0].splitlines()[-5:] == [
        "      -- begun anew --",
        "  11  you: question 11", "      model: answer 11",
        "  12  you: question 12", "      model: answer 12",
    ]  # fmt: skip
    assert person.types("/history ION 7").said == ["   7  you: question 7"]
    assert "nothing here has 'x'" in person.types("/history x").heard
    assert person.types("/history #3").orders == [e.ShowTurn(3, turns(3)[2])]
    assert "no turn #13" in person.types("/history #13").heard
    assert Person().types("/history").heard == "nothing was said yet"


def test_a_long_history_is_shown_from_its_end() -> None:
    lines = Person(Session("mine", turns=turns(60))).types("/history").said[0].splitlines()

    assert lines[0] == "      (10 turns before these; /history TEXT finds them)"
    assert lines[1] == "  11  you: question 11"
    assert lines[-1] == "      model: answer 60"


def test_clear_lets_the_model_forget_and_the_history_remember() -> None:
    person = Person().asks("one").types("/clear")
    assert person.kept[-1].context_from == 1

    assert person.types("two").ask().messages == (("user", "two"),)
    assert "one" in person.types("/history").heard


def test_status_has_the_chat_and_asks_for_the_mesh() -> None:
    person = Person(context=1000).types("one").answered(prompt_tokens=11)
    (status,) = person.types("/status").orders

    assert isinstance(status, e.ShowStatus)
    told = dict(status.facts)
    assert told["session"] == "mine"
    assert told["context"] == "1000 tokens, the last answer ended at 12"
    assert told["answers"] == "at most 500 tokens"


def test_model_lists_and_chooses() -> None:
    person = Person(context=1000).asks("one")
    assert person.types("/model").said == ["  large\n  tiny"]
    assert "no worker serves huge; there is: large, tiny" in person.types("/model huge").heard

    person.types("/model tiny")
    assert person.kept[-1].model == "tiny"
    assert person.types("/model").said == ["  large\n* tiny"]
    assert person.types("two").ask().model == "tiny"
    assert e.Learn("tiny") in person.orders, "another model has another context"


def test_system_is_shown_set_and_taken_back() -> None:
    person = Person().asks("one")
    assert "not told" in person.types("/system").heard

    assert person.types("/system Be brief.").kept[-1].system == "Be brief."
    assert person.types("/system").heard == "Be brief."
    assert person.types("two").ask().messages[0] == ("system", "Be brief.")
    assert person.answered().types("/system -").kept[-1].system == ""


def test_save_gives_a_name() -> None:
    person = Person().asks("one").types("/save travel")
    assert person.core.session.name == "travel"
    assert person.heard == "kept as travel, in /there/travel.json"
    assert person.types("two").answered().kept[-1].name == "travel"
    assert "no name" in person.types("/save ../../etc/passwd").heard


def test_session_changes_to_another_chat() -> None:
    person = Person().asks("one").types("/session other")

    assert person.core.session.name == "other"
    assert "other: 2 turns so far" in person.heard
    assert person.types("two").ask().messages[0] == ("user", "question 1")


def test_retry_asks_again_without_the_answer_and_replaces_it() -> None:
    person = Person().asks("one").asks("two", "Wrong.").types("/retry")
    assert [content for _, content in person.ask().messages] == ["one", "Yes.", "two"]
    assert person.ask().tries == 1

    person.answered("Right.")
    assert [turn.answer for turn in person.core.session.turns] == ["Yes.", "Right."]
    assert person.types("/retry").ask().tries == 2
    assert person.answered().asks("three").types("/retry").ask().tries == 1


def test_a_retry_that_gives_nothing_keeps_the_answer_there_was() -> None:
    person = Person().asks("one", "Good.").types("/retry").answered("", "stopped")

    assert [turn.answer for turn in person.core.session.turns] == ["Good."]
    assert "the earlier answer stays" in person.heard


def test_there_is_nothing_to_retry_in_a_new_chat() -> None:
    assert "nothing was asked yet" in Person().types("/retry").heard
    assert "nothing was asked yet" in Person(Session("mine", turns=turns(2), context_from=2)).types("/retry").heard


@pytest.mark.parametrize("typed", ["/exit", "/quit", "/EXIT"])
def test_exit_leaves(typed: str) -> None:
    assert Person().types(typed).orders == [e.Leave()]


def test_a_private_chat_keeps_nothing() -> None:
    person = Person(keeps=False).asks("one")
    assert person.kept == []

    for typed in ("/save travel", "/session travel"):
        person.types(typed)
        assert [type(order) for order in person.orders] == [e.Say]
    assert "not kept" in dict(person.types("/status").orders[0].facts)["session"]  # type: ignore[union-attr]


# --- names and searching ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "travel", "2026-11-21-2125", "a.b", "x" * 64])
def test_a_name(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-f", "a/b", "a b", "a\n", "é", "x" * 65, "a\0"])
def test_no_name(name: str) -> None:
    assert not is_name(name)


def test_a_search_shows_what_stands_around() -> None:
    found = list(matches([Turn("a" * 50 + " The Night Train " + "b" * 50, "night"), Turn("[x]", "")], "night"))

    assert [number for number, _ in found] == [1, 1]
    assert found[0][1].startswith("you: …aa")
    assert "The Night Train" in found[0][1]
    assert found[1][1] == "model: night"
    assert [number for number, _ in matches([Turn("[x]", "")], "[x")] == [1]
