"""Conversations as clients write them, in words and for templates."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from llambo.mesh.wire import conversation, limits
from llambo.mesh.wire.conversation import Chat, ChatMessage
from llambo.mesh.wire.messages import Sampling
from llambo.worker.llama.prompt import BadPrompt, PromptText, Template, chat_of, prompt_text, without_tools

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: A template with tools, of the Hermes family.
HERMES = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }}: "
    "{{ call.function.arguments | tojson }}</tool_call>{% endfor %}"
    "{% if message.tool_call_id %}({{ message.tool_call_id }}){% endif %}{% endfor %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": True,
    },
}
CALLED: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
ASKED = {"role": "user", "content": "How is it in Oslo?"}


def template(source: str = CHATML) -> Template:
    return Template(source, bos="<s>", eos="</s>")


def read_chat(*messages: Any, tools: Any = None) -> Chat:
    return chat_of(json.dumps({"messages": messages, "tools": tools}).encode(), Sampling(form="chat"))


def text(prompt: bytes, sampling: Sampling, source: str | None = CHATML) -> PromptText:
    return prompt_text(prompt, chat_of(prompt, sampling), template(source) if source is not None else None)


def test_what_a_user_says_and_the_system_message() -> None:
    made = text(b"Hi", Sampling(form="user", system="Be brief."))
    assert made.templated
    assert made.text.startswith(b"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert text(json.dumps(messages).encode(), Sampling(form="messages")) == made
    assert text(json.dumps({"messages": messages}).encode(), Sampling(form="chat")) == made


def test_without_a_template_or_with_plain_text_nothing_is_added() -> None:
    assert text(b"Hi", Sampling(form="user", system="S"), None) == (b"S\n\nHi", False)
    assert text(b"Hi \xff", Sampling()) == (b"Hi \xff", False)


@pytest.mark.parametrize("prompt", [b"", b"{}", b"[]", b"[1]", b'[{"role": "user"}]', b"\xff", b"[" * 10_000])
@pytest.mark.parametrize("form", ["messages", "chat"])
def test_what_is_no_list_of_messages(prompt: bytes, form: Any) -> None:
    with pytest.raises(BadPrompt):
        text(prompt, Sampling(form=form))


def test_content_in_parts_is_joined_and_a_developer_is_the_system() -> None:
    chat = read_chat(
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]}, ASKED
    )
    assert chat.messages[0] == ChatMessage("system", "Be\nbrief.")


@pytest.mark.parametrize(
    ("messages", "tools", "problem"),
    [
        (
            [ASKED, {"role": "user", "content": [{"type": "image_url"}]}],
            None,
            r"messages\[1\]\.content\[0\].*image_url",
        ),
        ([{"role": "user", "content": None}], None, r"messages\[0\]\.content: is missing"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], None, r"messages\[0\]\.content: is missing"),
        ([{"role": "user", "content": 1}], None, "content"),
        ([ASKED] * (conversation.MESSAGES + 1), None, "messages: there are 4097, allowed are 1 to 4096"),
        (
            [ASKED],
            [{"type": "function", "function": {"name": "a b"}}],
            r"tools\[0\]\.function\.name: 'a b' does not match",
        ),
        ([ASKED], [WEATHER, WEATHER], "two tools have the name 'weather'"),
        ([ASKED], [{"type": "code", "function": {"name": "a"}}], "code"),
        (
            [ASKED],
            [{"type": "function", "function": {"name": f"t{n}"}} for n in range(limits.TOOLS + 1)],
            "tools: there are 129, allowed are 128",
        ),
    ],
)
def test_what_cannot_be_used_is_named(messages: list[Any], tools: Any, problem: str) -> None:
    with pytest.raises(BadPrompt, match=problem):
        read_chat(*messages, tools=tools)


def test_a_template_without_tools_gets_them_in_the_system_message() -> None:
    messages = without_tools(
        read_chat({"role": "system", "content": "Be brief."}, ASKED, CALLED, RESULT, RESULT, tools=[WEATHER])
    )
    assert [message.role for message in messages] == ["system", "user", "assistant", "user"]
    system, _, called, results = (str(message.content) for message in messages)
    assert system.startswith("Be brief.\n\n")
    (line,) = [line for line in system.splitlines() if line.startswith('{"name": "weather"')]
    assert json.loads(line) == {name: WEATHER["function"][name] for name in ("name", "description", "parameters")}  # type: ignore[index]
    # A call is repeated as the model has written it, letter by letter
    assert called == '<tool_call>\n{"name": "weather", "arguments": {"city":"Oslo"}}\n</tool_call>'
    # ... and all results in one turn
    assert results == "<tool_response>\nrain\n</tool_response>\n<tool_response>\nrain\n</tool_response>"


def test_without_a_system_message_there_is_one_for_the_tools() -> None:
    system, user = without_tools(read_chat(ASKED, tools=[{"type": "function", "function": {"name": "now"}}]))
    assert (system.role, user.role) == ("system", "user")
    assert '"parameters": {"type": "object", "properties": {}}' in str(system.content)
    assert [message.role for message in without_tools(read_chat(ASKED, tools=[]))] == ["user"]


def test_text_before_a_call_stays_before_it() -> None:
    (message,) = without_tools(read_chat({**CALLED, "content": "I look."}))
    assert str(message.content).startswith("I look.\n<tool_call>\n")


def test_a_template_with_tools_gets_them_as_they_are() -> None:
    prompt = json.dumps({"messages": [ASKED, CALLED, RESULT], "tools": [WEATHER]}).encode()
    made = text(prompt, Sampling(form="chat"), HERMES).text.decode()
    tools, rest = made.removeprefix("<tools>").split("</tools>")
    function = {name: value for name, value in WEATHER["function"].items() if name != "strict"}  # type: ignore[attr-defined]
    assert json.loads(tools) == {"type": "function", "function": function}
    assert rest == ('[user]How is it in Oslo?[assistant]<tool_call>weather: {"city": "Oslo"}</tool_call>[tool]rain(c1)')


@pytest.mark.parametrize(
    ("arguments", "shown"), [({"a": 1}, '{"a": 1}'), ("", "{}"), ('{"a": "cu', '"{\\"a\\": \\"cu"')]
)
def test_arguments_are_an_object_where_they_can_be(arguments: Any, shown: str) -> None:
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    made = text(json.dumps([message]).encode(), Sampling(form="messages"), HERMES).text.decode()
    assert made == f"[assistant]<tool_call>f: {shown}</tool_call>"


def test_what_is_nested_without_end_is_an_error() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": deep}}]}
    with pytest.raises(BadPrompt):
        text(json.dumps([message]).encode(), Sampling(form="messages"), HERMES)


def test_which_templates_know_tools() -> None:
    assert template(HERMES).knows_tools
    assert not template(CHATML).knows_tools
    assert not template("{# no <tool_call> of mytools here #}").knows_tools


def test_a_prompt_that_a_template_makes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PROMPT_BYTES", 100)
    with pytest.raises(BadPrompt, match="100 are allowed"):
        text(msgspec.json.encode([{"role": "user", "content": "x" * 90}]), Sampling(form="messages"))
