"""Tools as OpenAI's API names them, to what a request to the mesh says of them.

    options = tool_options(tools, tool_choice, parallel_tool_calls)
    Ask(chat_prompt(messages, tools, options), {"form": "chat", "sampling": options, ...})

If `options` is empty no tool may be called, and the answer is plain text. Otherwise its text goes through
`llambo.gateway.apis.tool_calls.ToolCalls`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from llambo.mesh.wire import limits
from llambo.mesh.wire.conversation import TOOL_NAME
from llambo.mesh.wire.errors import Code, LlamboError

Tool = Mapping[str, Any]
_encode = msgspec.json.Encoder().encode


def tool_options(
    tools: Sequence[Tool] | None, tool_choice: str | Mapping[str, Any] | None = None, parallel: bool | None = None
) -> dict[str, Any]:
    """The sampling options. Raises LlamboError that names the field.

    `tools`: [{"type": "function", "function": {"name", "description"?, "parameters"?}}]. `tool_choice`: none, auto,
    required, {"type": "function", "function": {"name"}}, or {"type": "allowed_tools", "allowed_tools": {"mode",
    "tools"}}.
    """
    names = [_name(tool, f"tools[{at}]") for at, tool in enumerate(tools or ())]
    if len(names) > limits.TOOLS:
        raise _bad("tools", f"{len(names)} of them, {limits.TOOLS} may be")
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise _bad("tools", f"two are called {twice!r}")
    mode, only = _choice(tool_choice if tool_choice is not None else "auto")
    for name in only:
        if name not in names:
            raise _bad("tool_choice", f"no tool is called {name!r}")
    if mode == "none" or not names:
        if mode == "required":
            raise _bad("tool_choice", "there are no tools to choose from")
        return {}
    options: dict[str, Any] = {"tool_choice": mode}
    if only:
        options["tool_names"] = only
    if parallel is not None:
        options["parallel_tool_calls"] = parallel
    return options


def chat_prompt(messages: Sequence[Any], tools: Sequence[Tool] | None, options: Mapping[str, Any]) -> str:
    """The prompt of a request of the form `chat`. Tools that may not be called are not spoken of."""
    told = {"messages": messages, "tools": tools} if options.get("tool_choice") else {"messages": messages}
    try:
        return _encode(told).decode()
    except (msgspec.MsgspecError, TypeError, UnicodeError, RecursionError) as error:
        raise _bad("messages", str(error)) from error


def _choice(choice: Any) -> tuple[str, list[str]]:
    """None, auto or required, and the names it is limited to."""
    match choice:
        case "none" | "auto" | "required":
            return str(choice), []
        case {"type": "function", "function": {"name": str() as name}}:
            return "required", [name]
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [*tools]}}:
            names = [_name(tool, f"tool_choice.allowed_tools.tools[{at}]") for at, tool in enumerate(tools)]
            return (mode, names) if names else ("none", [])
        case _:
            raise _bad("tool_choice", "it is none, auto, required, or the name of a function")


def _name(tool: Any, where: str) -> str:
    match tool:
        case {"type": "function", "function": {"name": str() as name, **more}}:
            if not TOOL_NAME.fullmatch(name):
                raise _bad(f"{where}.function.name", f"{name!r} does not match {TOOL_NAME.pattern}")
            if not isinstance(more.get("parameters"), Mapping | None):
                raise _bad(f"{where}.function.parameters", "a JSON schema is an object")
            if not isinstance(more.get("description"), str | None):
                raise _bad(f"{where}.function.description", "it is text")
            return name
        case {"type": str() as kind} if kind != "function":
            raise _bad(f"{where}.type", f"tools of type {kind!r} are not known here, only functions")
        case _:
            raise _bad(where, 'a tool is {"type": "function", "function": {"name": ...}}')


def _bad(field: str, text: str) -> LlamboError:
    return LlamboError(Code.BAD_REQUEST, f"{field}: {text}")
