"""OpenAI's `/v1/responses`: what it reads, and what it asks of the mesh. What it answers is in `responses_output`.

An input is a text or a list of items. Items are looked at one by one, because most of them may do without a `type`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from llambo.gateway.answers.problems import FieldError, unread
from llambo.gateway.apis.common_fields import Own, Turns, bounded, bounded_schema, own_options
from llambo.gateway.apis.openai_common import Share
from llambo.gateway.apis.tools import Tool
from llambo.mesh.client.request_options import Options
from llambo.mesh.wire import limits
from llambo.mesh.wire.conversation import TOOL_NAME

ITEMS = 4_096
Name = Annotated[str, Meta(pattern=f"^{TOOL_NAME.pattern}$")]
Id = Annotated[str, Meta(min_length=1, max_length=256)]
#: What the mesh cannot do, and what to do about it. That these are absent (or null, or false) is all that is checked.
NOT_HERE = {
    "background": "answers are given at once, not in the background",
    "conversation": "there are no conversations here; use previous_response_id",
    "prompt": "there are no stored prompts here; use instructions and input",
}
T = TypeVar("T")


class InputText(msgspec.Struct, tag="input_text"):
    text: str


class OutputText(msgspec.Struct, tag="output_text"):
    text: str


class Refusal(msgspec.Struct, tag="refusal"):
    """Never made here, but other models' answers have it."""

    refusal: str


class Message(msgspec.Struct):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText | Refusal]


class FunctionCall(msgspec.Struct):
    call_id: Id
    name: Name
    arguments: str


class FunctionCallOutput(msgspec.Struct):
    call_id: Id
    output: str | list[InputText]


class GivenTool(msgspec.Struct):
    """`type` is looked at before the rest: other tools have other fields."""

    type: str
    name: Name = ""
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class AllowedTool(msgspec.Struct):
    name: Name
    type: Literal["function"] = "function"


class Named(msgspec.Struct, tag="function"):
    name: Name


class Allowed(msgspec.Struct, tag="allowed_tools"):
    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Meta(max_length=limits.TOOLS)]


class TextFormat(msgspec.Struct, tag="text"):
    pass


class ObjectFormat(msgspec.Struct, tag="json_object"):
    pass


class SchemaFormat(msgspec.Struct, tag="json_schema", omit_defaults=True):
    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct):
    format: TextFormat | ObjectFormat | SchemaFormat | None = None


class ResponsesRequest(Own, kw_only=True):
    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=ITEMS)]
    model: Annotated[str, Meta(max_length=limits.NAME_CHARS)] = ""
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Share | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    include: list[str] | None = None
    text: TextConfig | None = None
    tools: Annotated[list[GivenTool], Meta(max_length=limits.TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Named | Allowed | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: Id | None = None
    metadata: Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
                        Meta(max_length=16)] | None = None  # fmt: skip
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None


def turns_of(asked: ResponsesRequest, before: list[dict[str, Any]]) -> Turns:
    """What was said `before`, and what is said now; without the instructions, which are of this request alone."""
    turns = Turns(before)
    if isinstance(asked.input, str):
        turns.say("user", asked.input)
    else:
        for number, item in enumerate(asked.input):
            _add(turns, item, f"input[{number}]")
    return turns


def told(said: list[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """With the instructions, as the model's template reads it."""
    return [{"role": "system", "content": instructions}, *said] if instructions else said


def refuse_what_is_not_here(asked: ResponsesRequest) -> None:
    for field, why in NOT_HERE.items():
        if getattr(asked, field):
            raise FieldError(field, f"{field}: {why}")


def options_of(asked: ResponsesRequest, answer_tokens: int, form: str, calls: dict[str, Any]) -> Options:
    """`answer_tokens`: the longest answer for who names none. It is a bound; there need not be room for so many."""
    sampling: dict[str, Any] = {"fit": True, **calls, **_format(asked.text)}
    if asked.top_p is not None:
        sampling["top_p"] = asked.top_p
    logprobs = wants_logprobs(asked)
    if calls and logprobs:
        raise FieldError("include", "include: log probabilities are told of text only, without tools")
    return {
        **own_options(asked),
        "model": asked.model or None,
        "max_tokens": min(asked.max_output_tokens or answer_tokens, limits.MAX_TOKENS),
        "temperature": asked.temperature,
        "logprobs": (asked.top_logprobs or 0) if logprobs else None,
        "form": form,
        "sampling": sampling,
    }


def wants_logprobs(asked: ResponsesRequest) -> bool:
    return "message.output_text.logprobs" in (asked.include or ())


def functions_of(asked: ResponsesRequest) -> list[Tool]:
    """The tools, as OpenAI's chat has them."""
    return [_function(tool, f"tools[{number}]") for number, tool in enumerate(asked.tools or ())]


def choice_of(asked: ResponsesRequest) -> str | dict[str, Any]:
    """As OpenAI's chat has it."""
    match asked.tool_choice:
        case Named(name):
            return {"type": "function", "function": {"name": name}}
        case Allowed(mode, tools):
            named = [{"type": "function", "function": {"name": tool.name}} for tool in tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
        case None:
            return "auto"
        case str() as choice:
            return choice


def _function(tool: GivenTool, field: str) -> Tool:
    if tool.type != "function":
        raise FieldError(f"{field}.type", f"{field}.type: tools of type {tool.type!r} are not there, only functions")
    if not tool.name:
        raise FieldError(f"{field}.name", f"{field}.name: is missing")
    parameters = bounded(tool.parameters or {}, f"{field}.parameters")
    told = {"name": tool.name, "description": tool.description or "", "parameters": parameters}
    return {"type": "function", "function": told}


def _format(text: TextConfig | None) -> dict[str, Any]:
    match text.format if text is not None else None:
        case SchemaFormat() as wanted:
            return {"json_schema": bounded_schema(wanted.schema, "text.format.schema")}
        case ObjectFormat():
            return {"json_schema": '{"type":"object"}'}
    return {}


def _add(turns: Turns, item: dict[str, Any], field: str) -> None:
    match item.get("type", "message"):
        case "message":
            message = _read(item, Message, field)
            turns.say("system" if message.role == "developer" else message.role, _text(message.content))
        case "function_call":
            call = _read(item, FunctionCall, field)
            turns.call(call.call_id, call.name, call.arguments)
        case "function_call_output":
            output = _read(item, FunctionCallOutput, field)
            if output.call_id not in turns.calls:
                field = f"{field}.call_id"
                raise FieldError(field, f"{field}: no function_call before it has the call_id {output.call_id[:80]!r}")
            turns.result(output.call_id, _text(output.output))
        case other:
            text = f"{field}.type: items of type {str(other)[:80]!r} cannot be read here"
            raise FieldError(f"{field}.type", f"{text}; message, function_call and function_call_output can")


def _text(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)


def _read(item: dict[str, Any], kind: type[T], field: str) -> T:
    try:
        return msgspec.convert(item, kind)
    except msgspec.ValidationError as error:
        found = unread(error)
        path = f"{field}.{found.field}" if found.field else field
        raise FieldError(path, f"{path}: {str(error).partition(' - at `')[0]}") from error
