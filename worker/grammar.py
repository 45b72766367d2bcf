"""What a grammar may be: llama.cpp's parser recurses, and one nested deeply enough has crashed it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from llambo.mesh import limits
from llambo.mesh.messages import Sampling
from llambo.worker.prompts import RENDER_BYTES, memory_limit, time_limit

#: A schema of a few kilobytes can stand for a large grammar, but not for one without end.
MADE_CHARS = 8 * limits.GRAMMAR_CHARS
#: A schema may ask for so many characters or items: each becomes a piece of the grammar.
MADE_REPETITIONS = 10_000
#: The keys that ask for them.
REPETITIONS = ("minLength", "maxLength", "minItems", "maxItems")
#: Making a grammar of a schema takes milliseconds; one that takes longer means harm.
MADE_S = 2.0


class GrammarError(Exception):
    """The grammar or schema cannot be used; the text says why."""


def grammar_text(options: Sampling, of_schema: Callable[[str], str]) -> str:
    """GBNF, or nothing. Raises GrammarError."""
    if options.grammar and options.json_schema:
        raise GrammarError("a grammar and a JSON schema exclude each other")
    if options.json_schema:
        _check_schema(options.json_schema)
        try:
            with time_limit(MADE_S), memory_limit(RENDER_BYTES):
                text = of_schema(options.json_schema)
        except (ValueError, TimeoutError, MemoryError) as error:
            raise GrammarError(f"the JSON schema cannot be used: {error}") from error
        if len(text) > MADE_CHARS:
            raise GrammarError(f"the JSON schema makes a grammar of {len(text)} characters, {MADE_CHARS} may be")
    else:
        text = options.grammar
    if depth(text) > limits.GRAMMAR_DEPTH:
        raise GrammarError(f"the grammar is nested more than {limits.GRAMMAR_DEPTH} deep")
    if "\0" in text:
        raise GrammarError("the grammar has a NUL in it")
    return text


def depth(grammar: str) -> int:
    """How deep its groups are nested, without those in strings and character classes."""
    deepest = level = at = 0
    while at < len(grammar):
        char = grammar[at]
        if char == "\\":
            at += 1
        elif char in '"[':
            at = _end_of(grammar, at + 1, '"' if char == '"' else "]")
        elif char == "#":
            at = grammar.find("\n", at) if "\n" in grammar[at:] else len(grammar)
        elif char == "(":
            level += 1
            deepest = max(deepest, level)
        elif char == ")":
            level -= 1
        at += 1
    return deepest


def _end_of(grammar: str, at: int, close: str) -> int:
    while at < len(grammar) and grammar[at] != close:
        at += 2 if grammar[at] == "\\" else 1
    return at


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise GrammarError("the JSON schema is no object")
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, level = waiting.pop()
        if level > limits.GRAMMAR_DEPTH:
            raise GrammarError(f"the JSON schema is nested more than {limits.GRAMMAR_DEPTH} deep")
        for key in REPETITIONS if isinstance(value, dict) else ():
            count = value.get(key)
            if isinstance(count, int) and count > MADE_REPETITIONS:
                raise GrammarError(f"the JSON schema has {key} {count}, at most {MADE_REPETITIONS} may be")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(each, level + 1) for each in inner]
