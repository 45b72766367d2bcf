"""What schemas and calls of tools let through, with a real vocabulary."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from llambo.mesh.wire.conversation import Function, Tool
from llambo.mesh.wire.messages import Sampling
from llambo.worker.llama import llama
from llambo.worker.llama.grammar import grammar_of
from llambo.worker.llama.guide import Guide, Guides
from llambo.worker.models import model_files


@pytest.fixture(scope="module")
def model() -> llama.Model:
    return llama.Model(str(model_files.find("smollm2")), safe=True)


@pytest.fixture(scope="module")
def guides(model: llama.Model) -> Guides:
    return Guides(model)


def guide(guides: Guides, schema: Any) -> Guide:
    return guides.guide(grammar_of(Sampling(json_schema=json.dumps(schema))).lark)


class Walker:
    """Follows a grammar token by token."""

    def __init__(self, model: llama.Model, grammar: Guide) -> None:
        self.model = model
        self.grammar = grammar

    def passes(self, text: str) -> bool:
        """All of it, and it may end there."""
        for token in self.model.tokenize(text.encode(), special=False):
            if not self.grammar.allows(token):
                return False
            self.grammar.accept(token)
        return self.grammar.allows(self.model.endings[0])

    def wander(self, chance: np.random.Generator, most: int) -> str:
        """Any text it allows: closing is made likely, or it would hardly come to an end."""
        candidates = llama.Candidates(self.model, Sampling(top_k=0), llama.shared_candidates(self.model), [])
        written = b""
        for step in range(most):
            logits = chance.normal(0, 2, self.model.tokens).astype(np.float32)
            for token, piece in self.closing:
                logits[token] += min(step, 14) if piece else 20
            ids, left = candidates.mask(logits, self.grammar)
            token = int(ids[left.argmax()])
            if self.model.ends(token):
                return written.decode()
            self.grammar.accept(token)
            written += self.model.piece(token)
        raise AssertionError(f"it goes on for ever: {written!r}")

    @property
    def closing(self) -> list[tuple[int, bytes]]:
        found = [(self.model.tokenize(char, special=False)[0], char) for char in (b'"', b"}", b"]", b",", b'":', b"\\")]
        return [*found, (self.model.endings[0], b"")]


ANY = {"type": "object"}
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["age"]}
CASES: list[tuple[Any, list[str], list[str]]] = [
    (
        ANY,
        ["{}", '{"a": [1, {"b": null}], "c":true}', '{"é漢": "\\n"}'],
        ["", "[]", '"x"', '{"a":}', '{"a": "\n"}', "{} ", '{"a": "\\ud800"}'],
    ),
    ({}, ["1", '"x"', "[]", "{}", "null", "-1.5e+10"], ["01", "x", "1.", "+1"]),
    (
        PERSON,
        ['{"name": "Ann", "age": 3}', '{"age":0}'],
        ['{"name": "Ann"}', '{"age": 3, "name": "Ann"}', '{"age": 3.5}', '{"age": 3, "x": 1}', "{}"],
    ),
    ({"properties": {}}, ["{}"], ['{"a": 1}']),
    (
        {"properties": {"a": {}, "b": {}, "c": {}}, "required": ["b"]},
        ['{"b": 1}', '{"a": 1, "b": 2}', '{"b": 1, "c": 2}', '{"a": [], "b": {}, "c": ""}'],
        ["{}", '{"a": 1, "c": 1}', '{"c": 1, "b": 1}'],
    ),
    (
        {"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
        ["{}", '{"a": null}', '{"a": null, "ab": 1, "b": 2}', '{"": 1}', '{"b": 1}'],
        ['{"a": 1}', '{"b": null}', '{"a": null, "a": 1}', '{"\\u0061": 1}'],
    ),
    ({"type": "object", "required": ["x"]}, ['{"x": [1]}'], ["{}", '{"y": 1}']),
    ({"type": "object", "additionalProperties": False}, ["{}"], ['{"y": 1}']),
    (
        {"enum": ["a", 1, None, 'say "hi"\\', "é", {"k": [True]}]},
        ['"a"', "1", "null", '"say \\"hi\\"\\\\"', '"é"', '{"k": [true]}'],
        ['"b"', "2", '"A"'],
    ),
    ({"const": "x\ny"}, ['"x\\ny"'], ['"x"']),
    ({"type": ["string", "null"], "maxLength": 3}, ["null", '"abc"', '""'], ['"abcd"', "1"]),
    ({"type": "string", "nullable": True}, ["null", '"abc"'], ["1"]),
    (
        {"type": "string", "minLength": 2, "maxLength": 500},
        ['"ab"', '"' + "x" * 500 + '"'],
        ['"a"', '"' + "x" * 501 + '"'],
    ),
    (
        {"type": "string", "format": "date"},
        ['"2026-02-28"', '"1999-12-31"', '"2026-06-30"'],
        ['"2026-02-30"', '"2026-13-01"', '"2026-06-31"', '"x"'],
    ),
    (
        {"type": "string", "format": "date-time"},
        ['"2026-02-28T23:59:59Z"', '"2026-02-28T00:00:00.5+01:00"'],
        ['"2026-02-28"', '"2026-02-28T24:00:00Z"'],
    ),
    ({"type": "string", "format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['"123e4567"']),
    ({"type": "integer", "minimum": 1, "maximum": 14}, ["1", "9", "10", "14"], ["0", "15", "-1", "01", "100"]),
    (
        {"type": "integer", "minimum": -12, "exclusiveMaximum": 305},
        ["-12", "-1", "0", "304", "299", "47"],
        ["-13", "305", "1000"],
    ),
    ({"type": "integer", "minimum": 100}, ["100", "999", "1000", "123456789"], ["99", "0", "-100"]),
    ({"type": "integer", "maximum": -5}, ["-5", "-10", "-99999"], ["-4", "5", "0"]),
    ({"type": "integer", "minimum": 0, "maximum": 9223372036854775807}, ["0", "123456"], ["-1"]),
    (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        ["[true]", "[true, false,true]"],
        ["[]", "[true, true, true, true]", "[1]"],
    ),
    ({"type": "array"}, ["[]", '[1, "x", []]'], ["{}", "[1,]"]),
    ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
    ({"prefixItems": [{"type": "integer"}, {"type": "string"}]}, ['[1, "x"]'], ['["x", 1]', "[1, 2]"]),
    ({"anyOf": [{"type": "integer"}, PERSON]}, ["1", '{"age": 1}'], ["{}", "null"]),
    (
        {"type": "object", "properties": {"a": {}, "b": {}}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        ['{"a": 1}', '{"b": 1}'],
        ["{}"],
    ),
    (
        {"allOf": [PERSON, {"properties": {"z": {"type": "null"}}, "required": ["z"]}]},
        ['{"age": 1, "z": null}'],
        ['{"age": 1}'],
    ),
    (
        {
            "$defs": {
                "t": {
                    "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/t"}}},
                    "required": ["v"],
                }
            },
            "$ref": "#/$defs/t",
        },
        ['{"v": 1}', '{"v": 1, "kids": [{"v": 2, "kids": []}]}'],
        ["{}", '{"v": 1, "kids": [{}]}'],
    ),
    (
        {"properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        ['{"next": {"next": null}}', "{}"],
        ['{"next": 1}'],
    ),
    ({"type": "string", "pattern": "^[A-Z]{2}-\\d{1,3}$"}, ['"AB-1"', '"XY-123"'], ['"A-1"', '"AB-1234"', '"AB-1 "']),
    (
        {"type": "string", "pattern": "^(?:red|gr[ae]y|\\w+@x\\.org)?$"},
        ['"red"', '"grey"', '"a_1@x.org"', '""'],
        ['"grxy"', '"a@xzorg"'],
    ),
    ({"type": "string", "pattern": "b+"}, ['"abc"', '"b"'], ['"ac"', '""']),
    ({"type": "string", "pattern": '^[^\\d\\s]+\\\\"$'}, ['"ab\\\\\\""'], ['"a1\\\\\\""', '"ab"']),
]


@pytest.mark.parametrize(("schema", "good", "bad"), CASES, ids=[json.dumps(case[0])[:50] for case in CASES])
def test_what_a_schema_lets_through(
    model: llama.Model, guides: Guides, schema: Any, good: list[str], bad: list[str]
) -> None:
    for case in good:
        assert Walker(model, guide(guides, schema)).passes(case), case
    for case in bad:
        assert not Walker(model, guide(guides, schema)).passes(case), case


#: Without the last one: chance hardly ever ends a text that has to end in a backslash and a quote.
WANDERED = [case[0] for case in CASES[:-1]]


@pytest.mark.parametrize("schema", WANDERED, ids=[json.dumps(schema)[:50] for schema in WANDERED])
def test_every_text_it_lets_through_satisfies_the_schema(model: llama.Model, guides: Guides, schema: Any) -> None:
    for seed in range(2):
        written = Walker(model, guide(guides, schema)).wander(np.random.default_rng(seed), 300)
        if schema.get("nullable") and written == "null":  # a word of OpenAPI's
            continue
        assert jsonschema_rs.is_valid(schema, json.loads(written)), written


# --- calls ---------------------------------------------------------------------------------------------------------

TOOLS = [Tool(Function("now"))]
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def calls(guides: Guides, choice: Any = "auto", **more: Any) -> Guide:
    return guides.guide(grammar_of(Sampling(tool_choice=choice, **more), TOOLS).lark)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("", True),
        ("Any text {1 <tool_calls> and <tool_call", True),
        (f"Well.\n{CALL}", True),
        (CALL, True),
        ("Well.\n<tool_call>", False),
        ("<tool_call>{1", False),
        (f"{CALL} and more", False),
        (f"{CALL}\n{CALL}", False),
    ],
)
def test_text_and_then_a_call(model: llama.Model, guides: Guides, text: str, whole: bool) -> None:
    assert Walker(model, calls(guides)).passes(text) is whole


def test_several_calls_where_they_are_allowed(model: llama.Model, guides: Guides) -> None:
    several = {"parallel_tool_calls": True}
    assert Walker(model, calls(guides, **several)).passes(f"Well.\n{CALL}\n{CALL}\n{CALL}")
    assert Walker(model, calls(guides, "required", **several)).passes(f"{CALL}\n{CALL}")
    assert not Walker(model, calls(guides, "required")).passes("Well.")


def test_a_token_that_ends_the_tag_and_goes_on_is_not_allowed(model: llama.Model, guides: Guides) -> None:
    pieces = ((token, model.piece(token)) for token in range(model.tokens))
    tokens = [token for token, piece in pieces if piece.startswith(b">") and piece[1:].strip(b"\n")]
    assert tokens, "this vocabulary has none, and the test nothing to try"
    grammar = calls(guides)
    assert all(map(grammar.allows, tokens))
    for token in model.tokenize(b"<tool_call", special=False):
        grammar.accept(token)
    assert not any(map(grammar.allows, tokens))
    with pytest.raises(ValueError, match="refuses"):
        grammar.accept(tokens[0])
    # ... and is not among the candidates, while everything else is
    candidates = llama.Candidates(model, Sampling(top_k=0), llama.shared_candidates(model), [])
    logits = np.zeros(model.tokens, np.float32)
    logits[tokens] = 30.0
    ids, left = candidates.mask(logits, grammar)
    assert not np.isfinite(left[np.isin(ids, tokens)]).any()
    assert np.isfinite(left).sum() > len(ids) - 1000


# --- which candidates are asked ------------------------------------------------------------------------------------


def test_asking_the_likeliest_first_changes_nothing(
    model: llama.Model, guides: Guides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a grammar that is asked for every token of the vocabulary."""
    options = Sampling(top_k=40, top_p=0.95, min_p=0.05)

    def left(logits: Any, after: str) -> tuple[set[int], int]:
        grammar = guide(guides, PERSON)
        for token in model.tokenize(after.encode(), special=False):
            grammar.accept(token)
        candidates = llama.Candidates(model, options, llama.shared_candidates(model), [])
        ids, narrowed = candidates.narrow(logits, grammar)
        best, masked = candidates.mask(logits, grammar)
        return set(ids[np.isfinite(narrowed)].tolist()), int(best[masked.argmax()])

    states = ["", '{"', '{"name": "A', '{"name": "Ann", "age": 4']
    rows = [np.random.default_rng(seed).normal(0, 3, model.tokens).astype(np.float32) for seed in range(3)]
    quick = [left(row, after) for row in rows for after in states]
    monkeypatch.setattr(llama, "LIKELIEST", ())
    assert quick == [left(row, after) for row in rows for after in states]
