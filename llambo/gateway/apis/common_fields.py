"""What messages and responses have in common: fields that are llambo's own, and how a conversation gets to the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from llambo.gateway.answers.asking import encode
from llambo.gateway.answers.problems import FieldError
from llambo.gateway.apis.openai_common import schema_text
from llambo.gateway.apis.tools import Tool, chat_prompt, tool_options
from llambo.mesh.client.request_options import Options
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.messages import Priority
from llambo.mesh.wire.tasks import Form


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


# --- A conversation as a model's chat template reads it, made of whatever an API calls its parts. ---
#
# What comes out are messages as OpenAI's chat has them: with `tool_calls` on what the assistant said, and a message of
# the role `tool` for each result.

#: Between two texts that become one.
BETWEEN = "\n\n"


class Turns:
    """`joined`: two turns of one role, one after the other, are one."""

    def __init__(self, messages: list[dict[str, Any]] | None = None, *, joined: bool = False) -> None:
        self.messages = messages or []
        self._joined = joined
        #: What was called so far: a result has to be of one of them.
        self.calls = {call["id"] for message in self.messages for call in message.get("tool_calls") or ()}

    def say(self, role: str, text: str) -> None:
        last = self.messages[-1] if self.messages else None
        if self._joined and last is not None and last["role"] == role:
            last["content"] = BETWEEN.join(filter(None, (last["content"], text)))
        else:
            self.messages.append({"role": role, "content": text})

    def call(self, id: str, name: str, arguments: str) -> None:
        """Part of what the assistant has just said. `arguments` is JSON text."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": ""})
        called = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self.messages[-1].setdefault("tool_calls", []).append(called)
        self.calls.add(id)

    def result(self, id: str, text: str) -> None:
        self.messages.append({"role": "tool", "tool_call_id": id, "content": text})
