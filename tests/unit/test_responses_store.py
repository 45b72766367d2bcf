"""Stored responses: continued, fetched, deleted, and bounded."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llambo.gateway.answers.api_errors import FieldError
from llambo.gateway.apis.response_store import ResponseStore
from llambo.mesh.wire.errors import Code, LlamboError
from tests.unit.gateway_bench import CALL, HEAD, answer, events, payloads, ready, tokens_of
from tests.unit.gateway_bench import whole as whole_body

WEATHER = {"type": "function", "name": "weather", "description": "of a city", "parameters": {"type": "object"}}
ID = f"resp_{HEAD.id}"


def test_a_conversation_goes_on_by_the_id_of_its_last_response() -> None:
    store = ResponseStore()
    body = whole_body(ready(store, "alice", tools=[WEATHER], instructions="be brief"), answer(f"I look. {CALL}"))
    call = body["output"][1]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
    following = ready(store, "alice", previous_response_id=ID, input=[result])
    assert json.loads(following.submission.prompt)["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "I look. ", "tool_calls": [
            {"id": call["call_id"], "type": "function",
             "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
        {"role": "tool", "tool_call_id": call["call_id"], "content": "rain"},
    ]  # fmt: skip
    # and no other identity can use it
    with pytest.raises(FieldError, match="previous_response_id"):
        ready(store, "bob", previous_response_id=ID)


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_answered_is_kept_unless_it_shall_not_be(stream: bool) -> None:
    for wanted in (None, True, False):
        store = ResponseStore()
        parsed = ready(store, "alice", stream=stream, store=wanted)
        if stream:
            body = payloads(events(parsed, tokens_of("x"), answer("x")))[-1]["response"]
            # sent twice, it is stored once
            events(ready(store, "alice", stream=stream, store=wanted), tokens_of("x"), answer("x"))
        else:
            body = whole_body(parsed, answer("x"))
        assert len(store) == (wanted is not False)
        if wanted is not False:
            assert json.loads(store.body("alice", ID)) == body


def body_of(number: int, size: int = 0) -> dict[str, Any]:
    return {"id": f"resp_{number}", "filling": "x" * size}


def test_the_oldest_go_first() -> None:
    store = ResponseStore(responses=3)
    for number in range(5):
        store.put("alice", body_of(number), [])
    assert len(store) == 3
    for number in range(2):
        with pytest.raises(LlamboError) as error:
            store.body("alice", f"resp_{number}")
        assert error.value.code is Code.UNKNOWN_REQUEST
    assert json.loads(store.body("alice", "resp_4")) == body_of(4)


def test_bytes_are_bounded_for_each_and_for_all() -> None:
    store = ResponseStore(bytes=1_000, all_bytes=1_500)
    for number in range(10):
        store.put("alice", body_of(number, 300), [])
    assert 600 < store.size <= 1_000
    mine = len(store)
    for number in range(10):
        store.put("bob", body_of(number, 300), [])
    # Bob evicts the oldest response of the largest user, and not all of alice's.
    assert store.size <= 1_500
    assert mine > 1 and store.body("alice", "resp_9") and store.body("bob", "resp_9")
    # A response that is too large by itself evicts nothing.
    before = len(store)
    store.put("bob", body_of(11, 2_000), [])
    assert len(store) == before


def test_what_is_deleted_is_gone_and_only_for_its_owner() -> None:
    store = ResponseStore()
    store.put("alice", body_of(1), [])
    with pytest.raises(LlamboError):
        store.delete("bob", "resp_1")
    assert store.delete("alice", "resp_1") == {"id": "resp_1", "object": "response", "deleted": True}
    assert (len(store), store.size) == (0, 0)
    with pytest.raises(LlamboError):
        store.delete("alice", "resp_1")
