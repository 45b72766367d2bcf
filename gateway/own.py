"""What messages and responses have in common: fields that are llambo's own, and how a conversation gets to the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from llambo.gateway.asking import encode
from llambo.gateway.openai_common import schema_text
from llambo.gateway.problems import FieldError
from llambo.gateway.tools import Tool, chat_prompt, tool_options
from llambo.mesh import limits
from llambo.mesh.client_options import Options
from llambo.mesh.errors import LlamboError
from llambo.mesh.message import Priority
from llambo.mesh.tasks import Form


class Own(msgspec.Struct, kw_only=True):
    #: The same seed gives the same chances.
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    priority: Priority | None = None
    deadline_ms: Annotated[int, Meta(ge=1, le=2**31)] | None = None


def own_options(asked: Own) -> Options:
    return {
        # The mesh takes none below zero.
        "seed": None if asked.seed is None else asked.seed % 2**63,
        "priority": asked.priority,
        "deadline_ms": asked.deadline_ms,
    }


def bounded(value: dict[str, Any], field: str) -> dict[str, Any]:
    """What a caller may nest: it is written out again, here and by the worker, where there is less room for it."""
    waiting: list[tuple[Any, int]] = [(value, 1)]
    while waiting:
        each, level = waiting.pop()
        if level > limits.GRAMMAR_DEPTH:
            raise FieldError(field, f"{field}: nested more than {limits.GRAMMAR_DEPTH} deep")
        inner = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        waiting += [(one, level + 1) for one in inner]
    return value


def bounded_schema(schema: dict[str, Any], field: str) -> str:
    text = schema_text(bounded(schema, field))
    if len(text) > limits.GRAMMAR_CHARS:
        raise FieldError(field, f"{field}: {len(text)} characters of JSON, {limits.GRAMMAR_CHARS} may be")
    return text


def called(tools: list[Tool], choice: str | Mapping[str, Any], several: bool | None) -> dict[str, Any]:
    """What is said of the tools beside the prompt: nothing if none may be called. As OpenAI's chat has them."""
    try:
        return tool_options(tools, choice, several)
    except LlamboError as error:
        raise FieldError(error.text.partition(":")[0], error.text) from error


def prompt_of(said: list[dict[str, Any]], tools: list[Tool], calls: dict[str, Any]) -> tuple[Form, str]:
    """The prompt, and its form. `chat` is used where it is needed: not every worker may know it yet."""
    if calls or any(turn["role"] == "tool" or "tool_calls" in turn for turn in said):
        return "chat", chat_prompt(said, tools, calls)
    return "messages", encode(said).decode()
