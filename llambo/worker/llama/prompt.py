"""From a conversation to the text that the model reads, by the chat template of the model, rendered in a sandbox.

A template comes with a model file and is not trusted. The sandbox gives no access to internal attributes of Python
objects, and the template cannot change its arguments. A timer ends a template that runs too long, a memory limit one
that grows too much. Neither interrupts a single long operation, so operations that could be one (products, powers) are
checked before they run.

A template that knows tools in our form (`llambo.mesh.wire.conversation`) is given messages and tools as they are. For
any other template `without_tools` expresses tools, calls and results with roles and texts alone.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llambo.mesh.wire import conversation, limits
from llambo.mesh.wire.conversation import CALL_BEGIN, CALL_END, BadConversation, Chat, ChatMessage, Tool, ToolCall
from llambo.mesh.wire.messages import Sampling

#: A template that takes longer is broken or hostile.
RENDER_S = 2.0
#: The largest base or exponent of a power in a template.
MAX_POWER = 1000
#: The longest number that may be multiplied: a product of very long numbers takes minutes.
MAX_BITS = 100_000
#: A width or precision of a thousand or more, or one given as an argument.
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{4,}|\*)")
#: The memory that a template may use in addition to that of the process.
RENDER_BYTES = 256 * 1024 * 1024
_TOOL_INSTRUCTIONS = f"""You can use tools. Each is described here as JSON, in a line of its own:
<tools>
%s
</tools>
To use a tool, write its name and its arguments as JSON between tags, and nothing behind them:
{CALL_BEGIN}
{{"name": "the name", "arguments": {{"an argument": "its value"}}}}
{CALL_END}
Then you are given what came of it, between <tool_response> and </tool_response>."""


class BadPrompt(Exception):
    """The prompt or the model's template cannot be used; the text gives the reason."""


class TooLong(BadPrompt):
    """The prompt is certainly longer than the context."""


class _Generation(Extension):
    """`{% generation %}` marks what to train on; it is ignored here."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """One multiplication can need more memory than there is, and no timer interrupts it."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _huge(operator, left, right):
            raise BadPrompt(f"the model's chat template has a result that is too large for {operator}")
        return super().call_binop(context, operator, left, right)


def _huge(operator: str, left: Any, right: Any) -> bool:
    if operator == "%":  # a remainder, or a text with widths in it
        return isinstance(left, str) and _WIDE.search(left) is not None
    size = max((len(side) for side in (left, right) if isinstance(side, (str, list, tuple, bytes))), default=0)
    times = max((abs(side) for side in (left, right) if isinstance(side, int)), default=0)
    if times.bit_length() > MAX_BITS or (size and size * times > limits.PROMPT_BYTES):
        return True
    return operator == "**" and times > MAX_POWER


class Template:
    """A chat template. Raises BadPrompt if it cannot be parsed."""

    #: It shows tools and calls to the model in the form of `llambo.mesh.wire.conversation`.
    knows_tools: bool

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], autoescape=False
        )  # the result is read by a model, not by a browser
        environment.filters["tojson"] = _to_json
        del environment.filters["center"], environment.filters["format"]  # they pad to any length
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        self._names = {"bos_token": bos, "eos_token": eos}
        self.knows_tools = CALL_BEGIN in source and re.search(r"\btools\b", source) is not None
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, MemoryError) as error:
            raise BadPrompt(f"the model's chat template cannot be read: {error}") from error

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        names = {**self._names, "messages": messages, **({"tools": tools} if tools else {})}
        try:
            with time_limit(RENDER_S), memory_limit(RENDER_BYTES):
                return self._template.render(add_generation_prompt=True, **names)
        except BadPrompt:
            raise
        # A template can fail with any exception, and each means that the prompt cannot be rendered.
        except Exception as error:
            raise BadPrompt(f"the model's chat template failed: {type(error).__name__}: {error}") from error


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(text: str) -> NoReturn:
    raise BadPrompt(f"the model's chat template says: {text}")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after this time. Works in the main thread only."""

    def ring(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Raises MemoryError in the block if the process needs so much more memory than it has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * os.sysconf("SC_PAGE_SIZE") + more_bytes
    limits_now = [limit for limit in (soft, hard, wanted) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits_now), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class PromptText(NamedTuple):
    """What the model reads. `templated`: the model's chat template produced it, control tokens included."""

    text: bytes
    templated: bool


def chat_of(prompt: bytes, sampling: Sampling) -> Chat:
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


def prompt_text(prompt: bytes, chat: Chat, template: Template | None) -> PromptText:
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
