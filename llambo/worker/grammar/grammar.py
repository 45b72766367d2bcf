"""The grammar of an answer, in GBNF: the grammar of the request, of a JSON schema, or of tool calls.

llama.cpp's parser of grammars is recursive, and deeply nested grammars have crashed it. So the input is bounded before
a grammar is made from it, and the result is bounded again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from llambo.mesh.wire import conversation, limits
from llambo.mesh.wire.conversation import Tool
from llambo.mesh.wire.messages import Sampling
from llambo.worker.grammar.schema import Rules, quoted
from llambo.worker.prompt.template import RENDER_BYTES, memory_limit, time_limit

#: The longest grammar made from a schema. A few kilobytes of schema can make a large one.
MADE_CHARS = 8 * limits.GRAMMAR_CHARS
#: The longest grammar made from all tools of a request.
TOOLS_MADE_CHARS = 4 * MADE_CHARS
#: The most characters or items that a schema may ask for, with these keys.
MADE_REPETITIONS = 10_000
REPETITIONS = ("minLength", "maxLength", "minItems", "maxItems")
#: A grammar is made in milliseconds. A schema that takes longer is an attack.
MADE_S = 2.0
#: Grammars that are cached: each request of a chat has the same tools.
CACHED = 8


class GrammarError(Exception):
    """The grammar or schema cannot be used; the text says why."""


class GrammarText(NamedTuple):
    """GBNF, or empty. `lazy`: it applies after the tag that begins a call; before that any text is allowed."""

    text: str
    lazy: bool = False


def grammar_of(options: Sampling, tools: Sequence[Tool] = (), *, parallel: bool = False) -> GrammarText:
    """`parallel`: the default for several calls in one answer. Raises GrammarError."""
    if options.grammar and (options.json_schema or options.tool_choice != "none"):
        raise GrammarError("a grammar excludes a JSON schema and tools")
    if options.tool_choice != "none":
        if options.parallel_tool_calls is not None:
            parallel = options.parallel_tool_calls
        return _grammar_of_calls(options, tools, limits.TOOL_CALLS if parallel else 1)
    if options.json_schema:
        return GrammarText(_made((), options.json_schema))
    return GrammarText(_checked(options.grammar, "the grammar"))


def _read_schema(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is not valid JSON: {error}") from error


def _rule_of(rules: Rules, schema: Any, what: str) -> str:
    _check_schema(schema, what)
    try:
        return rules.of(schema)
    except ValueError as error:
        raise GrammarError(f"{what} cannot be used: {error}") from error


def _check_schema(schema: Any, what: str) -> None:
    if not isinstance(schema, dict):
        raise GrammarError(f"{what} is not an object")
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, level = waiting.pop()
        if level > limits.GRAMMAR_DEPTH:
            raise GrammarError(f"{what} is nested more than {limits.GRAMMAR_DEPTH} deep")
        for key in REPETITIONS if isinstance(value, dict) else ():
            count = value.get(key)
            if isinstance(count, int) and count > MADE_REPETITIONS:
                raise GrammarError(f"{what} has {key} {count}, at most {MADE_REPETITIONS} are allowed")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(each, level + 1) for each in inner]


def _grammar_of_calls(options: Sampling, tools: Sequence[Tool], most: int) -> GrammarText:
    known = {tool.function.name: tool.function for tool in tools}
    if not known:
        raise GrammarError(f"tool_choice is {options.tool_choice}, and the prompt has no tools")
    for name in options.tool_names:
        if name not in known:
            raise GrammarError(f"tool_names has {name!r}, and the prompt has no tool of that name")
    schemas = tuple(
        (name, msgspec.json.encode(function.parameters) if function.parameters else b"")
        for name, function in known.items()
        if not options.tool_names or name in options.tool_names
    )
    if options.tool_choice == "required":
        return GrammarText(_made(schemas, most=most))
    if options.json_schema:  # from the first token on either a call or a text that satisfies the schema
        return GrammarText(_made(schemas, options.json_schema, most=most))
    return GrammarText(_made(schemas, lazy=True, most=most), lazy=True)


@lru_cache(CACHED)
def _made(schemas: tuple[tuple[str, bytes], ...], schema: str = "", *, lazy: bool = False, most: int = 1) -> str:
    """GBNF for calls, for a schema, or for a choice of both."""
    rules = Rules()
    choices = []
    try:
        with time_limit(MADE_S), memory_limit(RENDER_BYTES):
            if schemas:
                choices.append(_calls(rules, schemas, lazy, most))
            if schema:
                choices.append(_rule_of(rules, _read_schema(schema), "the JSON schema"))
            text = rules.text(" | ".join(choices))
    except (TimeoutError, MemoryError) as error:
        raise GrammarError(f"no grammar can be made of the schemas: {error}") from error
    allowed = TOOLS_MADE_CHARS if schemas else MADE_CHARS
    if len(text) > allowed:
        raise GrammarError(f"the schemas make a grammar of {len(text)} characters, {allowed} are allowed")
    return _checked(text, "the grammar of the schemas")


def _calls(rules: Rules, schemas: tuple[tuple[str, bytes], ...], lazy: bool, most: int) -> str:
    bodies = []
    for name, schema in schemas:
        head = quoted(f'{{"name": "{name}", "arguments": ')
        bodies.append(f'{head} {_arguments(rules, name, schema)} "}}"')
    body, end = rules.rule(" | ".join(bodies)), quoted(f"\n{conversation.CALL_END}")
    call = rules.rule(f'{quoted(conversation.CALL_BEGIN)} "\\n" {body} {end}')
    # With a lazy grammar the tag was written already, perhaps with its line end.
    first = f'"\\n"? {body} {end}' if lazy else call
    return f'{first} ("\\n" {call}){{0,{most - 1}}}' if most > 1 else first


def _arguments(rules: Rules, name: str, schema: bytes) -> str:
    """Arguments are an object, whatever the schema says."""
    what = f"the schema of tool {name!r}"
    if len(schema) > limits.GRAMMAR_CHARS:
        raise GrammarError(f"{what} has {len(schema)} characters, {limits.GRAMMAR_CHARS} are allowed")
    wanted = json.loads(schema) if schema else {"properties": {}}
    if wanted.get("type", "object") != "object":
        raise GrammarError(f"{what} is of type {wanted['type']!r}, but arguments are an object")
    return _rule_of(rules, {**wanted, "type": "object"}, what)


def _checked(text: str, what: str) -> str:
    if depth(text) > limits.GRAMMAR_DEPTH:
        raise GrammarError(f"{what} is nested more than {limits.GRAMMAR_DEPTH} deep")
    if "\0" in text:
        raise GrammarError(f"{what} contains a NUL character")
    return text


def depth(grammar: str) -> int:
    """How deep groups are nested. Brackets in strings and character classes do not count."""
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
