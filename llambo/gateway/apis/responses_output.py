"""OpenAI's `/v1/responses`: what it answers.

A response has items: a message for each text, a function call for each call. `Items` makes them of what the model
says, one after the other, and tells of each step; a stream is made of these steps, and a whole body of what they
come to.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import msgspec

from llambo.gateway.answers.asking import About
from llambo.gateway.apis.common_fields import Turns
from llambo.gateway.apis.openai_common import story
from llambo.gateway.apis.openai_common import usage as usage_of
from llambo.gateway.apis.responses_input import ResponsesRequest, TextFormat
from llambo.gateway.apis.tool_calls import Arguments, Begun, Content, Delta, Ended
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.wire.errors import Code, LlamboError

PREFIX = "call_"
#: How OpenAI calls what went wrong with a response that had begun; anything else is an error of the server.
_FAILED_AS = {
    Code.OVER_LIMIT: "rate_limit_exceeded",
    Code.BUSY: "rate_limit_exceeded",
    Code.BAD_REQUEST: "invalid_prompt",
    Code.TOO_LONG: "invalid_prompt",
}

Step = tuple[str, dict[str, Any]]


class Items:
    """The items of one response, made one after the other. Each method gives the steps: names and fields of events."""

    def __init__(self, id: str) -> None:
        self._id = id
        self.done: list[dict[str, Any]] = []
        self._item: dict[str, Any] = {}
        self._said: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def add(self, deltas: list[Delta], logprobs: list[dict[str, Any]]) -> Iterator[Step]:
        """`logprobs` belong to the text among them."""
        for delta in deltas:
            match delta:
                case Content(text):
                    yield from self._text(text, logprobs)
                case Begun():
                    yield from self.close("completed")
                    yield from self._begin_call(delta)
                case Arguments(_, text):
                    self._said.append(text)
                    yield "response.function_call_arguments.delta", {**self._place(), "delta": text}
                case Ended(_, whole):
                    yield from self.close("completed" if whole else "incomplete")

    def close(self, status: str) -> Iterator[Step]:
        """The item that is under way is complete, or was cut."""
        if not self._item:
            return
        text = "".join(self._said)
        if self._item["type"] == "message":
            part = _part(text, self._logprobs)
            told = {"text": text, "logprobs": self._logprobs}
            yield "response.output_text.done", {**self._place(), "content_index": 0, **told}
            yield "response.content_part.done", {**self._place(), "content_index": 0, "part": part}
            self._item["content"] = [part]
        else:
            told = {"name": self._item["name"], "arguments": text}
            yield "response.function_call_arguments.done", {**self._place(), **told}
            self._item["arguments"] = text
        item = {**self._item, "status": status}
        yield "response.output_item.done", {"output_index": len(self.done), "item": item}
        self.done.append(item)
        self._item, self._said, self._logprobs = {}, [], []

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Step]:
        if not self._item:
            id = f"msg_{self._id}_{len(self.done)}"
            yield self._begin({"id": id, "type": "message", "role": "assistant", "content": []})
            yield "response.content_part.added", {**self._place(), "content_index": 0, "part": _part("", [])}
        self._said.append(text)
        self._logprobs += logprobs
        told = {"content_index": 0, "delta": text, "logprobs": logprobs}
        yield "response.output_text.delta", {**self._place(), **told}

    def _begin_call(self, begun: Begun) -> Iterator[Step]:
        id = f"fc_{self._id}_{len(self.done)}"
        called = {"call_id": begun.id, "name": begun.name, "arguments": ""}
        yield self._begin({"id": id, "type": "function_call", **called})

    def _begin(self, item: dict[str, Any]) -> Step:
        self._item = item
        told = {**item, "status": "in_progress"}
        return "response.output_item.added", {"output_index": len(self.done), "item": told}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item["id"], "output_index": len(self.done)}


def response(
    asked: ResponsesRequest,
    about: About,
    status: str,
    output: list[dict[str, Any]],
    *,
    answer: Answer | None = None,
    error: LlamboError | None = None,
) -> dict[str, Any]:
    """The response as it is now, with what was asked."""
    text = asked.text.format if asked.text is not None and asked.text.format is not None else TextFormat()
    cost: dict[str, Any] = {"usage": None} if answer is None else {"usage": usage(answer), "llambo": story([answer])}
    return {
        "id": f"resp_{about.id}",
        "object": "response",
        "created_at": about.created,
        "status": status,
        "background": False,
        "error": None if error is None else _error(error),
        "incomplete_details": {"reason": _why(answer)} if answer is not None and status == "incomplete" else None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "model": about.model,
        "output": output,
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "store": asked.store is not False,
        "temperature": asked.temperature,
        "text": {"format": msgspec.to_builtins(text)},
        "tool_choice": msgspec.to_builtins(asked.tool_choice or "auto"),
        "tools": [msgspec.to_builtins(tool) for tool in asked.tools or ()],
        "top_logprobs": asked.top_logprobs,
        "top_p": asked.top_p,
        "truncation": "disabled",
        **cost,
    }


def status_of(answer: Answer) -> str:
    return "completed" if answer.reason == "stop" else "incomplete"


def usage(answer: Answer) -> dict[str, Any]:
    told = usage_of([answer])
    return {
        "input_tokens": told["prompt_tokens"],
        "input_tokens_details": {**told["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": told["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": told["total_tokens"],
    }


def remembered(said: list[dict[str, Any]], output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation so far, for the one that follows."""
    turns = Turns(deepcopy(said))
    for item in output:
        if item["type"] == "message":
            turns.say("assistant", item["content"][0]["text"])
        elif item["status"] == "completed":
            # One that was cut has no arguments that could be read.
            turns.call(item["call_id"], item["name"], item["arguments"])
    return turns.messages


def _why(answer: Answer) -> str | None:
    """OpenAI knows of no deadline and of no context that is full before the maximum: both cut like a maximum."""
    return "max_output_tokens" if answer.reason in ("length", "deadline") else None


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _error(error: LlamboError) -> dict[str, Any]:
    return {"code": _FAILED_AS.get(error.code, "server_error"), "message": error.text}
