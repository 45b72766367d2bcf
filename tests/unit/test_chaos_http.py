"""What chaos finds in streams over HTTP: each finding is made from events that have it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chaos.http_check import judge
from tests.chaos.http_load import Asked

RIGHT = "abcdef"


def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


def failed(*, retryable: bool) -> dict[str, Any]:
    return {"error": {"code": "cancelled", "retryable": retryable}}


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        ([chunk("abc"), chunk("def"), chunk("", "length"), "[DONE]"], "whole"),
        ([chunk("abc"), chunk("", "length"), "[DONE]"], "cut short"),
        ([chunk("abc"), chunk("def"), "[DONE]"], "cut short"),
        ([chunk("abc"), chunk("def"), chunk("", "cancelled"), "[DONE]"], "cut short"),
        ([chunk("abc"), chunk("ef"), chunk("", "length"), "[DONE]"], "wrong"),
        ([chunk("abc"), chunk("bcd"), failed(retryable=True)], "wrong"),
        ([chunk("abc"), failed(retryable=True)], "error"),
        ([chunk("abc"), failed(retryable=False)], "fatal"),
        ([chunk("abc"), {"error": {"code": "cancelled"}}], "fatal"),
    ],
)
def test_what_became_of_a_stream(events: list[Any], outcome: str) -> None:
    asked = Asked("chat", False, {}, [RIGHT])
    for number, data in enumerate(events):
        asked.take(str(number), data)
    assert asked.outcome()[0] == outcome


def test_an_event_that_comes_twice() -> None:
    asked = Asked("chat", False, {}, [RIGHT])
    for id in ("1", "2", "2"):
        asked.take(id, chunk(""))
    assert asked.outcome()[0] == "doubled"


@pytest.mark.parametrize(
    ("api", "events"),
    [
        ("messages", [{"type": "content_block_delta", "delta": {"type": "text_delta", "text": RIGHT}},
                      {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}}, {"type": "message_stop"}]),
        ("responses", [{"type": "response.output_text.delta", "delta": RIGHT},
                       {"type": "response.incomplete",
                        "response": {"incomplete_details": {"reason": "max_output_tokens"}}}]),
    ],
)  # fmt: skip
def test_other_apis_are_read_as_well(api: str, events: list[Any]) -> None:
    asked = Asked(api, False, {}, [RIGHT])
    for number, data in enumerate(events):
        asked.take(str(number), data)
    assert asked.outcome() == ("whole", "")


def test_all_but_whole_and_retryable_are_findings() -> None:
    about = {"t": 0, "who": "c", "api": "chat", "socket": False, "choices": 1, "takeovers": 1, "tried_again": 0,
             "text": "", "id": "", "place": ""}  # fmt: skip
    lines = [{**about, "e": "http begun", "key": key} for key in ("a", "b", "c", "d")]
    lines += [{**about, "e": "http", "key": key, "outcome": outcome}
              for key, outcome in (("a", "whole"), ("b", "error"), ("c", "cut short"))]  # fmt: skip
    found = judge(lines)
    assert [wrong.sort for wrong in found.wrong] == ["http cut short", "http hung"]
    assert found.kinds["taken over"] == 3
