"""Tool calls in the text of an answer, cut at any place."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llambo.mesh.wire.tool_calls import CallArguments, CallBegun, CallEnded, Content, Delta, ToolCalls, call_id
from tests.unit.gateway_bench import collect

#: No deadline: the speed of this machine is not under test.
UNHURRIED = settings(suppress_health_check=[HealthCheck.too_slow])
SEED = "00" * 16
ID = call_id(SEED, 0)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def parse(*texts: str) -> list[Delta]:
    """Adjacent deltas of one kind are joined."""
    parser = ToolCalls(SEED)
    joined: list[Delta] = []
    for delta in [delta for text in texts for delta in parser.feed(text)] + parser.finish():
        match joined[-1:], delta:
            case [Content(before)], Content(text):
                joined[-1] = Content(before + text)
            case [CallArguments(index, before)], CallArguments(same, text) if index == same:
                joined[-1] = CallArguments(index, before + text)
            case _:
                joined.append(delta)
    return joined


def test_text_is_text() -> None:
    assert parse("It is ", "warm", ".") == [Content("It is warm.")]
    assert parse(" \n") == [Content(" \n")]
    assert parse("") == []


def test_a_call_between_text() -> None:
    assert parse(f"\nI look.\n{CALL}\n") == [
        Content("\nI look.\n"), CallBegun(0, ID, "weather"), CallArguments(0, '{"city": "Oslo"}'), CallEnded(0),
    ]  # fmt: skip


def test_several_calls_and_no_blanks_between_them() -> None:
    deltas = parse(f"\n{CALL}\n{CALL}\n  and more")
    assert [type(delta).__name__ for delta in deltas] == ["CallBegun", "CallArguments", "CallEnded"] * 2 + ["Content"]
    assert deltas[-1] == Content("\n  and more")
    ids = [delta.id for delta in deltas if isinstance(delta, CallBegun)]
    assert ids == [call_id(SEED, 0), call_id(SEED, 1)]
    assert len(set(ids)) == 2


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCalls(SEED)
    assert parser.feed('<tool_call>{"name":"f","arguments":') == []
    assert parser.feed('{"a"') == [CallBegun(0, ID, "f"), CallArguments(0, '{"a"')]
    assert parser.feed(': "}\\"') == [CallArguments(0, ': "}\\"')]
    assert parser.feed(' {" , "b": [{}') == [CallArguments(0, ' {" , "b": [{}')]
    assert parser.feed("]}}</tool") == [CallArguments(0, "]}"), CallEnded(0)]
    assert parser.feed("_call>") == []
    assert parser.finish() == []


def test_half_a_tag_is_never_shown_as_content() -> None:
    parser = ToolCalls(SEED)
    assert parser.feed("a <tool") == [Content("a ")]
    assert parser.feed("_call") == []
    assert parser.feed("s>") == [Content("<tool_calls>")]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_cal",
        "<tool_call>\nHello",
        '<tool_call>{"arguments": {}, "name": "f"}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "a b", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
        "<tool_call>" + " " * 2_000 + '{"name": "f", "arguments": {}}</tool_call>',
        " <tool_call> <tool_call> x",
        "</tool_call>",
    ],
)
def test_what_is_no_call_is_content_and_nothing_is_lost(text: str) -> None:
    assert parse(text) == parse(*text) == [Content(text)]


def test_a_call_after_what_was_none() -> None:
    content, calls = collect("<tool_call>" + CALL, SEED)
    assert (content, [call.name for call in calls]) == ("<tool_call>", ["weather"])


def test_a_frame_that_is_not_closed() -> None:
    content, calls = collect('<tool_call>{"name": "f", "arguments": {}, "x": 1}</tool_call>', SEED)
    assert (content, [(call.name, call.arguments) for call in calls]) == (', "x": 1}</tool_call>', [("f", "{}")])


def test_an_answer_that_ends_in_the_middle() -> None:
    at = CALL.index("Os") + 2
    begun = CallBegun(0, ID, "weather")
    assert parse(CALL[:at]) == [begun, CallArguments(0, '{"city": "Os'), CallEnded(0, whole=False)]
    # ... behind the arguments: the call is whole, and the rest of its frame is dropped
    whole = [begun, CallArguments(0, '{"city": "Oslo"}'), CallEnded(0)]
    assert all(parse(CALL[:end]) == whole for end in range(CALL.index("}") + 1, len(CALL) + 1))


@pytest.mark.parametrize("before", ["", "I look.", CALL])
@pytest.mark.parametrize("cut", ["<tool_call>", '<tool_call>\n{"name": "f', '<tool_call>\n{"name": "f", "argum'])
def test_a_call_that_is_cut_before_its_arguments_is_left_out(before: str, cut: str) -> None:
    assert parse(before + cut) == parse(before)


def test_half_a_tag_at_the_end_is_text_unless_only_a_call_could_follow() -> None:
    assert parse("a <tool_c") == [Content("a <tool_c")]
    assert parse(CALL + "\n<tool_c") == parse(CALL)


def test_ids_depend_on_the_answer_and_the_number_alone() -> None:
    assert re.fullmatch(r"call_[0-9a-f]{24}", ID)
    assert collect(CALL, SEED, prefix="toolu_")[1][0].id == "toolu_" + ID.removeprefix("call_")
    assert collect(CALL, "another")[1][0].id != ID


PARTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<tool_", '{"name": "f", "arguments": ', "{", "}", '"', "\\", " ", "\n", "x", "[",
     "]", '{"a": "\\"}"}', CALL, "é", ","]
)  # fmt: skip


@UNHURRIED
@given(st.lists(PARTS, max_size=12), st.data())
def test_however_the_text_is_cut_it_says_the_same(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(*pieces) == parse(*text) == parse(text)


@UNHURRIED
@given(st.dictionaries(st.text(max_size=8), st.recursive(st.text() | st.integers() | st.booleans(),
                                                         lambda inner: st.lists(inner, max_size=3), max_leaves=5),
                       max_size=4), st.sampled_from([None, 2]))  # fmt: skip
def test_any_arguments_come_back_as_they_were_written(arguments: dict[str, object], indent: int | None) -> None:
    text = json.dumps(arguments, indent=indent, ensure_ascii=False)
    content, (call,) = collect(f'<tool_call> {{"name": "f", "arguments": {text} }} </tool_call>', SEED)
    assert (content, call.arguments) == ("", text)
