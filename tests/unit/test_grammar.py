"""Grammars before llama.cpp sees them: what is refused, what becomes of schemas and tools. What they let through is
tried on the real thing in tests/integration/test_llama_grammar.py."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llambo.mesh.wire import limits
from llambo.mesh.wire.conversation import Function, Tool
from llambo.mesh.wire.messages import Sampling
from llambo.worker.grammar import grammar
from llambo.worker.grammar.grammar import GrammarError, GrammarText, depth, grammar_of
from llambo.worker.grammar.pattern import pattern_rule
from llambo.worker.grammar.schema import Rules


@pytest.mark.parametrize(
    ("grammar", "deep"),
    [("", 0), ('root ::= "a"', 0), ('root ::= ("a" ("b"))', 2), ('root ::= "((" [(] (x) # (((\n', 1),
     (r'root ::= "\"(" (x)', 1), (r"root ::= [\]((] (x)", 1), ("# ((", 0), ('"(((', 0)],
)  # fmt: skip
def test_how_deep_a_grammar_is(grammar: str, deep: int) -> None:
    assert depth(grammar) == deep


def test_a_grammar_passes_and_a_bomb_does_not() -> None:
    assert grammar_of(Sampling()) == GrammarText("")
    assert grammar_of(Sampling(grammar='root ::= "a"')) == GrammarText('root ::= "a"')
    for bad in ("(" * 101 + ")" * 101, 'root ::= "a\0"'):
        with pytest.raises(GrammarError):
            grammar_of(Sampling(grammar=bad))


@pytest.mark.parametrize("key", ["minLength", "maxLength", "minItems", "maxItems"])
def test_a_schema_may_not_ask_for_a_grammar_without_end(key: str) -> None:
    schema = f'{{"properties": {{"a": {{"{key}": 1000000000}}}}}}'
    with pytest.raises(GrammarError, match=f"{key} 1000000000, at most"):
        grammar_of(Sampling(json_schema=schema))


def test_making_a_grammar_of_a_schema_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(rules: Rules, schema: Any) -> str:
        while True:
            pass

    monkeypatch.setattr(grammar, "MADE_S", 0.1)
    monkeypatch.setattr(Rules, "of", endless)
    with pytest.raises(GrammarError, match="not done after"):
        grammar_of(Sampling(json_schema='{"title": "endless"}'))


def test_a_grammar_that_grew_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    words = json.dumps({"properties": {"a long name": {}}, "additionalProperties": True})
    assert grammar_of(Sampling(json_schema=words)).text
    monkeypatch.setattr(grammar, "MADE_CHARS", 1_000)
    with pytest.raises(GrammarError, match="the schemas make a grammar of"):
        grammar_of(Sampling(json_schema=words + " "))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("[1]", "is not an object"),
        ('{"type": "nothing"}', "no type is called"),
        ('{"properties": {"a": {"items": {"type": 7}}}}', r"at #/properties/a/items"),
        ('{"$ref": "#/nowhere"}', "nothing is at #/nowhere"),
        ('{"$ref": "http://example.com/x"}', "only references within the schema"),
        ('{"$ref": 1}', "only references"),
        ('{"enum": []}', "nothing is allowed"),
        ('{"enum": 1}', "enum is no list"),
        ('{"properties": []}', "properties is no object"),
        ('{"type": "array", "items": {}, "minItems": 3, "maxItems": 2}', "nothing is allowed"),
        ('{"type": "string", "minLength": 5000}', "5000 are asked for"),
        ('{"type": "string", "minLength": -1}', "minLength is -1"),
        ('{"type": "integer", "minimum": 2, "maximum": 1}', "no integer"),
        ('{"type": "string", "pattern": "(?=a)"}', "cannot be used"),
        ('{"allOf": [false]}', "nothing is allowed"),
        ('{"type": [[["object"]]]}', "no types are called"),
        ('{"anyOf": [{"$ref": "#"}], "type": "object"}', "without end"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_used(schema: str, said: str) -> None:
    with pytest.raises(GrammarError, match=said):
        grammar_of(Sampling(json_schema=schema))


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "[", "[a", "a**", "*", "a{2,1}", "a{x}", "a{99999}", "a{", "(?<n>a)", "(?", "\\", "\\1", "\\b", "a^",
     "$a", "\\u12", "[b-a]", '["]', "(" * 60 + ")" * 60],
)  # fmt: skip
def test_patterns_that_cannot_be_used(pattern: str) -> None:
    with pytest.raises(ValueError, match="cannot be used"):
        pattern_rule(pattern, lambda body: "r")


#: How fast this machine is just now is not what is tried here.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
KEYS = ["$ref", "type", "enum", "const", "anyOf", "oneOf", "allOf", "properties", "required", "additionalProperties",
        "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "minimum",
        "maximum", "exclusiveMinimum", "exclusiveMaximum", "nullable", "a"]  # fmt: skip
LEAVES = st.sampled_from(
    [
        "#",
        "#/a",
        "object",
        "array",
        "string",
        "integer",
        "date",
        "^a{2}[b-d]$",
        "",
        0,
        -1,
        3,
        1.5,
        1e300,
        True,
        False,
        None,
    ]
)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)


@UNHURRIED
@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=5))
def test_any_schema_becomes_a_grammar_or_is_refused(schema: dict[str, Any]) -> None:
    with suppress(GrammarError):
        assert grammar_of(Sampling(json_schema=json.dumps(schema))).text.startswith("root ::= ")


@UNHURRIED
@given(st.text(st.sampled_from('ab^$.*+?{}[]()|\\-,12dwsuxnéñ"/'), max_size=14))
def test_any_pattern_becomes_a_rule_or_is_refused(pattern: str) -> None:
    with suppress(ValueError):
        assert depth(pattern_rule(pattern, lambda body: "r")) <= limits.GRAMMAR_DEPTH


# --- tools -------------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [Tool(Function("weather", parameters=SCHEMA)), Tool(Function("now"))]


def test_calls_have_one_form() -> None:
    wanted = grammar_of(Sampling(tool_choice="required"), TOOLS)
    assert not wanted.lazy
    assert r'"{\"name\": \"weather\", \"arguments\": "' in wanted.text
    assert r'"{\"name\": \"now\", \"arguments\": "' in wanted.text
    assert '"<tool_call>" "\\n"' in wanted.text


def test_a_lazy_one_begins_behind_the_tag() -> None:
    wanted = grammar_of(Sampling(tool_choice="auto"), TOOLS)
    assert wanted.lazy
    assert wanted.text.startswith('root ::= "\\n"? ')


def test_only_the_tools_that_are_named() -> None:
    wanted = grammar_of(Sampling(tool_choice="required", tool_names=["now"]), TOOLS)
    assert "weather" not in wanted.text and "now" in wanted.text


def test_how_many_calls() -> None:
    many = f"{{0,{limits.TOOL_CALLS - 1}}}"
    required = Sampling(tool_choice="required")
    assert many in grammar_of(required, TOOLS, parallel=True).text.splitlines()[0]
    assert many not in grammar_of(required, TOOLS).text.splitlines()[0]
    alone = Sampling(tool_choice="required", parallel_tool_calls=False)
    assert many not in grammar_of(alone, TOOLS, parallel=True).text.splitlines()[0]


def test_a_call_or_else_what_the_schema_says() -> None:
    either = grammar_of(Sampling(tool_choice="auto", json_schema='{"type": "object"}'), TOOLS)
    assert not either.lazy
    assert either.text.splitlines()[0].endswith("| object")
    # A call is what was asked for: the schema is for another answer
    assert grammar_of(Sampling(tool_choice="required", json_schema="{}"), TOOLS) == grammar_of(
        Sampling(tool_choice="required"), TOOLS
    )


@pytest.mark.parametrize(
    ("options", "told", "said"),
    [
        ({}, [], "the prompt has no tools"),
        ({"tool_names": ["no"]}, TOOLS, "no tool of that name"),
        ({"grammar": 'root ::= "a"'}, TOOLS, "excludes"),
        ({}, [Tool(Function("f", parameters={"type": "array"}))], "schema of tool 'f' is of type 'array'"),
        (
            {},
            [*TOOLS, Tool(Function("f", parameters={"properties": {"a": {"type": 1}}}))],
            "tool 'f' cannot.*properties/a",
        ),
        ({}, [Tool(Function("f", parameters={"description": "x" * limits.GRAMMAR_CHARS}))], "tool 'f' has"),
        ({}, [Tool(Function("f", parameters={"maxLength": 10**9}))], "tool 'f' has maxLength"),
    ],
)
def test_tools_that_cannot_be_used_are_named(options: dict[str, Any], told: list[Tool], said: str) -> None:
    with pytest.raises(GrammarError, match=said):
        grammar_of(Sampling(tool_choice="auto", **options), told)


def test_a_tool_nested_too_deep_is_named() -> None:
    deep: dict[str, Any] = {}
    for _ in range(60):
        deep = {"properties": {"a": deep}}
    with pytest.raises(GrammarError, match="tool 'f' is nested more than 100 deep"):
        grammar_of(Sampling(tool_choice="auto"), [Tool(Function("f", parameters=deep))])
