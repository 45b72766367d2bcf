"""From what a program passes to the client to the request that is sent: prompts, conversations, tools."""

from __future__ import annotations

import copy
import traceback
from typing import Any, cast, get_args

import msgspec
import pytest

from llambo.mesh.client.answer_stream import Answer, Stream
from llambo.mesh.client.request_options import Options, build_request, chat_prompt
from llambo.mesh.wire import conversation, tasks
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.worker.llama.prompt import Template, chat_of, prompt_text

WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather of a place."}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
TEMPLATE = Template("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>", bos="", eos="")


def built(prompt: Any, **options: Any) -> tuple[m.Sampling, bytes]:
    request, data = build_request(b"i" * 16, 1, prompt, False, cast(Options, options))
    return msgspec.msgpack.decode(request.sampling, type=m.Sampling), data


def given(prompt: Any, **options: Any) -> dict[str, Any]:
    """The sampling as it is sent."""
    request, _ = build_request(b"i" * 16, 1, prompt, False, cast(Options, options))
    return dict(msgspec.msgpack.decode(request.sampling))


def read_by_model(prompt: Any, template: Template | None, **options: Any) -> str:
    sampling, data = built(prompt, **options)
    return prompt_text(data, chat_of(data, sampling), template).text.decode()


def refused(*wrong: Any, **options: Any) -> LlamboError:
    with pytest.raises(LlamboError) as found:
        built(*wrong, **options)
    assert found.value.code is Code.BAD_REQUEST
    return found.value


class TestPrompts:
    def test_a_text_is_the_message_of_a_user(self) -> None:
        assert given("What is AI?") == {"form": "user"}
        assert read_by_model("What is AI?", TEMPLATE) == "<user>What is AI?<assistant>"
        assert read_by_model("Hi", TEMPLATE, system="Be brief.") == "<system>Be brief.<user>Hi<assistant>"

    def test_it_goes_to_the_model_as_it_is_when_asked(self) -> None:
        assert given("What is AI?", form="text") == {"form": "text"}
        assert given("What is AI?", sampling={"form": "text"}) == {"form": "text"}
        assert read_by_model("What is AI?", TEMPLATE, form="text") == "What is AI?"

    def test_a_model_without_a_template_gets_plain_text(self) -> None:
        assert read_by_model("What is AI?", None) == "What is AI?"
        assert read_by_model([{"role": "user", "content": "What is AI?"}], None) == "What is AI?"

    def test_the_default_of_the_wire_stays_for_older_clients(self) -> None:
        assert m.Sampling().form == "text"
        assert tasks.TaskOptions().form == "text"

    def test_an_option_that_is_not_known_has_a_hint(self) -> None:
        assert refused("Hi", temprature=1).hint == "did you mean temperature?"
        assert refused("Hi", top_k=5).hint == "options of the sampler are passed as sampling={'top_k': 5}"
        assert refused("Hi", colour="red").hint == "correct the field that is named"


class TestConversations:
    def test_messages_go_through_the_template(self) -> None:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "now?"}]},
        ]
        expected = "<system>Be brief.<user>Hi<assistant>Hello.<user>And\nnow?<assistant>"
        assert read_by_model(messages, TEMPLATE) == expected
        assert read_by_model(tuple(messages), TEMPLATE, temperature=0.5) == expected

    def test_without_tools_any_worker_can_read_it(self) -> None:
        assert given([{"role": "user", "content": "Hi"}]) == {"form": "messages"}
        assert given([{"role": "user", "content": "Hi"}], tools=[], tool_choice="auto") == {"form": "messages"}

    def test_an_answer_is_the_next_message(self) -> None:
        answer = Answer("Hello.", [1], "stop", m.Usage(), "w", 0, "id", 0)
        messages = [{"role": "user", "content": "Hi"}, answer.message, {"role": "user", "content": "Bye"}]
        assert read_by_model(messages, TEMPLATE) == "<user>Hi<assistant>Hello.<user>Bye<assistant>"

    @pytest.mark.parametrize(
        ("messages", "named"),
        [
            ([], "messages: there are 0"),
            ({"role": "user", "content": "Hi"}, "list of messages, not dict"),
            (["Hi"], "messages[0]"),
            ([{"content": "Hi"}], "`role`"),
            ([{"role": "user"}], "messages[0].content: is missing"),
            ([{"role": "User", "content": "Hi"}], "messages[0].role: 'User' is not one of system"),
            ([{"role": "user", "content": 7}], "messages[0].content"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
            ([{"role": "user", "content": object()}], "cannot be written as JSON"),
            ([{"role": "user", "content": "\ud800"}], "cannot be written as JSON"),
            (b"Hi", "list of messages, not bytes"),
            (None, "list of messages, not NoneType"),
        ],
    )
    def test_what_is_no_conversation_is_refused_with_the_place(self, messages: Any, named: str) -> None:
        error = refused(messages)
        assert named in error.text
        assert '"role": "user"' in error.hint

    def test_options_that_belong_to_a_text(self) -> None:
        messages = [{"role": "user", "content": "Hi"}]
        assert "role system" in refused(messages, system="Be brief.").hint
        assert "form" in refused(messages, form="user").text
        assert "conversation" in refused("Hi", tools=[WEATHER]).text


class TestTools:
    MESSAGES = [{"role": "user", "content": "Is it raining in Oslo?"}]

    def test_the_model_may_call_them(self) -> None:
        sampling, data = built(self.MESSAGES, tools=[WEATHER, CLOCK])
        assert (sampling.form, sampling.tool_choice, sampling.tool_names) == ("chat", "auto", [])
        chat = conversation.read(data, "chat")
        assert [tool.function.name for tool in chat.tools] == ["weather", "clock"]

    def test_which_it_calls(self) -> None:
        tools = [WEATHER, CLOCK]
        assert given(self.MESSAGES, tools=tools, tool_choice="required")["tool_choice"] == "required"
        named = given(self.MESSAGES, tools=tools, tool_choice="clock")
        assert (named["tool_choice"], named["tool_names"]) == ("required", ["clock"])
        # Tools that it cannot call are not shown to it.
        assert given(self.MESSAGES, tools=tools, tool_choice="none") == {"form": "messages"}
        one = given(self.MESSAGES, tools=tools, sampling={"parallel_tool_calls": False})
        assert one["parallel_tool_calls"] is False

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"tools": [WEATHER], "tool_choice": "news"}, "no tool has the name 'news'"),
            ({"tool_choice": "required"}, "no tools"),
            ({"tools": [WEATHER, WEATHER]}, "two tools"),
            ({"tools": [{"name": "weather"}]}, "tools[0]"),
            ({"tools": "weather"}, "tools"),
        ],
    )
    def test_what_is_no_tool(self, options: dict[str, Any], named: str) -> None:
        assert named in refused(self.MESSAGES, **options).text

    async def test_the_calls_of_an_answer(self) -> None:
        text = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
        answer = await answered(text, tools=True)
        (call,) = answer.tool_calls
        assert (call.name, call.arguments) == ("weather", '{"city": "Oslo"}')
        assert answer.text == text
        assert answer.message["content"].strip() == "I look."
        # Both go back to the model as it wrote them
        result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
        read = read_by_model([*self.MESSAGES, answer.message, result], TEMPLATE, tools=[WEATHER])
        assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in read
        assert "<tool_response>\nRain.\n</tool_response>" in read

    async def test_without_tools_nothing_is_a_call(self) -> None:
        text = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
        answer = await answered(text, tools=False)
        assert (answer.tool_calls, answer.message) == ([], {"role": "assistant", "content": text})


async def answered(text: str, *, tools: bool) -> Answer:
    stream = Stream(b"i" * 16, lambda event: None, mine=True, tools=tools)
    stream._deliver([1], [text.encode()], ())
    stream._set_end(m.End(b"i" * 16, 1, "stop"))
    return await stream.result()


async def test_a_stream_that_was_closed_has_no_answer() -> None:
    stream = Stream(b"i" * 16, lambda event: None, mine=True)
    await stream.aclose()
    with pytest.raises(LlamboError, match="closed before its end") as closed:
        await stream.result()
    assert closed.value.code is Code.CANCELLED


def test_an_error_shows_its_hint_in_a_traceback_and_passes_between_processes() -> None:
    error = LlamboError(Code.BUSY, "the queue is full", 500, hint="wait")
    assert traceback.format_exception_only(error) == [
        "llambo.mesh.wire.errors.LlamboError: the queue is full\n", "wait\n",
    ]  # fmt: skip
    same = copy.copy(error)  # as `multiprocessing` does it
    assert (same.code, str(same), same.retry_after_ms, same.hint) == (Code.BUSY, "the queue is full", 500, "wait")


def test_forms_and_priorities_are_those_of_the_wire() -> None:
    fields = {field.name: field.type for field in msgspec.structs.fields(m.Sampling)}
    assert set(get_args(tasks.Form)) == set(get_args(fields["form"]))
    assert chat_prompt([{"role": "user", "content": "Hi"}]).form in get_args(tasks.Form)
