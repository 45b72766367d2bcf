"""Tools and the choice of them, as OpenAI's chat API has them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llambo.gateway.answers.api import Parsed
from llambo.gateway.answers.api_errors import FieldError
from llambo.gateway.apis import openai_chat
from llambo.mesh.wire import limits
from tests.unit.gateway_bench import read


def tool(name: str = "weather", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


TOOLS = [tool(), tool("time")]


def parsed(tools: Any, choice: Any = None, parallel: bool | None = None) -> Parsed:
    body = {
        "messages": [{"role": "user", "content": "é"}],
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": parallel,
    }
    return openai_chat.parse(read(openai_chat.ChatRequest, body), 64)


def options(tools: Any, choice: Any = None, parallel: bool | None = None) -> dict[str, Any]:
    sampling = parsed(tools, choice, parallel).submission.options["sampling"] or {}
    return {name: value for name, value in sampling.items() if name != "fit"}


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
    assert options(TOOLS, choice) == wanted
    assert options(TOOLS, choice, False) == {**wanted, "parallel_tool_calls": False}


def test_tools_that_may_not_be_called_are_not_in_the_prompt() -> None:
    assert options(TOOLS, "none") == options(None) == options([], "auto") == {}
    assert options(TOOLS, {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}) == {}
    messages = [{"role": "user", "content": "é"}]
    assert json.loads(parsed(TOOLS, "none").submission.prompt) == messages
    assert json.loads(parsed(TOOLS).submission.prompt) == {"messages": messages, "tools": TOOLS}


@pytest.mark.parametrize(
    ("tools", "choice", "field"),
    [
        ([tool("a b")], None, "tools[0].function.name"),
        ([tool(), tool("é")], None, "tools[1].function.name"),
        ([tool(), tool()], None, "tools"),
        ([tool(parameters=[])], None, "tools[0].function.parameters"),
        ([tool(description=1)], None, "tools[0].function.description"),
        ([{"type": "web_search"}], None, "tools[0].type"),
        ([{"type": "function"}], None, "tools[0]"),
        ([1], None, "tools[0]"),
        ([tool(f"t{number}") for number in range(limits.TOOLS + 1)], None, "tools"),
        (TOOLS, "perhaps", "tool_choice"),
        (TOOLS, {"type": "function", "function": {"name": "no"}}, "tool_choice"),
        (TOOLS, {"type": "allowed_tools", "allowed_tools": {"mode": "all", "tools": []}},
         "tool_choice.allowed_tools.mode"),
        ([], "required", "tool_choice"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_by_their_field(tools: Any, choice: Any, field: str) -> None:
    with pytest.raises(FieldError) as caught:
        parsed(tools, choice)
    assert caught.value.field == field
    assert caught.value.text.startswith(f"{field}: ")
