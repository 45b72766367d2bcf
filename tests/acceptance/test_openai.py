"""The official `openai` package against a gateway with SmolLM2 behind it: chat, completions, embeddings, errors.

Two workers, because one of them is killed in the middle of a stream.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from llambo.testing.mesh import Mesh
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import LlamaOptions, WorkerConfig
from tests.integration.gateway_process import GatewayProcess

if TYPE_CHECKING:  # importing the package takes a second, and each test process collects this file
    import openai
    from openai.types.chat import ChatCompletionChunk

CONTEXT = 512
WORKER = WorkerConfig(engine="llama", model="smollm2", llama=LlamaOptions(slots=4, context=CONTEXT, threads=1))
MODEL = "smollm2"
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": text, "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"],
        "additionalProperties": False}}}
    for name, text in (("weather", "The weather of a city."), ("people", "How many live in a city."))
]  # fmt: skip


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(2, worker=WORKER) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def gateway(mesh: Mesh) -> Iterator[GatewayProcess]:
    with GatewayProcess(mesh.address) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def gpt(gateway: GatewayProcess) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
        yield client


def say(text: str, **more: Any) -> dict[str, Any]:
    request = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 32}
    return {**request, **more}


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_an_answer(gpt: openai.OpenAI) -> None:
    found = gpt.chat.completions.create(**say("What is the capital of France? Answer in one word."))
    assert "Paris" in (found.choices[0].message.content or "")
    assert found.usage is not None and found.usage.prompt_tokens > 10
    assert found.choices[0].finish_reason in ("stop", "length")


def test_an_answer_as_a_stream_with_usage(gpt: openai.OpenAI) -> None:
    asked = say("Tell me a story.", temperature=0.9, seed=5, stop=["llama"])
    with gpt.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    whole = gpt.chat.completions.create(**asked)
    assert text_of(chunks) == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens > 0 and not chunks[-1].choices


def test_choices_with_log_probabilities(gpt: openai.OpenAI) -> None:
    found = gpt.chat.completions.create(**say("Hello", n=2, logprobs=True, top_logprobs=3, temperature=1.5, seed=1))
    for choice in found.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert "".join(each.token for each in choice.logprobs.content).startswith(choice.message.content or "?")
        assert all(len(each.top_logprobs) == 3 and each.logprob <= 0 for each in choice.logprobs.content)
    assert len({choice.message.content for choice in found.choices}) == 2


def test_json(gpt: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
              "required": ["name", "age"], "additionalProperties": False}  # fmt: skip
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    asked = say("Invent a person.", response_format=wanted, max_tokens=200)
    person = json.loads(gpt.chat.completions.create(**asked).choices[0].message.content or "")
    assert person.keys() == {"name", "age"} and isinstance(person["age"], int)
    some = say('Say {"a": 1}', response_format={"type": "json_object"}, max_tokens=100)
    assert isinstance(json.loads(gpt.chat.completions.create(**some).choices[0].message.content or ""), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "people"}}])
def test_tools_that_must_be_called(gpt: openai.OpenAI, choice: Any) -> None:
    asked = say("How is the weather in Oslo?", tools=TOOLS, tool_choice=choice, parallel_tool_calls=False,
                max_tokens=100)  # fmt: skip
    found = gpt.chat.completions.create(**asked).choices[0]
    assert found.finish_reason == "tool_calls" and found.message.tool_calls is not None
    (call,) = found.message.tool_calls
    assert call.type == "function"
    assert call.function.name == ("people" if isinstance(choice, dict) else call.function.name)
    assert json.loads(call.function.arguments).keys() == {"city"}

    # The same as a stream, put together as the package does it.
    with gpt.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed is not None
    assert streamed[0].function.arguments == call.function.arguments

    # What the tool has found goes back, and an answer comes of it.
    asked["messages"] += [
        found.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "It rains, 3 degrees."},
    ]
    last = gpt.chat.completions.create(**{**asked, "tool_choice": "none"}).choices[0]
    assert last.message.content and not last.message.tool_calls


def test_tools_that_may_be_called(gpt: openai.OpenAI) -> None:
    """Whatever the model does, it is a whole call or plain text."""
    found = gpt.chat.completions.create(**say("Hello!", tools=TOOLS, max_tokens=60)).choices[0]
    assert found.message.content or found.message.tool_calls
    assert "<tool_call>" not in (found.message.content or "")


def test_a_completion(gpt: openai.OpenAI) -> None:
    found = gpt.completions.create(model=MODEL, prompt="One, two, three, four,", max_tokens=4, temperature=0, echo=True)
    assert found.choices[0].text.startswith("One, two, three, four, five")


def test_embeddings(gpt: openai.OpenAI) -> None:
    """The package asks for base64, and makes numbers of it."""
    found = gpt.embeddings.create(model=MODEL, input=["a cat", "a kitten", "a tax form"])
    cat, kitten, form = [each.embedding for each in found.data]
    assert sum(x * x for x in cat) == pytest.approx(1.0, abs=1e-3)
    assert sum(x * y for x, y in zip(cat, kitten, strict=True)) > sum(x * y for x, y in zip(cat, form, strict=True))


def test_models(gpt: openai.OpenAI) -> None:
    assert [model.id for model in gpt.models.list()] == [MODEL]
    assert gpt.models.retrieve(MODEL).owned_by == "llambo"


def test_errors(gpt: openai.OpenAI, gateway: GatewayProcess) -> None:
    import openai

    with pytest.raises(openai.NotFoundError) as unknown:
        gpt.chat.completions.create(**say("x", model="none"))
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        gpt.chat.completions.create(**say("x", temperature=-1))
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        gpt.chat.completions.create(**say("word " * 3_000))
    assert long.value.code == "too_long"
    asked = say("x", extra_body={"grammar": "root ::= ("})
    with pytest.raises(openai.BadRequestError) as schema:
        gpt.chat.completions.create(**asked, stream=True)
    assert schema.value.code == "bad_request"


def test_without_a_maximum_the_context_is_the_limit(gpt: openai.OpenAI) -> None:
    asked = say("word " * (CONTEXT - 64), extra_body={"ignore_eos": True})
    del asked["max_tokens"]
    found = gpt.chat.completions.create(**asked)
    assert found.usage is not None and found.choices[0].finish_reason == "length"
    assert found.usage.total_tokens == CONTEXT


def test_a_worker_killed_in_the_middle_of_a_stream(mesh: Mesh, gpt: openai.OpenAI) -> None:
    asked = say("Tell me a long story about a llama.", temperature=0.8, seed=3, max_tokens=120)
    with gpt.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = [next(stream) for _ in range(30)]
        busy = mesh.look(lambda core: [r.run.worker.name for r in core.state.requests.values() if r.run.worker])
        (victim,) = [worker for worker in mesh.workers if worker.name in busy]
        victim.send(signal.SIGKILL)
        chunks += list(stream)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 120
    assert mesh.counter("moved") == 1
    assert text_of(chunks)
