"""Anthropic's messages: what is asked of the mesh, and what is answered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llambo.gateway.answers.api_errors import FieldError, error_body
from llambo.gateway.apis.anthropic_messages import CountRequest, MessagesRequest, parse
from llambo.mesh.client.request_options import build_request
from llambo.mesh.wire.errors import Code, LlamboError
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
    read,
    tokens_of,
)
from tests.unit.gateway_bench import whole as whole_body

WEATHER = {"name": "weather", "description": "of a city", "input_schema": {"type": "object"}}


def user(content: Any = "hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def asked(**more: Any) -> MessagesRequest:
    return read(MessagesRequest, {"model": "tiny", "max_tokens": 9, "messages": [user()], **more})


def prompt(**more: Any) -> dict[str, Any]:
    return prompt_of(parse(asked(**more)))


def messages(*given: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = prompt(messages=list(given), **more)["messages"]
    return found


def refused(body: dict[str, Any]) -> FieldError:
    with pytest.raises(FieldError) as error:
        parse(read(MessagesRequest, {"model": "tiny", "max_tokens": 9, "messages": [user()], **body}))
    return error.value


# --- what is asked -------------------------------------------------------------------------------------------


def test_everything_that_is_understood_gets_to_the_mesh() -> None:
    parsed = parse(
        asked(stop_sequences=["##"], temperature=0.5, top_p=0.9, top_k=3, seed=-1, priority="batch", deadline_ms=500)
    )
    assert parsed.submission.options == {
        "model": "tiny", "max_tokens": 9, "temperature": 0.5, "stop": ["##"], "form": "messages", "seed": 2**63 - 1,
        "priority": "batch", "deadline_ms": 500, "sampling": {"fit": True, "top_p": 0.9, "top_k": 3},
    }  # fmt: skip
    request, _ = build_request(b"\1" * 16, 1, parsed.submission.prompt, False, parsed.submission.options)
    assert request.max_tokens == 9
    assert parsed.submission.choices == 1
    assert not parsed.stream


def test_a_bound_beyond_what_the_mesh_counts_to_is_a_bound_still() -> None:
    assert parse(asked(max_tokens=1_000_000)).submission.options["max_tokens"] == 131_072


def test_unknown_fields_are_ignored() -> None:
    more = {"metadata": {"user_id": "x"}, "thinking": {"type": "enabled", "budget_tokens": 1024}, "no_such": 1}
    cached = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    assert parse(asked(**more)).submission == parse(asked(messages=[user([cached])])).submission


def test_text_and_blocks_are_the_same() -> None:
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages(user(blocks), system=blocks) == [
        {"role": "system", "content": "a\nb"}, {"role": "user", "content": "a\nb"}
    ]  # fmt: skip
    assert messages(user("x"), system="be brief")[0] == {"role": "system", "content": "be brief"}


def test_turns_of_one_role_are_one_turn() -> None:
    sent = messages(user("a"), user("b"), {"role": "assistant", "content": "c"}, user("d"))
    assert [message["content"] for message in sent] == ["a\n\nb", "c", "d"]


def test_calls_and_their_results() -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "rain"}]}
    sent = messages(
        user("and Oslo?"),
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use, {**use, "id": "toolu_2"}]},
        user([result, {**result, "tool_use_id": "toolu_2", "content": "no such city", "is_error": True},
              {"type": "text", "text": "well?"}]),
        tools=[WEATHER],
    )  # fmt: skip
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
    assert sent == [
        {"role": "user", "content": "and Oslo?"},
        {"role": "assistant", "content": "I look.",
         "tool_calls": [{"id": "toolu_1", **call}, {"id": "toolu_2", **call}]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no such city"},
        {"role": "user", "content": "well?"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (None, {"tool_choice": "auto"}),
        ({"type": "auto", "disable_parallel_tool_use": True}, {"tool_choice": "auto", "parallel_tool_calls": False}),
        ({"type": "any", "disable_parallel_tool_use": False},
         {"tool_choice": "required", "parallel_tool_calls": True}),
        ({"type": "tool", "name": "weather"}, {"tool_choice": "required", "tool_names": ["weather"]}),
        ({"type": "none"}, {}),
    ],
)  # fmt: skip
def test_choices(choice: Any, wanted: dict[str, Any]) -> None:
    more = {"tools": [WEATHER], **({"tool_choice": choice} if choice else {})}
    assert parse(asked(**more)).submission.options["sampling"] == {"fit": True, **wanted}
    assert prompt(**more).get("tools") == ([{"type": "function", "function": FUNCTION}] if wanted else None)


def test_a_schema_for_the_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"format": {"type": "json_schema", "schema": schema}}
    sampling = parse(asked(output_config=wanted)).submission.options["sampling"]
    assert sampling is not None and json.loads(sampling["json_schema"]) == schema
    # A call, or else what the schema says.
    both = parse(asked(output_config=wanted, tools=[WEATHER])).submission.options["sampling"]
    assert both is not None and (both["tool_choice"], "json_schema" in both) == ("auto", True)
    long = {"format": {"type": "json_schema", "schema": {"title": "x" * 20_000}}}
    assert refused({"output_config": long}).field == "output_config.format.schema"


DEEP: dict[str, Any] = {}
for _ in range(100):
    DEEP = {"properties": DEEP}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stream": 1}, "stream"),
        ({"system": [IMAGE]}, "system[0].type"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [user([IMAGE])]}, "messages[0].content[0].type"),
        ({"messages": [user([{"type": "thinking", "thinking": "", "signature": ""}])]}, "messages[0].content[0].type"),
        ({"messages": [user([{"type": "text"}])]}, "messages[0].content[0]"),
        ({"messages": [user([])]}, "messages"),
        ({"messages": [user(), {"role": "assistant", "content": "The best"}]}, "messages[1].role"),
        ({"messages": [user([{"type": "tool_use", "id": "a", "name": "b", "input": {}}])]},
         "messages[0].content[0].type"),
        ({"messages": [user([{"type": "tool_result", "tool_use_id": "a"}])]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [user([{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}])]},
         "messages[0].content[0].content[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "x", "input_schema": DEEP}]}, "tools[0].input_schema"),
        ({"output_config": {"format": {"type": "json_schema", "schema": DEEP}}}, "output_config.format.schema"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": DEEP}]},
                       user()]}, "messages[0].content[0].input"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "all"}}, "tool_choice.type"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_its_name(body: dict[str, Any], field: str) -> None:
    error = refused(body)
    assert error.field == field
    assert error.text.startswith(f"{field}: ")


@pytest.mark.parametrize(
    "body", [{"tools": [WEATHER, WEATHER]}, {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}]
)
def test_tools_that_do_not_go_together_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(LlamboError, match=r"^tool") as error:
        parse(asked(**body))
    assert error.value.code is Code.BAD_REQUEST


def test_max_tokens_is_needed_for_an_answer_and_not_for_a_count() -> None:
    with pytest.raises(FieldError, match="max_tokens"):
        read(MessagesRequest, {"messages": [user()]})
    read(CountRequest, {"messages": [user()]})


# --- what is answered ----------------------------------------------------------------------------------------


def streamed(*texts: str, **more: Any) -> list[dict[str, Any]]:
    return payloads(events(parse(asked(stream=True, **more)), tokens_of(*texts), answer("".join(texts))))


def test_the_events_of_a_text() -> None:
    assert streamed("Hel", "", "lo") == [
        {"type": "message_start", "message": {
            "id": f"msg_{HEAD.id}", "type": "message", "role": "assistant", "model": "tiny", "content": [],
            "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 0, "output_tokens": 0}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None},
         "usage": {"input_tokens": 6, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4,
                   "output_tokens": 7},
         "llambo": {"requests": [HEAD.id], "workers": ["w0"], "moves": 1, "queued_ms": 3, "prefill_ms": 1.0,
                    "decode_ms": 2.0}},
        {"type": "message_stop"},
    ]  # fmt: skip


def test_the_events_of_text_and_calls() -> None:
    found = streamed("Well. ", CALL[:30], CALL[30:], "\n" + CALL, tools=[WEATHER])
    assert [event["type"] for event in found] == [
        "message_start",
        "content_block_start", "ping", "content_block_delta", "content_block_stop",
        "content_block_start", "content_block_delta", "content_block_stop",
        "content_block_start", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    begun = [event for event in found if event["type"] == "content_block_start"]
    assert [event["index"] for event in begun] == [0, 1, 2]
    ids = [event["content_block"]["id"] for event in begun[1:]]
    assert len(set(ids)) == 2 and all(id.startswith("toolu_") for id in ids)
    assert [event["content_block"] for event in begun[1:]] == [
        {"type": "tool_use", "id": id, "name": "weather", "input": {}} for id in ids
    ]
    assert found[6]["delta"] == {"type": "input_json_delta", "partial_json": '{"city": "Oslo"}'}
    assert found[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


def test_without_tools_a_call_is_text() -> None:
    found = streamed(CALL)
    assert found[3]["delta"] == {"type": "text_delta", "text": CALL}
    assert found[-2]["delta"]["stop_reason"] == "end_turn"


def test_an_empty_answer_has_no_block() -> None:
    assert [event["type"] for event in streamed()] == ["message_start", "message_delta", "message_stop"]
    assert whole_body(parse(asked()), answer(""))["content"] == []


@pytest.mark.parametrize(
    ("reason", "stop", "tokens", "wanted"),
    [
        ("stop", "", 5, ("end_turn", None)),
        ("stop", "##", 5, ("stop_sequence", "##")),
        ("length", "", 9, ("max_tokens", None)),
        ("length", "", 5, ("model_context_window_exceeded", None)),
        ("deadline", "", 5, ("deadline", None)),
    ],
)
def test_why_it_ended(reason: Any, stop: str, tokens: int, wanted: tuple[str, str | None]) -> None:
    body = whole_body(parse(asked()), answer("x", reason, stop=stop, tokens=tokens))
    assert (body["stop_reason"], body["stop_sequence"]) == wanted


def test_a_call_that_was_cut_off_has_no_input() -> None:
    parsed = parse(asked(tools=[WEATHER]))
    body = whole_body(parsed, answer(CALL[:50], "length", tokens=9))
    assert [(block["type"], block.get("input")) for block in body["content"]] == [("tool_use", {})]
    assert body["stop_reason"] == "max_tokens"


def test_an_error_in_the_middle_is_the_last_event() -> None:
    renderer = parse(asked(stream=True)).renderer
    error = LlamboError(Code.ENGINE_FAILED, "it died")
    found = payloads([*renderer.begin(HEAD), *renderer.token(tokens_of("x")[0]), *renderer.failed(error)])
    assert found[-1] == error_body(error, "anthropic") == {
        "type": "error", "error": {"type": "api_error", "message": "it died", "retryable": False}
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_adds_up_to_the_whole_answer_and_can_be_repeated(text: str, seed: int) -> None:
    request = asked(stream=True, tools=[WEATHER])
    whole = answer(text)
    once, again = [events(parse(request), cut(text, seed), whole) for _ in range(2)]
    assert once == again
    blocks: list[dict[str, Any]] = []
    ended: dict[str, Any] = {}
    for event in payloads(once):
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append({**event["content_block"], "json": ""})
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1
                blocks[-1]["text" if "text" in event["delta"] else "json"] += (
                    event["delta"].get("text") or event["delta"].get("partial_json") or ""
                )
            case "message_delta":
                ended = {**event["delta"], "usage": event["usage"]}
    body = whole_body(parse(request), whole)
    for block in blocks:
        arguments = block.pop("json")
        if block["type"] == "tool_use" and text != CALL[:50]:
            block["input"] = json.loads(arguments)
    assert blocks == body["content"]
    assert ended == {name: body[name] for name in ended}
