"""From the conversation and the tools of a request to the prompt that is submitted to the mesh. For every chat API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from llambo.gateway.answers.api import JsonObject
from llambo.gateway.answers.api_errors import FieldError
from llambo.mesh.client.request_options import Options
from llambo.mesh.wire import limits
from llambo.mesh.wire.conversation import (
    TOOL_NAME,
    BadConversation,
    CalledFunction,
    Chat,
    ChatMessage,
    EncodedChat,
    Tool,
    ToolCall,
    ToolChoice,
    prompt_with_tools,
)
from llambo.mesh.wire.messages import Priority
from llambo.mesh.wire.naming import is_adapter_name, with_adapter

#: Between two texts that become one.
BETWEEN = "\n\n"
#: The schema of any object of JSON.
ANY_OBJECT = '{"type":"object"}'
ToolName = Annotated[str, Meta(pattern=f"^{TOOL_NAME.pattern}$")]
#: Of a call, or of a response.
GivenId = Annotated[str, Meta(min_length=1, max_length=256)]


class LoraScale(msgspec.Struct):
    """As llama-server has them, where `id` is a number. Here it is a name: workers need not have the same numbers."""

    id: Annotated[str, Meta(max_length=limits.ADAPTER_CHARS)] | int
    scale: float = 1.0


class LlamboFields(msgspec.Struct, kw_only=True):
    """Fields of a request that llambo adds to an API (OpenAI's chat has a seed itself)."""

    #: The same seed gives the same choices of tokens.
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    priority: Priority | None = None
    deadline_ms: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    #: The adapter of the model: its name, or a list of one.
    lora: (
        Annotated[str, Meta(max_length=limits.ADAPTER_CHARS)]
        | Annotated[list[LoraScale], Meta(max_length=limits.ADAPTERS)]
        | None
    ) = None

    def model_with_adapter(self, model: str) -> str | None:
        """Raises FieldError."""
        return with_adapter(model, self._adapter()) or None

    def _adapter(self) -> str:
        if not isinstance(self.lora, list):
            name = self.lora or ""
        else:
            used = [(at, each) for at, each in enumerate(self.lora) if each.scale != 0]
            if len(used) > 1:
                raise FieldError("lora", "several adapters at once are not supported; name one")
            if not used:
                return ""
            at, one = used[0]
            if one.scale != 1:
                raise FieldError(f"lora[{at}].scale", "an adapter has the scale 1 here, or 0: it is not used")
            if isinstance(one.id, int):
                raise FieldError(f"lora[{at}].id", "adapters have names here; /v1/models lists them as MODEL+NAME")
            name = one.id
        if name and not is_adapter_name(name):
            raise FieldError("lora", f"{name!r} is not the name of an adapter; /v1/models lists them as MODEL+NAME")
        return name

    def options(self) -> Options:
        return {
            # The mesh takes no negative seed.
            "seed": None if self.seed is None else self.seed % 2**63,
            "priority": self.priority,
            "deadline_ms": self.deadline_ms,
        }


def chat_prompt(messages: list[ChatMessage], tools: list[Tool], choice: ToolChoice) -> EncodedChat:
    """Raises FieldError."""
    try:
        return prompt_with_tools(Chat(messages, tools), choice)
    except BadConversation as error:
        raise field_error(error) from error


def field_error(error: BadConversation) -> FieldError:
    return FieldError(error.field, error.problem)


class Conversation:
    """A conversation in the making, from the parts that an API has. `joined`: successive turns of a role become one."""

    def __init__(self, messages: Sequence[ChatMessage] = (), *, joined: bool = False) -> None:
        self.messages = list(messages)
        self._joined = joined
        #: Ids of the calls so far: a result has to belong to one of them.
        self.calls = {call.id for message in messages for call in message.tool_calls or ()}

    def add(self, role: str, text: str) -> None:
        last = self.messages[-1] if self.messages else None
        if self._joined and last is not None and last.role == role:
            text = BETWEEN.join(filter(None, (last.text, text)))
            self.messages[-1] = msgspec.structs.replace(last, content=text)
        else:
            self.messages.append(ChatMessage(role, text))

    def add_call(self, id: str, name: str, arguments: str) -> None:
        """A part of the assistant's last message. `arguments` is JSON text."""
        if not self.messages or self.messages[-1].role != "assistant":
            self.messages.append(ChatMessage("assistant", ""))
        last = self.messages[-1]
        calls = [*(last.tool_calls or ()), ToolCall(CalledFunction(name, arguments), id)]
        self.messages[-1] = msgspec.structs.replace(last, tool_calls=calls)
        self.calls.add(id)

    def add_result(self, id: str, text: str) -> None:
        self.messages.append(ChatMessage("tool", text, tool_call_id=id))


def check_depth(value: JsonObject, field: str) -> JsonObject:
    """Raises FieldError. The worker reads and writes it again, with less room on its stack."""
    waiting: list[tuple[Any, int]] = [(value, 1)]
    while waiting:
        each, level = waiting.pop()
        if level > limits.GRAMMAR_DEPTH:
            raise FieldError(field, f"nested more than {limits.GRAMMAR_DEPTH} levels deep")
        inner = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        waiting += [(one, level + 1) for one in inner]
    return value


def bounded_schema(schema: JsonObject, field: str) -> str:
    """A JSON schema for the answer, as a sampling option has it. Raises FieldError."""
    text = msgspec.json.encode(check_depth(schema, field)).decode()
    if len(text) > limits.GRAMMAR_CHARS:
        raise FieldError(field, f"{len(text)} characters of JSON; at most {limits.GRAMMAR_CHARS} are allowed")
    return text
