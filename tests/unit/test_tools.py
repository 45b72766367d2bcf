"""Tools as OpenAI's API names them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llambo.gateway.apis.tools import chat_prompt, tool_options
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError


def tool(name: str = "weather", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


TOOLS = [tool(), tool("time")]


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (None, {"tool_choice": "auto"}),
        ("auto", {"tool_choice": "auto"}),
        ("required", {"tool_choice": "required"}),
        ({"type": "function", "function": {"name": "time"}}, {"tool_choice": "required", "tool_names": ["time"]}),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("time")]}},
            {"tool_choice": "auto", "tool_names": ["time"]},
        ),
    ],
)
def test_choices(choice: Any, wanted: dict[str, Any]) -> None:
    assert tool_options(TOOLS, choice) == wanted
    assert tool_options(TOOLS, choice, False) == {**wanted, "parallel_tool_calls": False}


def test_without_tools_or_with_none_of_them_there_is_nothing_to_say() -> None:
    assert tool_options(TOOLS, "none") == tool_options(None) == tool_options([], "auto") == {}
    assert json.loads(chat_prompt([{"role": "user", "content": "é"}], TOOLS, {})) == {
        "messages": [{"role": "user", "content": "é"}]
    }
    told = json.loads(chat_prompt([], TOOLS, tool_options(TOOLS)))
    assert told == {"messages": [], "tools": TOOLS}


@pytest.mark.parametrize(
    ("tools", "choice", "named"),
    [
        ([tool("a b")], None, "tools[0].function.name"),
        ([tool(), tool("é")], None, "tools[1].function.name"),
        ([tool(), tool()], None, "weather"),
        ([tool(parameters=[])], None, "tools[0].function.parameters"),
        ([tool(description=1)], None, "tools[0].function.description"),
        ([{"type": "web_search"}], None, "tools[0].type"),
        ([{"function": {"name": "x"}}], None, "tools[0]"),
        ([1], None, "tools[0]"),
        ([tool(f"t{number}") for number in range(limits.TOOLS + 1)], None, "tools"),
        (TOOLS, "perhaps", "tool_choice"),
        (TOOLS, {"type": "function", "function": {"name": "no"}}, "'no'"),
        (TOOLS, {"type": "allowed_tools", "allowed_tools": {"mode": "all", "tools": []}}, "tool_choice"),
        ([], "required", "tool_choice"),
    ],
)
def test_mistakes_are_refused_and_named(tools: Any, choice: Any, named: str) -> None:
    with pytest.raises(LlamboError) as caught:
        tool_options(tools, choice)
    assert caught.value.code is Code.BAD_REQUEST
    assert named in caught.value.text
