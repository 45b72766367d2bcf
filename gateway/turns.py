"""A conversation as a model's chat template reads it, made of whatever an API calls its parts.

What comes out are messages as OpenAI's chat has them: with `tool_calls` on what the assistant said, and a message of
the role `tool` for each result.
"""

from __future__ import annotations

from typing import Any

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
