"""Anthropic's `/v1/messages`: what it answers, whole or as events.

    message_start
    content_block_start, content_block_delta, ..., content_block_stop      for each text and each call
    message_delta                                                          why it ended, and what it cost
    message_stop

A `ping` comes after the first block has begun. What a prompt cost is known at the end only, so the `usage` of
`message_start` is zero, and that of `message_delta` is all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from llambo.gateway.asking import About, Event, Token, encode
from llambo.gateway.openai_common import story
from llambo.gateway.problems import body
from llambo.gateway.spoken import Parser, deltas_of, parser_of
from llambo.gateway.tool_calls import Arguments, Begun, Content, Delta, Ended
from llambo.mesh.client_stream import Answer
from llambo.mesh.errors import LlamboError

PREFIX = "toolu_"


class MessagesRenderer:
    """`tools`: the answer may have calls in it. `max_tokens`: as many as were asked for."""

    def __init__(self, *, tools: bool, max_tokens: int) -> None:
        self._tools, self._max_tokens = tools, max_tokens
        self._parser: Parser = parser_of(False, "", PREFIX)
        #: Blocks so far, and the type of the last one if it is open.
        self._blocks = 0
        self._open = ""
        self._called = False

    def begin(self, about: About) -> Iterable[Event]:
        self._parser = parser_of(self._tools, about.id, PREFIX)
        message = {**_head(about), "content": [], "stop_reason": None, "stop_sequence": None,
                   "usage": {"input_tokens": 0, "output_tokens": 0}}  # fmt: skip
        return [_event("message_start", message=message)]

    def token(self, token: Token) -> Iterable[Event]:
        return self._tell(self._parser.feed(token.text))

    def end(self, choice: int, answer: Answer) -> Iterable[Event]:
        return [*self._tell(self._parser.finish()), *self._close()]

    def done(self, answers: list[Answer]) -> Iterable[Event]:
        answer = answers[0]
        end = ending(answer, self._called, self._max_tokens)
        yield _event("message_delta", delta=end, usage=usage(answer), llambo=story(answers))
        yield _event("message_stop")

    def failed(self, error: LlamboError) -> Iterable[Event]:
        return [Event(encode(body(error, "anthropic")), "error")]

    def _tell(self, deltas: list[Delta]) -> list[Event]:
        events: list[Event] = []
        for delta in deltas:
            match delta:
                case Content(text):
                    if self._open != "text":
                        events += [*self._close(), *self._begin({"type": "text", "text": ""})]
                    events.append(self._delta({"type": "text_delta", "text": text}))
                case Begun():
                    self._called = True
                    events += [*self._close(), *self._begin(_tool_use(delta, {}))]
                case Arguments(_, text):
                    events.append(self._delta({"type": "input_json_delta", "partial_json": text}))
                case Ended():
                    events += self._close()
        return events

    def _begin(self, block: dict[str, Any]) -> list[Event]:
        self._open = block["type"]
        self._blocks += 1
        begun = _event("content_block_start", index=self._blocks - 1, content_block=block)
        return [begun, _event("ping")] if self._blocks == 1 else [begun]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _close(self) -> list[Event]:
        if not self._open:
            return []
        self._open = ""
        return [_event("content_block_stop", index=self._blocks - 1)]


def whole(about: About, answer: Answer, *, tools: bool, max_tokens: int) -> dict[str, Any]:
    content = _blocks(deltas_of(answer.text, tools, about.id, PREFIX))
    called = any(block["type"] == "tool_use" for block in content)
    end = ending(answer, called, max_tokens)
    return {**_head(about), "content": content, **end, "usage": usage(answer), "llambo": story([answer])}


def ending(answer: Answer, called: bool, max_tokens: int) -> dict[str, Any]:
    """This API knows no deadlines: what ran out of time was cut, like what ran out of tokens."""
    if answer.stop:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop}
    if answer.reason == "stop":
        reason = "tool_use" if called else "end_turn"
    elif answer.reason == "length" and len(answer.ids) < max_tokens:
        reason = "model_context_window_exceeded"
    else:
        reason = "max_tokens"
    return {"stop_reason": reason, "stop_sequence": None}


def usage(answer: Answer) -> dict[str, int]:
    """Here `input_tokens` are those that had to be computed; the rest of the prompt was in a cache."""
    cached = answer.usage.cached_tokens
    return {
        "input_tokens": max(0, answer.usage.prompt_tokens - cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": len(answer.ids),
    }


def _blocks(deltas: list[Delta]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    arguments: list[str] = []
    for delta in deltas:
        match delta:
            case Content(text):
                if not blocks or blocks[-1]["type"] != "text":
                    blocks.append({"type": "text", "text": ""})
                blocks[-1]["text"] += text
            case Begun():
                arguments = []
                blocks.append(_tool_use(delta, {}))
            case Arguments(_, text):
                arguments.append(text)
            case Ended(_, whole):
                blocks[-1]["input"] = _object("".join(arguments)) if whole else {}
    return blocks


def _object(text: str) -> dict[str, Any]:
    """The arguments of a call. What the model got wrong is shown as what it is."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return {"_unreadable": text}


def _tool_use(begun: Begun, given: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": begun.id, "name": begun.name, "input": given}


def _head(about: About) -> dict[str, Any]:
    return {"id": f"msg_{about.id}", "type": "message", "role": "assistant", "model": about.model}


def _event(kind: str, **fields: Any) -> Event:
    return Event(encode({"type": kind, **fields}), kind)
