"""The answers of each API, streamed and whole, as recorded in `golden/api_answers.json`.

python -m tests.unit.test_api_answers        record it again, after an intended change
python -m tests.unit.test_api_answers NAME   print one answer
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llambo.gateway.answers.api import Parsed, encode
from llambo.gateway.answers.api_errors import StatusError, error_body
from llambo.gateway.answers.feed import FeedTokens
from llambo.gateway.answers.rendering import Rendering
from llambo.gateway.answers.unread import Lead, Unread
from llambo.gateway.apis import anthropic_messages, openai_chat, openai_completions
from llambo.mesh.client.answer_stream import Answer, Piece
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import TRAITS, Code, LlamboError
from llambo.mesh.wire.tokens import Logprob, TopToken
from tests.unit.gateway_bench import CALL, HEAD, read, ready

#: Digests: the answers themselves would make the file too long to read.
RECORDED = Path(__file__).parent / "golden" / "api_answers.json"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
USER = {"role": "user", "content": "hi"}
#: Requests, by API.
BODIES: dict[str, dict[str, dict[str, Any]]] = {
    "chat": {
        "plain": {"messages": [USER]},
        "usage": {"messages": [USER], "stream_options": {"include_usage": True}, "max_tokens": 9},
        "logprobs": {"messages": [USER], "logprobs": True, "top_logprobs": 1},
        "tools": {"messages": [USER], "tools": [FUNCTION]},
        "two": {"messages": [USER], "n": 2},
    },
    "completions": {
        "plain": {"prompt": "once"},
        "usage": {"prompt": "once", "stream_options": {"include_usage": True}},
        "logprobs": {"prompt": "once", "logprobs": 1},
        "echo": {"prompt": ["once", "upon"], "echo": True},
        "two": {"prompt": "once", "n": 2},
    },
    "messages": {
        "plain": {"messages": [USER], "max_tokens": 9},
        "tools": {"messages": [USER], "max_tokens": 9, "tools": [{"name": "weather", "input_schema": PARAMETERS}]},
    },
    "responses": {
        "plain": {"input": "hi", "instructions": "be brief", "metadata": {"a": "b"}},
        "logprobs": {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 1},
        "tools": {"input": "hi", "tools": [{"type": "function", "name": "weather", "parameters": PARAMETERS}]},
    },
}  # fmt: skip
#: Answers: the tokens of each choice, why it ended, and the stop string.
FEEDS: dict[str, tuple[list[list[bytes]], m.Reason, str]] = {
    "text": ([[b"Hel", b"", b"lo ", b"w\xc3\xb6rld"]], "stop", ""),
    "stopped": ([[b"Hello"]], "stop", "##"),
    "cut": ([[b"Hel", b"lo"]], "length", ""),
    "full": ([[b"a"] * 9], "length", ""),
    "late": ([[b"Hel"]], "deadline", ""),
    "cancelled": ([[b"Hel"]], "cancelled", ""),
    "split character": ([[b"caf\xc3", b"\xa9", b" \xe2\x82"]], "stop", ""),
    "empty": ([[]], "stop", ""),
    "blank": ([[b" ", b"\n"]], "stop", ""),
    "call": ([[CALL[:30].encode(), CALL[30:50].encode(), CALL[50:].encode()]], "stop", ""),
    "text and calls": ([[b"Well. ", CALL.encode(), b"\n", CALL.encode(), b" so"]], "stop", ""),
    "call cut in its arguments": ([[b"Well. ", CALL[:50].encode()]], "length", ""),
    "call cut in its head": ([[b"Well. ", CALL[:25].encode()]], "length", ""),
    "no call": ([[b"<tool_call>", b"nothing", b" of that <tool_"]], "stop", ""),
    "two choices": ([[b"Hel", b"lo"], [b"By", b"e"]], "stop", ""),
}  # fmt: skip


#: As when the answers were recorded: the hint of a code may be reworded.
HINT = "look at the worker's log; `llambo why ID` tells what happened"


class ScriptedFeed:
    """What a rendering needs of a feed."""

    def __init__(self, choices: list[list[bytes]], reason: m.Reason, stop: str, *, logprobs: bool) -> None:
        self.id, self.created, self.head = HEAD.id, HEAD.created, HEAD
        self.error: LlamboError | None = None
        self.failed_before_begin = None
        self.begun = self.over = True
        self.requests = ["" for _ in choices]
        self.tokens = FeedTokens()
        self.lead = Lead(Unread(0))
        self.answers: dict[int, Answer] = {}
        for choice, pieces in enumerate(choices):
            likely: list[Logprob | None] = []
            for number, piece in enumerate(pieces):
                each = Logprob(-0.5 * number, [TopToken(number, piece, -0.25)])
                likely += [each] * logprobs
                self.tokens.extend(choice, Piece("", [number], number, [each] * logprobs, [piece]))
            self.answers[choice] = Answer(
                b"".join(pieces).decode(errors="replace"), list(range(len(pieces))), reason,
                m.Usage(10, 4, 1.5, 2.25), f"w{choice}", 1, f"{choice}" * 32, 3, likely, pieces if logprobs else [],
                stop,
            )  # fmt: skip
            self.tokens.complete(choice)

    def all_answers(self) -> list[Answer]:
        return list(self.answers.values())


def parsed(api: str, body: dict[str, Any]) -> Parsed:
    given = {"model": "tiny", **body}
    match api:
        case "chat":
            return openai_chat.parse(read(openai_chat.ChatRequest, given), 64)
        case "completions":
            asked = read(openai_completions.CompletionRequest, given)
            prompts = [str(each) for each in openai_completions.inputs_of(asked)]
            return openai_completions.parse(asked, prompts, 64)
        case "messages":
            return anthropic_messages.parse(read(anthropic_messages.MessagesRequest, given))
        case _:
            return ready(**given)


def streamed(one: Parsed, feed: Any) -> str:
    rendering = Rendering(feed, one.renderer)
    out = b""
    while not rendering.finished:
        out += rendering.server_sent_events()
    lines = [line.partition("data: ") for line in out.decode().splitlines()]
    return "\n".join(
        f"{name}data: {_sorted(data)}" if data.startswith("{") else f"{name}{data}" for name, _, data in lines
    )


def _sorted(data: str | bytes) -> str:
    """The order of fields does not matter."""
    return json.dumps(json.loads(data), sort_keys=True, ensure_ascii=False)


def whole(one: Parsed, feed: Any) -> str:
    rendering = Rendering(feed, one.renderer)
    while not rendering.finished:
        rendering.events()
    return _sorted(encode(rendering.body()))


def answers() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for api, bodies in BODIES.items():
        for name, body in bodies.items():
            for feed_name, script in FEEDS.items():
                if (len(script[0]) > 1) != (name in ("two", "echo")):
                    continue
                feed = ScriptedFeed(*script, logprobs=name == "logprobs")
                found[f"{api}, {name}: {feed_name}"] = {
                    "stream": streamed(parsed(api, body), feed),
                    "whole": whole(parsed(api, body), feed),
                }
            broken = ScriptedFeed([[b"Hel"]], "stop", "", logprobs=False)
            broken.error = LlamboError(Code.ENGINE_FAILED, "it died", hint=HINT)
            found[f"{api}, {name}: broken"] = {"stream": streamed(parsed(api, body), broken)}
    return found


ANSWERS = answers()


def digests(name: str) -> dict[str, str]:
    return {kind: hashlib.sha256(text.encode()).hexdigest()[:16] for kind, text in ANSWERS[name].items()}


@pytest.mark.parametrize("code", sorted({*Code} - {Code.NAME_TAKEN}))  # which only a worker gets
def test_a_hint_over_http_names_no_option_of_a_command(code: Code) -> None:
    error = LlamboError(code, f"what happened; {TRAITS[code].hint}")
    shown = error_body(error, "openai")["error"]
    assert shown["message"] == "what happened"
    assert "--" not in shown["hint"] and "start one with" not in shown["hint"]


def test_a_path_that_does_not_exist_has_no_field_to_correct() -> None:
    assert error_body(StatusError(404, "not found"), "openai")["error"]["hint"] == "GET /openapi.json lists the paths"


def test_there_is_an_answer_for_each_recorded_one() -> None:
    assert ANSWERS.keys() == json.loads(RECORDED.read_text(encoding="utf-8")).keys()
    assert len(ANSWERS) > 100


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_the_recorded_one(name: str) -> None:
    assert digests(name) == json.loads(RECORDED.read_text(encoding="utf-8"))[name]


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        print("\n".join(ANSWERS[chosen].values()))
    if len(sys.argv) == 1:
        RECORDED.write_text(json.dumps({name: digests(name) for name in ANSWERS}, indent=1) + "\n", encoding="utf-8")
