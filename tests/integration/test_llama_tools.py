"""Calls of tools on a real model: what is asked for is what comes, and a call that moves goes on as a call."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from llambo import Client
from llambo.broker.core import BrokerCore
from llambo.gateway.apis import openai_chat
from llambo.mesh.client.client import Answer
from llambo.mesh.wire import tasks
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.messages import Sampling
from llambo.testing.mesh import Mesh
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import LlamaOptions, WorkerConfig
from llambo.worker.engine.protocol import Configure, Start
from llambo.worker.llama.llama_engine import LlamaEngine
from tests.integration import hermes
from tests.integration.test_llama_engine import Generated, engine, load_generating, loaded, refusal, reported, run
from tests.unit.gateway_bench import Call, collect, read

__all__ = ["engine", "loaded", "reported"]  # fixtures

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 30},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather at a place.",
                                            "parameters": PARAMETERS}}  # fmt: skip
TIME = {"type": "function", "function": {"name": "get_time", "description": "What time it is."}}
TOOLS = [WEATHER, TIME]
SCHEMAS = {"get_weather": PARAMETERS, "get_time": {"maxProperties": 0}}
ASKED = {"role": "user", "content": "What is the weather in Oslo, and for three days?"}
#: After so many tokens a continued answer is known to be on the same way. A cut more costs less than the rest of it.
FEW = 6
NAMED = {"type": "function", "function": {"name": "get_time"}}


def called(city: str) -> list[dict[str, Any]]:
    """A model that was not made for tools calls one if it has seen how."""
    arguments = json.dumps({"city": city, "days": 2})
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return [
        {"role": "user", "content": f"What is the weather in {city}?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "assistant", "content": f"It is sunny in {city}."},
    ]


SEEN = [*called("Rome"), *called("Paris"), {"role": "user", "content": "What is the weather in Oslo?"}]


def start(choice: Any, messages: list[Any] | None = None, prefix: list[int] | None = None, tokens: int = 160,
          parallel: bool | None = None, **more: Any) -> Start:  # fmt: skip
    prompt, options = offered(messages or [ASKED], TOOLS, choice, parallel)
    sampling = msgspec.convert({"form": "chat", "temperature": 0.0, **options, **more}, Sampling)
    return Start(bytes([1]) * 24, prompt.encode(), tokens, 7, prefix or [], sampling)


def offered(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]], choice: Any, parallel: bool | None = None
) -> tuple[str, dict[str, Any]]:
    """The prompt and the sampling options that the gateway makes of it."""
    body = {"messages": messages, "tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel}
    submission = openai_chat.parse(read(openai_chat.ChatRequest, body), 64).submission
    options = dict(submission.options["sampling"] or {})
    del options["fit"]
    return submission.prompt, options


def calls_of(generated: Generated | Answer) -> list[Call]:
    """Nothing but calls, each of them valid."""
    content, calls = collect(generated.text, "seed")
    assert content == ""
    for call in calls:
        assert jsonschema_rs.is_valid(SCHEMAS[call.name], json.loads(call.arguments)), call
    return calls


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.5])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_that_must_come_comes_and_satisfies_its_schema(
    engine: LlamaEngine, choice: Any, temperature: float
) -> None:
    (generated,) = run(engine, start(choice, temperature=temperature))
    (call,) = calls_of(generated)
    assert generated.end == "stop"
    assert choice == "required" or call.name == "get_time"


def test_several_calls_if_they_are_wanted(engine: LlamaEngine) -> None:
    (generated,) = run(engine, start("required", parallel=True, temperature=0.8))
    assert generated.end == "stop"
    assert len(calls_of(generated)) > 1


def test_a_call_that_may_come_comes_where_it_fits(engine: LlamaEngine) -> None:
    (generated,) = run(engine, start("auto", SEEN))
    (call,) = calls_of(generated)
    # The model is small: with a build of llama.cpp that rounds otherwise it says the country of that city.
    assert generated.end == "stop" and json.loads(call.arguments)["city"] in ("Oslo", "Norway")


def test_where_none_fits_the_answer_is_what_it_is_without_the_grammar(engine: LlamaEngine) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    (free,), (plain,) = (
        run(engine, start("auto", messages, tokens=40, tool_choice=choice)) for choice in ("auto", "none")
    )
    assert free.text == plain.text
    assert collect(free.text, "seed") == (free.text, [])


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_call_that_is_continued_anywhere_goes_on_in_its_grammar(engine: LlamaEngine, choice: str) -> None:
    (whole,) = run(engine, start(choice, SEEN))
    assert calls_of(whole)
    for cut in {1, *range(2, len(whole.ids), 5)}:
        (rest,) = run(engine, start(choice, SEEN, whole.ids[:cut], tokens=cut + FEW))
        assert whole.ids[:cut] + rest.ids == whole.ids[: cut + FEW], f"cut at {cut}"
    (rest,) = run(engine, start(choice, SEEN, whole.ids[:-1]))
    assert (whole.ids[:-1] + rest.ids, rest.end) == (whole.ids, whole.end)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_call_that_has_begun_must_end(engine: LlamaEngine, temperature: float) -> None:
    """The model would not have called here; its first tokens are put into its mouth."""
    begun = engine._model.tokenize(b'Well.\n<tool_call>\n{"na', special=False)
    (generated,) = run(engine, start("auto", prefix=begun, temperature=temperature))
    content, (call,) = collect('Well.\n<tool_call>\n{"na' + generated.text, "seed")
    assert (content, generated.end) == ("Well.\n", "stop")
    assert jsonschema_rs.is_valid(SCHEMAS[call.name], json.loads(call.arguments))


def test_a_call_or_else_json(engine: LlamaEngine) -> None:
    schema = json.dumps({"type": "object", "properties": {"greeting": {"type": "string", "maxLength": 20}},
                         "required": ["greeting"]})  # fmt: skip
    (generated,) = run(engine, start("auto", [{"role": "user", "content": "Say hello."}], json_schema=schema))
    content, calls = collect(generated.text, "seed")
    assert calls or set(json.loads(content)) == {"greeting"}
    (generated,) = run(engine, start("auto", SEEN, json_schema=schema))
    assert calls_of(generated)


@pytest.mark.parametrize("prompt", ["Describe Ann, who is 40, as JSON.", "A book as JSON."])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_any_object_of_json_has_no_blanks_without_end(engine: LlamaEngine, prompt: str, temperature: float) -> None:
    """That a small model comes to an end is not ours to promise; that it writes JSON until there is."""
    sampling = Sampling(form="user", temperature=temperature, json_schema='{"type": "object"}')
    (generated,) = run(engine, Start(bytes([1]) * 24, prompt.encode(), 60, 7, [], sampling))
    assert "  " not in '""'.join(generated.text.split('"')[::2]), generated.text
    assert generated.end == "length" or isinstance(json.loads(generated.text), dict)


@pytest.mark.parametrize(
    ("tools", "options", "why"),
    [
        ([], {"tool_choice": "auto"}, "the prompt has no tools"),
        ([TIME], {"tool_choice": "required", "tool_names": ["x"]}, "'x'"),
        ([{"type": "function", "function": {"name": "odd", "parameters": {"properties": {"a": {"type": 1}}}}}],
         {"tool_choice": "auto"}, "tool 'odd'"),
        ([{"type": "function", "function": {"name": "odd", "parameters": {"$ref": "#"}}}], {"tool_choice": "auto"}, ""),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_used_are_refused(engine: LlamaEngine, tools: Any, options: Any, why: str) -> None:
    prompt = json.dumps({"messages": [ASKED], "tools": tools}).encode()
    sampling = msgspec.convert({"form": "chat", **options}, Sampling)
    refused = refusal(engine, Start(bytes([1]) * 24, prompt, 8, 7, [], sampling))
    assert (refused.error.code, refused.final) == (Code.BAD_REQUEST, True)
    assert why in refused.error.text


def test_the_tools_count_as_tokens_of_the_prompt(engine: LlamaEngine) -> None:
    whole = start("auto", tokens=1)
    (generated,) = run(engine, whole)
    count = Start(whole.key, whole.prompt, 64, 0, task="tokenize", options=tasks.TaskOptions(form="chat"))
    assert engine.start(count, 0) is None
    (output,) = engine.step(0)
    found = msgspec.msgpack.decode(b"".join(output.pieces), type=tasks.TokenizeResult)
    assert generated.usage is not None and generated.usage.prompt_tokens == len(found.ids) > 200


# --- a model that was made for it --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_for_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    path = hermes.make(tmp_path_factory.mktemp("model") / "hermes.gguf")
    options = LlamaOptions(slots=2, context=1024, threads=1, batch=128)
    yield load_generating(Configure("llama", str(path), llama=options, safe=True), lambda progress: None)
    path.unlink()


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tags_that_are_control_tokens_reach_the_reader_as_text(made_for_tools: LlamaEngine, choice: str) -> None:
    model = made_for_tools._model
    (begin,) = model.tokenize(b"<tool_call>", special=True)
    assert (model.piece(begin), model._render(begin, special=False)) == (b"<tool_call>", b"")
    # Given an answer whose first token is the tag (this model would not think of it)
    (generated,) = run(made_for_tools, start(choice, prefix=[begin]))
    # Then it is a call to its end, and what ends it is shown
    calls = collect("<tool_call>" + generated.text, "seed")
    assert (calls[0], generated.text.endswith("\n</tool_call>")) == ("", True)
    assert [jsonschema_rs.is_valid(SCHEMAS[call.name], json.loads(call.arguments)) for call in calls[1]]
    # ... wherever it is continued
    for cut in range(0, len(generated.ids), 12):
        (rest,) = run(made_for_tools, start(choice, prefix=[begin, *generated.ids[:cut]], tokens=1 + cut + FEW))
        assert generated.ids[:cut] + rest.ids == generated.ids[: cut + FEW]


def test_its_template_is_given_tools_and_calls_as_they_are(made_for_tools: LlamaEngine) -> None:
    asked = start("auto", SEEN)
    count = Start(asked.key, asked.prompt, 64, 0, task="tokenize", options=tasks.TaskOptions(form="chat"))
    assert made_for_tools.start(count, 0) is None
    (output,) = made_for_tools.step(0)
    found = msgspec.msgpack.decode(b"".join(output.pieces), type=tasks.TokenizeResult)
    text = b"".join(found.pieces).decode()
    assert "<|im_start|>tool\nsunny<|im_end|>" in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>' in text
    assert '{"type": "function", "function": {"name": "get_time"' in text


# --- a worker dies in the middle of a call -----------------------------------------------------------------------

WORKER = WorkerConfig(engine="llama", model="smollm2", llama=LlamaOptions(slots=4, context=1024, threads=1, batch=128))


#: A call of it takes a while: an engine is killed within it.
NOTE = {"type": "function", "function": {"name": "write_note", "parameters": {
    "type": "object", "properties": {"text": {"type": "string", "minLength": 200, "maxLength": 240}},
    "required": ["text"]}}}  # fmt: skip
SCHEMAS["write_note"] = NOTE["function"]["parameters"]  # type: ignore[index]


def in_a_call(core: BrokerCore) -> str:
    """Whether a worker has generated a call up to its arguments; the frame before them has some twenty tokens."""
    far = (
        each for each in core.state.requests.values() if each.run.worker is not None and each.transcript.next_index > 24
    )
    return next((each.run.worker.name for each in far if each.run.worker is not None), "")


def test_a_worker_is_killed_in_the_middle_of_a_call() -> None:
    killed: list[str] = []

    def victim(core: BrokerCore) -> bool:
        killed.append(in_a_call(core))
        return bool(killed[-1])

    with Mesh(2, worker=WORKER, check=True) as mesh:

        async def ask(client: Client, temperature: float) -> Answer:
            asked = [{"role": "user", "content": "Write a note about llamas."}]
            prompt, options = offered(asked, [NOTE], "required")
            return await client.generate(
                prompt, form="chat", temperature=temperature, seed=1, max_tokens=260, stream=True, sampling=options
            )

        async def scenario() -> list[Answer]:
            async with mesh.client() as client:
                asking = [asyncio.create_task(ask(client, temperature)) for temperature in (0.0, 0.8, 1.2)]
                await mesh.aside(victim, "a call that has come to its arguments")
                (worker,) = (worker for worker in mesh.workers if worker.name == killed[-1])
                os.kill(worker.children()[0], signal.SIGKILL)
                return await asyncio.gather(*asking)

        answers = mesh.run(scenario(), timeout_s=3 * TIMEOUT_S)
    assert any(answer.moves for answer in answers), "nothing was in the middle of anything"
    for answer in answers:
        assert answer.reason == "stop"
        assert len(calls_of(answer)) == 1
