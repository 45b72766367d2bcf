"""OpenAI's responses: what is asked of the mesh, what is answered, and what is remembered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llambo.gateway.answers.api import Token
from llambo.gateway.answers.api_errors import FieldError
from llambo.gateway.apis.response_store import ResponseStore
from llambo.mesh.client.request_options import build_request
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.tokens import Logprob, TopToken
from tests.unit.gateway_bench import (
    CALL,
    FUNCTION,
    HEAD,
    TEXTS,
    answer,
    cut,
    events,
    payloads,
    prompt_of,
    ready,
    tokens_of,
)
from tests.unit.gateway_bench import whole as whole_body

WEATHER = {"type": "function", "name": "weather", "description": "of a city", "parameters": {"type": "object"}}
ID = f"resp_{HEAD.id}"


def sampling(**body: Any) -> dict[str, Any]:
    return ready(**body).submission.options["sampling"] or {}


def prompt(store: ResponseStore | None = None, /, **body: Any) -> dict[str, Any]:
    return prompt_of(ready(store, **body))


def messages(*items: dict[str, Any], **body: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = prompt(input=list(items), **body)["messages"]
    return found


# --- what is asked -------------------------------------------------------------------------------------------


def test_everything_that_is_understood_gets_to_the_mesh() -> None:
    parsed = ready(
        max_output_tokens=5, temperature=1.5, top_p=0.9, seed=3, priority="batch", deadline_ms=500,
        include=["message.output_text.logprobs"], top_logprobs=2,
    )  # fmt: skip
    assert parsed.submission.options == {
        "model": "tiny", "max_tokens": 5, "temperature": 1.5, "logprobs": 2, "form": "messages", "seed": 3,
        "priority": "batch", "deadline_ms": 500, "sampling": {"fit": True, "top_p": 0.9},
    }  # fmt: skip
    request, _ = build_request(b"\1" * 16, 1, parsed.submission.prompt, False, parsed.submission.options)
    assert request.max_tokens == 5
    assert ready().submission.options["max_tokens"] == 2_048
    assert ready(max_output_tokens=1_000_000).submission.options["max_tokens"] == 131_072


def test_unknown_fields_are_ignored() -> None:
    more: dict[str, Any] = {
        "reasoning": {"effort": "low"},
        "service_tier": "auto",
        "user": "x",
        "background": False,
        "no_such": 1,
    }
    assert ready(**more).submission == ready().submission


def test_a_text_and_items_are_the_same() -> None:
    part = {"type": "input_text", "text": "hi"}
    for item in ({"role": "user", "content": "hi"}, {"type": "message", "role": "user", "content": [part]}):
        assert messages(item) == prompt()["messages"] == [{"role": "user", "content": "hi"}]


def test_instructions_are_what_the_model_reads_first() -> None:
    assert messages({"role": "developer", "content": "a"}, {"role": "user", "content": "b"}, instructions="c") == [
        {"role": "system", "content": "c"}, {"role": "system", "content": "a"}, {"role": "user", "content": "b"}
    ]  # fmt: skip


def test_calls_and_their_results() -> None:
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city":"Oslo"}'}
    result = {"type": "function_call_output", "call_id": "call_1", "output": "rain"}
    sent = messages(
        {"role": "user", "content": "and Oslo?"},
        {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {**call, "id": "fc_1", "status": "completed"},
        {**call, "call_id": "call_2"},
        result,
        {**result, "call_id": "call_2", "output": [{"type": "input_text", "text": "sun"}]},
        tools=[WEATHER],
    )  # fmt: skip
    function = {"type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
    assert sent == [
        {"role": "user", "content": "and Oslo?"},
        {"role": "assistant", "content": "I look.",
         "tool_calls": [{"id": "call_1", **function}, {"id": "call_2", **function}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": "sun"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, {"tool_choice": "auto"}),
        ({"tool_choice": "required", "parallel_tool_calls": False},
         {"tool_choice": "required", "parallel_tool_calls": False}),
        ({"tool_choice": {"type": "function", "name": "weather"}},
         {"tool_choice": "required", "tool_names": ["weather"]}),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}},
         {"tool_choice": "auto", "tool_names": ["weather"]}),
        ({"tool_choice": "none"}, {}),
    ],
)  # fmt: skip
def test_choices(more: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert sampling(tools=[WEATHER], **more) == {"fit": True, **wanted}
    offered = prompt(tools=[WEATHER], **more).get("tools")
    assert offered == ([{"type": "function", "function": FUNCTION}] if wanted else None)


def test_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    assert json.loads(sampling(text=wanted)["json_schema"]) == schema
    assert json.loads(sampling(text={"format": {"type": "json_object"}})["json_schema"]) == {"type": "object"}
    assert sampling(text={"format": {"type": "text"}, "verbosity": "low"}) == sampling()
    # and the answer repeats what was asked
    assert whole_body(ready(text=wanted), answer("{}"))["text"] == wanted


DEEP: dict[str, Any] = {}
for _ in range(100):
    DEEP = {"properties": DEEP}
CALLED = {"type": "function_call_output", "call_id": "call_1", "output": "rain"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"role": "narrator", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": 5}]}, "input[0].type"),
        ({"input": [CALLED]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b c", "arguments": ""}]}, "input[0].name"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"title": "x" * 20_000}}}},
         "text.format.schema"),
        ({"include": ["message.output_text.logprobs"], "tools": [WEATHER]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a", "parameters": DEEP}]}, "tools[0].parameters"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_its_name(body: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as error:
        ready(**body)
    assert error.value.field == field
    assert error.value.text.startswith(f"{field}: ")


# --- what is answered ----------------------------------------------------------------------------------------


def test_the_events_of_a_text() -> None:
    found = payloads(events(ready(stream=True), tokens_of("Hel", "", "lo"), answer("Hello")))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    id = f"msg_{HEAD.id}_0"
    place = {"item_id": id, "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    item = {"id": id, "type": "message", "role": "assistant"}
    bodies = [{name: event[name] for name in event.keys() - {"type", "sequence_number"}} for event in found]
    assert bodies[2:9] == [
        {"output_index": 0, "item": {**item, "status": "in_progress", "content": []}},
        {**place, "part": {**part, "text": ""}},
        {**place, "delta": "Hel", "logprobs": []},
        {**place, "delta": "lo", "logprobs": []},
        {**place, "text": "Hello", "logprobs": []},
        {**place, "part": part},
        {"output_index": 0, "item": {**item, "status": "completed", "content": [part]}},
    ]
    begun, ended = bodies[0]["response"], bodies[9]["response"]
    assert bodies[1]["response"] == begun
    assert (begun["id"], begun["status"], begun["output"], begun["usage"]) == (ID, "in_progress", [], None)
    assert (ended["id"], ended["status"], ended["output"]) == (ID, "completed", [bodies[8]["item"]])
    assert ended["usage"] == {
        "input_tokens": 10, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 17,
    }  # fmt: skip


def test_the_events_of_text_and_calls() -> None:
    parsed = ready(stream=True, tools=[WEATHER])
    found = payloads(
        events(parsed, tokens_of("Well. ", CALL[:30], CALL[30:], "\n" + CALL), answer(f"Well. {CALL}\n{CALL}"))
    )
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done",
        *call, *call, "completed",
    ]  # fmt: skip
    added, delta, done, whole = found[8:12]
    item = {"type": "function_call", "id": added["item"]["id"], "call_id": added["item"]["call_id"], "name": "weather"}
    assert added["item"] == {**item, "arguments": "", "status": "in_progress"}
    assert (delta["item_id"], delta["delta"]) == (item["id"], '{"city": "Oslo"}')
    assert (done["name"], done["arguments"]) == ("weather", '{"city": "Oslo"}')
    assert whole["item"] == {**item, "arguments": '{"city": "Oslo"}', "status": "completed"}
    assert [event["output_index"] for event in found if event["type"] == "response.output_item.done"] == [0, 1, 2]
    assert len({item["id"] for item in found[-1]["response"]["output"]}) == 3


@pytest.mark.parametrize(
    ("reason", "status", "why"),
    [("stop", "completed", None), ("length", "incomplete", {"reason": "max_output_tokens"}),
     ("deadline", "incomplete", {"reason": "deadline"}), ("cancelled", "incomplete", {"reason": "cancelled"})],
)  # fmt: skip
def test_how_it_ended(reason: Any, status: str, why: Any) -> None:
    body = whole_body(ready(), answer("x", reason))
    assert (body["status"], body["incomplete_details"], body["output"][0]["status"]) == (status, why, status)
    last = payloads(events(ready(stream=True), tokens_of("x"), answer("x", reason)))[-1]
    assert (last["type"], last["response"]["incomplete_details"]) == (f"response.{status}", why)


def test_a_call_that_was_cut_off_is_incomplete_and_not_gone_on_with() -> None:
    store = ResponseStore()
    body = whole_body(ready(store, tools=[WEATHER]), answer(CALL[:50], "length"))
    assert [(item["type"], item["status"]) for item in body["output"]] == [("function_call", "incomplete")]
    assert prompt(store, previous_response_id=ID)["messages"] == [
        {"role": "user", "content": "hi"}, {"role": "user", "content": "hi"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "known_as"),
    [(Code.ENGINE_FAILED, "server_error"), (Code.BUSY, "rate_limit_exceeded"), (Code.TOO_LONG, "invalid_prompt")],
)
def test_an_error_in_the_middle_is_the_last_event(code: Code, known_as: str) -> None:
    store = ResponseStore()
    renderer = ready(store, stream=True).renderer
    error = LlamboError(code, "it died")
    last = payloads([*renderer.begin(HEAD), *renderer.token(tokens_of("x")[0]), *renderer.failed(error)])[-1]
    assert (last["type"], last["sequence_number"]) == ("response.failed", 5)
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": known_as, "message": "it died", "retryable": error.retryable}
    assert len(store) == 0


def test_the_answer_says_what_was_asked() -> None:
    more: dict[str, Any] = {
        "instructions": "be brief", "max_output_tokens": 7, "metadata": {"a": "b"}, "temperature": 0.5, "top_p": 0.9,
        "store": False, "parallel_tool_calls": False, "tool_choice": {"type": "function", "name": "weather"},
    }  # fmt: skip
    body = whole_body(ready(tools=[WEATHER], **more), answer("x"))
    assert {name: body[name] for name in more} == more
    assert body["tools"] == [{**WEATHER, "strict": None}]
    assert (body["object"], body["model"], body["created_at"], body["error"]) == (
        "response",
        "tiny",
        1_700_000_000,
        None,
    )


def test_log_probabilities_come_with_their_text() -> None:
    likely = [Logprob(-0.5, [TopToken(1, b"a", -0.5)]), Logprob(-1.5)]
    more: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    tokens = [Token(0, "", 1, b"\xc3", likely[0]), Token(0, "é", 2, b"\xa9", likely[1])]
    whole = answer("é", logprobs=likely, pieces=[b"\xc3", b"\xa9"])
    found = payloads(events(ready(stream=True, **more), tokens, whole))
    deltas = [event for event in found if event["type"] == "response.output_text.delta"]
    assert [(event["delta"], event["logprobs"][0]["logprob"]) for event in deltas] == [("", -0.5), ("é", -1.5)]
    assert deltas[0]["logprobs"][0]["top_logprobs"][0]["token"] == "a"
    streamed = found[-1]["response"]["output"]
    assert streamed == whole_body(ready(**more), whole)["output"]
    assert [each["bytes"] for each in streamed[0]["content"][0]["logprobs"]] == [[0xC3], [0xA9]]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_adds_up_to_the_whole_answer_and_can_be_repeated(text: str, seed: int) -> None:
    whole = answer(text, "stop" if text != CALL[:50] else "length")
    more: dict[str, Any] = {"tools": [WEATHER], "stream": True}
    once, again = [events(ready(**more), cut(text, seed), whole) for _ in range(2)]
    assert once == again
    found = payloads(once)
    body = whole_body(ready(**more), whole)
    assert found[-1]["response"] == body
    items = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert items == body["output"]
    # The sum of the deltas is the text of the items
    texts: dict[str, str] = {}
    for event in found:
        if event["type"].endswith(".delta"):
            texts[event["item_id"]] = texts.get(event["item_id"], "") + event["delta"]
    assert texts == {
        item["id"]: item["content"][0]["text"] if item["type"] == "message" else item["arguments"] for item in items
    }
