"""A conversation: messages, the tools that a model may call, and the form of its calls in the text of an answer.

This is the JSON in the prompt of a request. With the form `messages` it is a list of messages, with the form `chat` an
object with `messages` and `tools`. The fields are those of OpenAI's chat API. Gateways write it, workers read it.

Reading is lenient, because other clients write it by hand: content may be text or a list of parts, an assistant's
message with calls needs no content, arguments may be an object or its JSON text, `developer` means `system`.
What `read` returns has one form only: every content is text and every role is one that chat templates know.

A call in the text of an answer has the form that was introduced with the Hermes models:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

It is the only form, whatever the model: the worker's grammar enforces it, so one parser is enough (`tool_calls`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from llambo.mesh.wire import limits

#: Messages of one conversation.
MESSAGES = 4096
#: Around a call in the text of an answer.
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
#: The names that tools may have. No character needs an escape in JSON or in a grammar.
TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")

ROLES = ("system", "developer", "user", "assistant", "tool")


class BadConversation(ValueError):
    """The conversation cannot be used. `field` is the path to what is wrong; empty if the JSON cannot be read."""

    def __init__(self, problem: str, field: str = "") -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.problem, self.field = problem, field


class ContentPart(msgspec.Struct, frozen=True):
    """Only parts of type `text` can be used; others are read so that the error can name them."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, frozen=True):
    name: str
    #: JSON text or the object itself. The text of an answer that was cut need not be valid JSON.
    arguments: str | dict[str, Any] = ""


class ToolCall(msgspec.Struct, frozen=True):
    function: CalledFunction
    id: str = ""
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """`tool_calls` belong to the role `assistant`, `tool_call_id` names the call that a `tool` message answers."""

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[ToolCall] | None = None
    name: str | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The content of a message that `read` returned, or that was built with text."""
        assert not isinstance(self.content, list), "read() has joined the parts"
        return self.content or ""


class Function(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    description: str | None = None
    #: A JSON schema. Without one the tool takes no arguments.
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct, frozen=True):
    function: Function
    type: Literal["function"] = "function"


class Chat(msgspec.Struct, frozen=True, omit_defaults=True):
    messages: list[ChatMessage] = []
    tools: list[Tool] = []


class _ChatAsSent(msgspec.Struct, frozen=True):
    messages: list[ChatMessage]
    tools: list[Tool] | None = None


_encode = msgspec.json.Encoder().encode
_decode_chat = msgspec.json.Decoder(_ChatAsSent).decode
_decode_messages = msgspec.json.Decoder(list[ChatMessage]).decode


def read(prompt: bytes, form: Literal["messages", "chat"]) -> Chat:
    """Raises BadConversation."""
    try:
        sent = _decode_chat(prompt) if form == "chat" else _ChatAsSent(_decode_messages(prompt))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadConversation(f"the prompt is not a list of messages: {error}") from error
    if not 0 < len(sent.messages) <= MESSAGES:
        raise BadConversation(f"there are {len(sent.messages)}, allowed are 1 to {MESSAGES}", "messages")
    tools = sent.tools or []
    check_tools(tools)
    return Chat([_normal_form(message, f"messages[{at}]") for at, message in enumerate(sent.messages)], tools)


def write(chat: Chat) -> tuple[Literal["messages", "chat"], bytes]:
    """The form and the prompt. `chat` is used only where it is needed, because older workers do not know it."""
    if chat.tools or any(message.role == "tool" or message.tool_calls for message in chat.messages):
        return "chat", _written(chat)
    return "messages", _written(chat.messages)


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may or must call tools."""

    mode: Literal["none", "auto", "required"] = "auto"
    #: The names it is limited to. Empty: all.
    only: Sequence[str] = ()
    #: Whether one answer may have several calls. None: the worker's default.
    parallel: bool | None = None


@dataclass(frozen=True, slots=True)
class EncodedChat:
    form: Literal["messages", "chat"]
    text: str
    #: Sampling options. Empty: no tool may be called, and the answer is plain text.
    tool_options: dict[str, Any]


def prompt_with_tools(chat: Chat, choice: ToolChoice) -> EncodedChat:
    """Tools that may not be called are left out of the prompt. Raises BadConversation."""
    options = _tool_options(chat.tools, choice)
    form, prompt = write(chat if options else Chat(chat.messages))
    return EncodedChat(form, prompt.decode(), options)


def _tool_options(tools: Sequence[Tool], choice: ToolChoice) -> dict[str, Any]:
    check_tools(tools)
    names = {tool.function.name for tool in tools}
    for name in choice.only:
        if name not in names:
            raise BadConversation(f"no tool has the name {name!r}", "tool_choice")
    if choice.mode == "none" or not names:
        if choice.mode == "required":
            raise BadConversation("there are no tools to choose from", "tool_choice")
        return {}
    options: dict[str, Any] = {"tool_choice": choice.mode}
    if choice.only:
        options["tool_names"] = list(choice.only)
    if choice.parallel is not None:
        options["parallel_tool_calls"] = choice.parallel
    return options


def _written(value: Chat | list[ChatMessage]) -> bytes:
    try:
        return _encode(value)
    except (msgspec.MsgspecError, TypeError, UnicodeError, RecursionError) as error:
        raise BadConversation(str(error), "messages") from error


def joined(content: str | Sequence[ContentPart] | None, field: str, between: str = "\n") -> str:
    """Content as one text. Raises BadConversation for parts that are not text; `field` is the path to the content."""
    if content is None or isinstance(content, str):
        return content or ""
    for number, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise BadConversation(f"parts of type {part.type!r} are not supported, only text", f"{field}[{number}]")
    return between.join(part.text or "" for part in content)


def check_tools(tools: Sequence[Tool]) -> None:
    """Raises BadConversation."""
    if len(tools) > limits.TOOLS:
        raise BadConversation(f"there are {len(tools)}, allowed are {limits.TOOLS}", "tools")
    names: set[str] = set()
    for at, tool in enumerate(tools):
        name = tool.function.name
        if not TOOL_NAME.fullmatch(name):
            raise BadConversation(f"{name!r} does not match {TOOL_NAME.pattern}", f"tools[{at}].function.name")
        if name in names:
            raise BadConversation(f"two tools have the name {name!r}", "tools")
        names.add(name)


def _normal_form(message: ChatMessage, field: str) -> ChatMessage:
    if message.content is None and not message.tool_calls:
        raise BadConversation("is missing", f"{field}.content")
    role = "system" if message.role == "developer" else message.role
    return msgspec.structs.replace(message, role=role, content=joined(message.content, f"{field}.content"))
