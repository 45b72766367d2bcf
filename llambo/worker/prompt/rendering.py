"""From a conversation to the text that the model reads.

A template that knows tools in our form (`llambo.mesh.wire.conversation`) is given messages and tools as they are. For
any other template `without_tools` expresses tools, calls and results with roles and texts alone.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from llambo.mesh.wire import conversation, limits
from llambo.mesh.wire.conversation import CALL_BEGIN, CALL_END, BadConversation, Chat, ChatMessage, Tool, ToolCall
from llambo.mesh.wire.messages import Sampling
from llambo.worker.prompt.template import BadPrompt, Template

_TOOL_INSTRUCTIONS = f"""You can use tools. Each is described here as JSON, in a line of its own:
<tools>
%s
</tools>
To use a tool, write its name and its arguments as JSON between tags, and nothing behind them:
{CALL_BEGIN}
{{"name": "the name", "arguments": {{"an argument": "its value"}}}}
{CALL_END}
Then you are given what came of it, between <tool_response> and </tool_response>."""


class PromptText(NamedTuple):
    """What the model reads. `templated`: the model's chat template produced it, control tokens included."""

    text: bytes
    templated: bool


def read(prompt: bytes, sampling: Sampling) -> Chat:
    """An empty chat if the prompt is plain text, which is not put into a template. Raises BadPrompt."""
    if sampling.form == "text":
        return Chat()
    try:
        if sampling.form == "user":
            system = [ChatMessage("system", sampling.system)] if sampling.system else []
            return Chat([*system, ChatMessage("user", prompt.decode())])
        return conversation.read(prompt, sampling.form)
    except (BadConversation, UnicodeDecodeError) as error:
        raise BadPrompt(str(error)) from error


def text_of(prompt: bytes, chat: Chat, template: Template | None) -> PromptText:
    """Raises BadPrompt."""
    if not chat.messages:
        return PromptText(prompt, False)
    try:
        if template is None:
            texts = [message.text for message in without_tools(chat)]
            return PromptText("\n\n".join(texts).encode(errors="replace"), False)
        if template.knows_tools:
            tools = [{"type": "function", "function": _function_fields(tool)} for tool in chat.tools]
            rendered = template.render([_message_fields(message) for message in chat.messages], tools)
        else:
            rendered = template.render([_message_fields(message) for message in without_tools(chat)])
    except RecursionError as error:
        raise BadPrompt("the prompt is nested too deep") from error
    text = rendered.encode(errors="replace")
    if len(text) > limits.PROMPT_BYTES:
        raise BadPrompt(f"the prompt is {len(text)} bytes after the chat template, {limits.PROMPT_BYTES} are allowed")
    return PromptText(text, True)


def without_tools(chat: Chat) -> list[ChatMessage]:
    """The same conversation for a template that does not know tools."""
    messages: list[ChatMessage] = []
    results: list[str] = []
    for message in chat.messages:
        if message.role == "tool":
            results.append(f"<tool_response>\n{message.text}\n</tool_response>")
            continue
        if results:  # Consecutive results become one message: some templates require that user and assistant alternate.
            messages.append(ChatMessage("user", "\n".join(results)))
            results = []
        messages.append(ChatMessage(message.role, _text_with_calls(message)))
    if results:
        messages.append(ChatMessage("user", "\n".join(results)))
    if not chat.tools:
        return messages
    instructions = _TOOL_INSTRUCTIONS % "\n".join(_json(_function_fields(tool)) for tool in chat.tools)
    if messages[0].role == "system":
        return [ChatMessage("system", f"{messages[0].text}\n\n{instructions}"), *messages[1:]]
    return [ChatMessage("system", instructions), *messages]


def _text_with_calls(message: ChatMessage) -> str:
    """Character by character as the model itself wrote it, so that its tokens can be reused."""
    calls = [
        f'{CALL_BEGIN}\n{{"name": {_json(call.function.name)}, "arguments": {_arguments_text(call)}}}\n{CALL_END}'
        for call in message.tool_calls or ()
    ]
    return "\n".join([message.text] * bool(message.text) + calls)


def _arguments_text(call: ToolCall) -> str:
    arguments = call.function.arguments
    return (arguments or "{}") if isinstance(arguments, str) else _json(arguments)


def _message_fields(message: ChatMessage) -> dict[str, Any]:
    """As templates read it. Those that know calls expect the arguments as an object."""
    fields: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments_object(call)},
            }
            for call in message.tool_calls
        ]
    return fields


def _arguments_object(call: ToolCall) -> Any:
    """Text that is not JSON, because the answer was cut, is passed on as text."""
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments


def _function_fields(tool: Tool) -> dict[str, Any]:
    """All fields that templates read, in the order that models were trained with."""
    function = tool.function
    no_arguments = {"type": "object", "properties": {}}
    return {
        "name": function.name,
        "description": function.description or "",
        "parameters": function.parameters or no_arguments,
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
