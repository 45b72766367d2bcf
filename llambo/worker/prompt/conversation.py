"""A conversation, as a client sent it: read, and put into words that a template knows.

Clients write messages in many ways: content in parts, or none beside a call; the arguments of a call as an object, or
as its text. All of that becomes `Chat`. A template that knows tools in our form (`llambo.mesh.wire.naming`) is then
given messages and tools as they are. To any other one `in_words` tells the same with nothing but roles and texts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import msgspec

from llambo.mesh.wire import limits
from llambo.mesh.wire.messages import Sampling
from llambo.mesh.wire.naming import BEGIN, END, NAME
from llambo.worker.prompt.template import BadPrompt, Template

_TOLD = f"""You can use tools. Each is described here as JSON, in a line of its own:
<tools>
%s
</tools>
To use a tool, write its name and its arguments as JSON between tags, and nothing behind them:
{BEGIN}
{{"name": "the name", "arguments": {{"an argument": "its value"}}}}
{END}
Then you are given what came of it, between <tool_response> and </tool_response>."""


class Part(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, frozen=True):
    name: str
    arguments: str | dict[str, Any] = ""


class Call(msgspec.Struct, frozen=True):
    function: CalledFunction
    id: str = ""
    type: Literal["function"] = "function"


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None


class Function(msgspec.Struct, frozen=True):
    name: str
    description: str | None = None
    #: A JSON schema; without one the tool takes no arguments.
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct, frozen=True):
    function: Function
    type: Literal["function"] = "function"


class _Asked(msgspec.Struct, frozen=True):
    messages: list[Message]
    tools: list[Tool] | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """Its contents are texts, and its tools are good ones. Empty: there is nothing to put into a template."""

    messages: list[Message] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)


class Text(NamedTuple):
    """What the model reads, and whether that was put into its template."""

    text: bytes
    templated: bool


_decode_chat = msgspec.json.Decoder(_Asked).decode
_decode_messages = msgspec.json.Decoder(list[Message]).decode


# --- reading -----------------------------------------------------------------------------------------------------


def read(prompt: bytes, sampling: Sampling) -> Chat:
    """Raises BadPrompt."""
    if sampling.form == "text":
        return Chat()
    try:
        if sampling.form == "user":
            system = [Message("system", sampling.system)] if sampling.system else []
            return Chat([*system, Message("user", prompt.decode())])
        asked = _decode_chat(prompt) if sampling.form == "chat" else _Asked(_decode_messages(prompt))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadPrompt(f"the prompt is no list of messages: {error}") from error
    if not 0 < len(asked.messages) <= limits.CHAT_MESSAGES:
        raise BadPrompt(f"{len(asked.messages)} messages, 1 to {limits.CHAT_MESSAGES} may be")
    return Chat([_read_message(message, at) for at, message in enumerate(asked.messages)], _read_tools(asked.tools))


def _read_message(message: Message, at: int) -> Message:
    content = message.content
    if isinstance(content, list):
        for number, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise BadPrompt(f"messages[{at}].content[{number}] is {part.type!r}, and only text can be read")
        content = "\n".join(part.text or "" for part in content)
    if content is None and not message.tool_calls:
        raise BadPrompt(f"messages[{at}] has no content")
    role = "system" if message.role == "developer" else message.role
    return msgspec.structs.replace(message, role=role, content=content or "")


def _read_tools(tools: list[Tool] | None) -> list[Tool]:
    names = [tool.function.name for tool in tools or ()]
    if len(names) > limits.TOOLS:
        raise BadPrompt(f"{len(names)} tools, {limits.TOOLS} may be")
    for at, name in enumerate(names):
        if not NAME.fullmatch(name):
            raise BadPrompt(f"tools[{at}] is called {name!r}, which does not match {NAME.pattern}")
        if name in names[:at]:
            raise BadPrompt(f"two tools are called {name!r}")
    return tools or []


# --- writing -----------------------------------------------------------------------------------------------------


def text_of(prompt: bytes, chat: Chat, template: Template | None) -> Text:
    """What the model reads. Raises BadPrompt."""
    if not chat.messages:
        return Text(prompt, False)
    try:
        if template is None:
            contents = [str(message.content) for message in in_words(chat)]
            return Text("\n\n".join(contents).encode(errors="replace"), False)
        if template.knows_tools:
            told = [_told(message) for message in chat.messages]
            made = template.render(told, [{"type": "function", "function": _function(tool)} for tool in chat.tools])
        else:
            made = template.render([_told(message) for message in in_words(chat)])
    except RecursionError as error:
        raise BadPrompt("the prompt is nested too deep") from error
    text = made.encode(errors="replace")
    if len(text) > limits.PROMPT_BYTES:
        raise BadPrompt(f"the chat template made {len(text)} bytes of it, {limits.PROMPT_BYTES} are allowed")
    return Text(text, True)


def in_words(chat: Chat) -> list[Message]:
    """The same conversation for a template that knows nothing of tools."""
    told: list[Message] = []
    results: list[str] = []
    for message in chat.messages:
        if message.role == "tool":
            results.append(f"<tool_response>\n{message.content}\n</tool_response>")
            continue
        if results:  # those of one turn together: some templates want user and assistant in turns
            told.append(Message("user", "\n".join(results)))
            results = []
        told.append(Message(message.role, _with_calls(message)))
    if results:
        told.append(Message("user", "\n".join(results)))
    if not chat.tools:
        return told
    tools = _TOLD % "\n".join(_json(_function(tool)) for tool in chat.tools)
    if told[0].role == "system":
        return [Message("system", f"{told[0].content}\n\n{tools}"), *told[1:]]
    return [Message("system", tools), *told]


def _with_calls(message: Message) -> str:
    """As the model itself has written it, so that it need not be computed again."""
    calls = [
        f'{BEGIN}\n{{"name": {_json(call.function.name)}, "arguments": {_arguments_text(call)}}}\n{END}'
        for call in message.tool_calls or ()
    ]
    return "\n".join([str(message.content)] * bool(message.content) + calls)


def _arguments_text(call: Call) -> str:
    arguments = call.function.arguments
    return (arguments or "{}") if isinstance(arguments, str) else _json(arguments)


def _told(message: Message) -> dict[str, Any]:
    """For a template. Those that know calls want their arguments as an object."""
    told: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        told["name"] = message.name
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        told["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": _object(call)}}
            for call in message.tool_calls
        ]
    return told


def _object(call: Call) -> Any:
    """What is no JSON, because an answer was cut, stays as it is."""
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments


def _function(tool: Tool) -> dict[str, Any]:
    """With all that templates look for, in the order that models were shown."""
    each = tool.function
    nothing = {"type": "object", "properties": {}}
    return {"name": each.name, "description": each.description or "", "parameters": each.parameters or nothing}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
