"""Grammars before a model follows them: what is refused, what becomes of schemas and tools. What they let through is
tried with a real vocabulary in tests/integration/test_llama_grammar.py."""

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
from llambo.worker.llama.grammar import AnswerGrammar, GrammarError, depth, grammar_of


@pytest.mark.parametrize(
    ("grammar", "deep"),
    [("", 0), ('root ::= "a"', 0), ('root ::= ("a" ("b"))', 2), ('root ::= "((" [(] (x) # (((\n', 1),
     (r'root ::= "\"(" (x)', 1), (r"root ::= [\]((] (x)", 1), ("# ((", 0), ('"(((', 0)],
)  # fmt: skip
def test_how_deep_a_grammar_is(grammar: str, deep: int) -> None:
    assert depth(grammar) == deep


def test_a_grammar_passes_and_a_bomb_does_not() -> None:
    assert grammar_of(Sampling()) == AnswerGrammar()
    assert grammar_of(Sampling(grammar='root ::= "a"')) == AnswerGrammar(gbnf='root ::= "a"')
    for bad in ("(" * 101 + ")" * 101, 'root ::= "a\0"'):
        with pytest.raises(GrammarError):
            grammar_of(Sampling(grammar=bad))


@pytest.mark.parametrize("key", ["minLength", "maxLength", "minItems", "maxItems"])
def test_a_schema_may_not_ask_for_a_grammar_without_end(key: str) -> None:
    schema = f'{{"properties": {{"a": {{"{key}": 1000000000}}}}}}'
    with pytest.raises(GrammarError, match=f"{key} 1000000000, at most"):
        grammar_of(Sampling(json_schema=schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [f"v{number}" for number in range(1500)]},
        {"properties": {f"k{number}": {"type": "string"} for number in range(500)}},
        {"type": "string", "pattern": "^(a{1,100}){1,100}$"},
        {"allOf": [{"anyOf": [{"type": "string", "pattern": f"a{i}b{j}"} for j in range(20)]} for i in range(9)]},
    ],
)
def test_a_schema_that_stands_for_a_large_grammar_is_compiled_or_refused(schema: dict[str, Any]) -> None:
    with suppress(GrammarError):
        grammar_of(Sampling(json_schema=json.dumps(schema)))


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ("[1]", "is no object"),
        ("{", "is no JSON"),
        ('{"type": "nothing"}', "Invalid type"),
        ('{"properties": {"a": {"items": {"type": 7}}}}', "type must be a string"),
        ('{"$ref": "#/nowhere"}', "does not exist"),
        ('{"$ref": "http://example.com/x"}', "cannot be used"),
        ('{"$ref": 1}', "cannot be used"),
        ('{"enum": []}', "Unsatisfiable"),
        ('{"enum": 1}', "enum must be an array"),
        ('{"properties": []}', "properties must be an object"),
        ('{"type": "array", "items": {}, "minItems": 3, "maxItems": 2}', "Unsatisfiable"),
        ('{"type": "string", "minLength": 50000}', "minLength 50000, at most"),
        ('{"type": "string", "minLength": -1}', "cannot be used"),
        ('{"type": "integer", "minimum": 2, "maximum": 1}', "Unsatisfiable"),
        ('{"type": "string", "pattern": "(?=a)"}', "cannot be used"),
        ('{"type": "string", "pattern": "("}', "cannot be used"),
        ('{"type": [[["object"]]]}', "cannot be used"),
        ('{"anyOf": [{"$ref": "#"}], "type": "object"}', "circular"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_used(schema: str, problem: str) -> None:
    with pytest.raises(GrammarError, match=problem):
        grammar_of(Sampling(json_schema=schema))


#: No deadline: the speed of this machine is not under test.
UNHURRIED = settings(suppress_health_check=[HealthCheck.too_slow])
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
        assert grammar_of(Sampling(json_schema=json.dumps(schema))).lark.startswith("start: ")


@UNHURRIED
@given(st.text(st.sampled_from('ab^$.*+?{}[]()|\\-,12dwsuxnéñ"/'), max_size=14))
def test_any_pattern_is_compiled_or_refused(pattern: str) -> None:
    with suppress(GrammarError):
        grammar_of(Sampling(json_schema=json.dumps({"type": "string", "pattern": pattern})))


# --- tools -------------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [Tool(Function("weather", parameters=SCHEMA)), Tool(Function("now"))]


def test_calls_have_one_form() -> None:
    text = grammar_of(Sampling(tool_choice="required"), TOOLS).lark
    assert text.startswith("start: call\n")
    assert r'"{\"name\": \"weather\", \"arguments\": "' in text
    assert r'"{\"name\": \"now\", \"arguments\": "' in text
    assert 'call: "<tool_call>\\n" body' in text


def test_where_a_call_may_come_any_text_may_come_before_it() -> None:
    assert grammar_of(Sampling(tool_choice="auto"), TOOLS).lark.startswith("start: TEXT | before")


def test_only_the_tools_that_are_named() -> None:
    wanted = grammar_of(Sampling(tool_choice="required", tool_names=["now"]), TOOLS)
    assert "weather" not in wanted.lark and "now" in wanted.lark


def test_how_many_calls() -> None:
    many = f"{{0,{limits.TOOL_CALLS - 1}}}"
    required = Sampling(tool_choice="required")
    assert many in grammar_of(required, TOOLS, parallel=True).lark.splitlines()[0]
    assert many not in grammar_of(required, TOOLS).lark.splitlines()[0]
    alone = Sampling(tool_choice="required", parallel_tool_calls=False)
    assert many not in grammar_of(alone, TOOLS, parallel=True).lark.splitlines()[0]


def test_a_call_or_else_what_the_schema_says() -> None:
    either = grammar_of(Sampling(tool_choice="auto", json_schema='{"type": "object"}'), TOOLS)
    assert either.lark.splitlines()[0] == "start: call | answer"
    # A call was asked for: the schema is for other answers
    assert grammar_of(Sampling(tool_choice="required", json_schema="{}"), TOOLS) == grammar_of(
        Sampling(tool_choice="required"), TOOLS
    )


def test_tools_with_long_schemas_are_refused_together() -> None:
    long = [
        Tool(Function(f"f{number}", parameters={"description": "x" * (limits.GRAMMAR_CHARS - 100)}))
        for number in range(40)
    ]
    with pytest.raises(GrammarError, match="the schemas of the tools have"):
        grammar_of(Sampling(tool_choice="auto"), long)


@pytest.mark.parametrize(
    ("options", "tools", "problem"),
    [
        ({}, [], "the prompt has no tools"),
        ({"tool_names": ["no"]}, TOOLS, "no tool of that name"),
        ({"grammar": 'root ::= "a"'}, TOOLS, "excludes"),
        ({}, [Tool(Function("f", parameters={"type": "array"}))], "schema of tool 'f' is of type 'array'"),
        (
            {},
            [*TOOLS, Tool(Function("f", parameters={"properties": {"a": {"type": 1}}}))],
            "tool 'f' cannot be used: type must",
        ),
        ({}, [Tool(Function("f", parameters={"description": "x" * limits.GRAMMAR_CHARS}))], "tool 'f' has"),
        ({}, [Tool(Function("f", parameters={"maxLength": 10**9}))], "tool 'f' has maxLength"),
    ],
)
def test_tools_that_cannot_be_used_are_named(options: dict[str, Any], tools: list[Tool], problem: str) -> None:
    with pytest.raises(GrammarError, match=problem):
        grammar_of(Sampling(tool_choice="auto", **options), tools)


def test_a_tool_nested_too_deep_is_named() -> None:
    deep: dict[str, Any] = {}
    for _ in range(60):
        deep = {"properties": {"a": deep}}
    with pytest.raises(GrammarError, match="tool 'f' is nested more than 100 deep"):
        grammar_of(Sampling(tool_choice="auto"), [Tool(Function("f", parameters=deep))])
