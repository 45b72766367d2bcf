"""The official `anthropic` and `openai` packages against a gateway with SmolLM2 behind it.

The model is small: what it says is looked at only where it is sure to be right, or where a grammar sees to it. What
goes over the wire is checked against the packages' own types, which the packages themselves do not do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel, TypeAdapter

from llambo.testing.mesh import Mesh
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import LlamaOptions, WorkerConfig
from tests.integration.gateway_process import GatewayProcess, data_of, events

if TYPE_CHECKING:  # importing the packages takes seconds, and each test process collects this file
    import anthropic
    import openai
    from anthropic.types import Message
    from openai.types.responses import Response

WORKER = WorkerConfig(engine="llama", model="smollm2", llama=LlamaOptions(slots=2, context=1024, threads=1))
MODEL = "smollm2"
CAPITAL = "What is the capital of France? Answer in one word."
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


class Trip(BaseModel):
    city: str
    days: int


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    with Mesh(1, worker=WORKER) as mesh, GatewayProcess(mesh.address) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def claude(gateway: GatewayProcess) -> Iterator[anthropic.Anthropic]:
    import anthropic

    with anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
        yield client


@pytest.fixture(scope="module")
def gpt(gateway: GatewayProcess) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
        yield client


# --- anthropic -----------------------------------------------------------------------------------------------


def say(text: str, **more: Any) -> dict[str, Any]:
    """The package has no name for a temperature any more, and the API still has."""
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "max_tokens": 16, "messages": messages, "extra_body": {"temperature": 0.0}, **more}


TOOL: dict[str, Any] = {"name": "forecast", "description": "The weather of a city.", "input_schema": SCHEMA}


def test_a_message(claude: anthropic.Anthropic) -> None:
    found = claude.messages.create(**say(CAPITAL))
    assert found.content[0].type == "text" and "Paris" in found.content[0].text
    assert (found.stop_reason, found.stop_sequence, found.model) == ("end_turn", None, MODEL)
    counted = claude.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": CAPITAL}])
    usage = found.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert 0 < usage.output_tokens <= 16


def test_a_message_as_a_stream(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(**say("Tell me a story.", system="You are a sailor."))
    with claude.messages.stream(**say("Tell me a story.", system="You are a sailor.")) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(texts) > 10
    assert final.content[0].type == "text" and final.content[0].text == "".join(texts)
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 16)
    assert final.usage.output_tokens == whole.usage.output_tokens
    # A prompt that was sent before is in the cache, and counted there.
    parts = [each.usage.input_tokens + (each.usage.cache_read_input_tokens or 0) for each in (whole, final)]
    assert parts[0] == parts[1]


def test_a_stop_sequence_is_reported(claude: anthropic.Anthropic) -> None:
    found = claude.messages.create(**say("Tell me a story.", stop_sequences=["zzz", "e"]))
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", "e")
    assert all(block.type == "text" and "e" not in block.text for block in found.content)


def test_a_message_with_a_schema(claude: anthropic.Anthropic) -> None:
    found = claude.messages.parse(**say("A trip to Rome.", max_tokens=60), output_format=Trip)
    assert isinstance(found.parsed_output, Trip)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_of_claude(claude: anthropic.Anthropic, stream: bool) -> None:
    more: dict[str, Any] = {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "forecast"}, "max_tokens": 60}
    question = say("What will the weather be in Oslo for two days?", **more)
    if stream:
        with claude.messages.stream(**question) as stream_of_events:
            found: Message = stream_of_events.get_final_message()
    else:
        found = claude.messages.create(**question)
    assert found.stop_reason == "tool_use"
    (use,) = [block for block in found.content if block.type == "tool_use"]
    assert use.name == "forecast" and use.id.startswith("toolu_")
    Trip.model_validate(use.input)
    # and the answer to it
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "rain on both days"}
    following = claude.messages.create(
        **say("", tools=[TOOL], tool_choice={"type": "none"}, messages=[
            question["messages"][0],
            {"role": "assistant", "content": found.content},
            {"role": "user", "content": [result]},
        ])
    )  # fmt: skip
    assert following.content[0].type == "text" and following.content[0].text
    assert following.stop_reason in ("end_turn", "max_tokens")


def test_errors_of_claude(claude: anthropic.Anthropic) -> None:
    import anthropic

    image: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.content\[0\]\.type") as bad:
        claude.messages.create(**say("", messages=[{"role": "user", "content": [image]}]))
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError) as unknown:
        claude.messages.create(**say("x", model="none"))
    assert unknown.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="context"):
        claude.messages.create(**say("word " * 2_000))


def test_every_event_of_a_message_is_one_that_the_package_knows(gateway: GatewayProcess) -> None:
    from anthropic.types import Message, RawMessageStreamEvent

    adapter: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    plain = {"model": MODEL, "max_tokens": 16, "messages": [{"role": "user", "content": "Rain in Oslo?"}]}
    called = {**plain, "max_tokens": 60, "tools": [TOOL], "tool_choice": {"type": "any"}}
    for body, last in ((plain, "text"), (called, "tool_use")):
        with gateway.open("POST", "/v1/messages", {**body, "stream": True}) as response:
            received = [data_of(event) for event in events(response)]
        assert [each["type"] for each in received[:3]] == ["message_start", "content_block_start", "ping"]
        assert received[1]["content_block"]["type"] == last and received[-1]["type"] == "message_stop"
        for each in received:
            if each["type"] != "ping":  # the package takes it off the stream
                adapter.validate_python(each)
    Message.model_validate(gateway.post("/v1/messages", plain))


# --- openai --------------------------------------------------------------------------------------------------


FUNCTION: Any = {
    "type": "function", "name": "forecast", "description": "The weather of a city.", "parameters": SCHEMA,
    "strict": True,
}  # fmt: skip
SHORT: dict[str, Any] = {"model": MODEL, "temperature": 0.0, "max_output_tokens": 16}


def test_a_response(gpt: openai.OpenAI) -> None:
    found = gpt.responses.create(**SHORT, input=CAPITAL, metadata={"a": "b"})
    assert "Paris" in found.output_text
    assert (found.status, found.model, found.metadata) == ("completed", MODEL, {"a": "b"})
    assert found.usage is not None and found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens


def test_a_response_as_a_stream(gpt: openai.OpenAI) -> None:
    with gpt.responses.stream(**SHORT, input=CAPITAL, instructions="Be brief.") as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.output_text == "".join(texts) and "Paris" in final.output_text
    long = list(gpt.responses.create(**SHORT, input="Tell me a story.", stream=True))
    assert long[-1].type == "response.incomplete"
    assert long[-1].response.incomplete_details is not None
    assert long[-1].response.incomplete_details.reason == "max_output_tokens"
    assert [event.sequence_number for event in long] == list(range(len(long)))


def test_a_response_with_a_schema(gpt: openai.OpenAI) -> None:
    found = gpt.responses.parse(**{**SHORT, "max_output_tokens": 60}, input="A trip to Rome.", text_format=Trip)
    assert isinstance(found.output_parsed, Trip)
    plain = gpt.responses.create(
        **{**SHORT, "max_output_tokens": 24},
        input="A trip to Rome, as JSON.",
        text={"format": {"type": "json_object"}},
    )
    if plain.status == "completed":
        assert isinstance(json.loads(plain.output_text), dict)
    else:
        assert plain.output_text.startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_of_gpt(gpt: openai.OpenAI, stream: bool) -> None:
    more: dict[str, Any] = {"tools": [FUNCTION], "max_output_tokens": 60}
    question: dict[str, Any] = {
        **SHORT, **more, "input": "What will the weather be in Oslo for two days?", "tool_choice": "required"
    }  # fmt: skip
    question["parallel_tool_calls"] = False
    if stream:
        with gpt.responses.stream(**question) as stream_of_events:
            found: Response = stream_of_events.get_final_response()
    else:
        found = gpt.responses.create(**question)
    (call,) = found.output
    assert call.type == "function_call" and call.name == "forecast"
    Trip.model_validate_json(call.arguments)
    # and the answer to it
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain on both days"}
    following = gpt.responses.create(
        **SHORT, tools=[FUNCTION], input=[output], previous_response_id=found.id, tool_choice="none"
    )
    assert following.output_text
    assert following.previous_response_id == found.id


def test_a_conversation_by_the_id_of_its_last_response(gpt: openai.OpenAI) -> None:
    import openai

    first = gpt.responses.create(**SHORT, input=CAPITAL)
    assert gpt.responses.retrieve(first.id).output_text == first.output_text
    second = gpt.responses.create(**SHORT, input="And of Italy?", previous_response_id=first.id)
    conversation: Any = [
        {"role": "user", "content": CAPITAL}, *first.output, {"role": "user", "content": "And of Italy?"}
    ]  # fmt: skip
    by_hand = gpt.responses.create(**SHORT, input=conversation, store=False)
    assert second.usage is not None and by_hand.usage is not None
    assert second.usage.input_tokens == by_hand.usage.input_tokens
    gpt.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as gone:
        gpt.responses.create(**SHORT, input="And of Spain?", previous_response_id=first.id)
    assert gone.value.param == "previous_response_id"


def test_errors_of_gpt(gpt: openai.OpenAI) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as bad:
        gpt.responses.create(**{**SHORT, "temperature": 9.0}, input="x")
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        gpt.responses.create(**{**SHORT, "model": "none"}, input="x")
    assert unknown.value.code == "model_not_found"


def test_every_event_of_a_response_is_one_that_the_package_knows(gateway: GatewayProcess) -> None:
    from openai.types.responses import Response, ResponseStreamEvent

    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    logprobs = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    called = {"tools": [FUNCTION], "tool_choice": "required", "max_output_tokens": 60}
    for more in ({}, logprobs, called):
        body = {**SHORT, "input": "Rain in Oslo?", **more}
        with gateway.open("POST", "/v1/responses", {**body, "stream": True}) as response:
            received = [data_of(event) for event in events(response)]
        assert len(received) > 8 and received[-1]["type"] in ("response.completed", "response.incomplete")
        for each in received:
            adapter.validate_python(each)
    Response.model_validate(gateway.post("/v1/responses", {**SHORT, "input": "Rain in Oslo?"}))
