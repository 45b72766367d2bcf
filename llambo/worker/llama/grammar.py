"""What an answer has to look like: the grammar of a request, a JSON schema, or calls of tools.

A grammar that a user wrote (GBNF) is llama.cpp's to follow. Everything else becomes a grammar of llguidance, in its
Lark syntax, with JSON schemas in it as they are: `worker/llama/guide.py` follows it.

What comes in is bounded before a parser sees it: llama.cpp's parser recurses, and a grammar nested deeply enough has
crashed it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
from llguidance import LLMatcher

from llambo.mesh.wire import conversation, limits
from llambo.mesh.wire.conversation import Tool
from llambo.mesh.wire.messages import Sampling

#: The schemas of all tools of a request, as a grammar.
TOOLS_CHARS = 32 * limits.GRAMMAR_CHARS
#: A schema may require so many characters or items.
MAX_REPETITIONS = 10_000
#: Schemas whose check is remembered: in a chat the same tools come again and again.
CHECKED = 256
#: The keys that require them.
REPETITION_KEYS = ("minLength", "maxLength", "minItems", "maxItems")
#: How llguidance compiles a schema. Keywords it does not know are ignored, and so is the difference between `oneOf`
#: and `anyOf`. At most one blank is between two tokens of JSON: without that bound an answer may end in blanks.
#: Characters are written as they are and not as `\u0061`, which would let a key stand twice under two spellings.
JSON_OPTIONS = {
    "lenient": True,
    "coerce_one_of": True,
    "whitespace_pattern": " ",
    "json_allowed_escapes": '"\\bfnrt',
}


class GrammarError(Exception):
    """The grammar or schema cannot be used; the text gives the reason."""


class AnswerGrammar(NamedTuple):
    """At most one of the two."""

    #: A grammar for llama.cpp, whose first rule is `root`.
    gbnf: str = ""
    #: A grammar for llguidance.
    lark: str = ""


def grammar_of(options: Sampling, tools: Sequence[Tool] = (), *, parallel: bool = False) -> AnswerGrammar:
    """`parallel`: several calls in one answer, if the request does not specify it. Raises GrammarError."""
    if options.grammar and (options.json_schema or options.tool_choice != "none"):
        raise GrammarError("a grammar excludes a JSON schema and tools")
    if options.tool_choice != "none":
        if options.parallel_tool_calls is not None:
            parallel = options.parallel_tool_calls
        return AnswerGrammar(lark=_calls(options, tools, limits.TOOL_CALLS if parallel else 1))
    if options.json_schema:
        return AnswerGrammar(lark=f"start: answer\n{_schema_rule('answer', options.json_schema, 'the JSON schema')}")
    return AnswerGrammar(gbnf=_checked_gbnf(options.grammar))


# --- calls of tools --------------------------------------------------------------------------------------------------


def _calls(options: Sampling, tools: Sequence[Tool], most: int) -> str:
    """`auto`: any text without the tag of a call, which may be followed by calls. A model that has begun a call must
    end it."""
    known = {tool.function.name: tool.function for tool in tools}
    if not known:
        raise GrammarError(f"tool_choice is {options.tool_choice}, and the prompt has no tools")
    for name in options.tool_names:
        if name not in known:
            raise GrammarError(f"tool_names has {name!r}, and the prompt has no tool of that name")
    begin, end = conversation.CALL_BEGIN, conversation.CALL_END
    more = f' ("\\n" call){{0,{most - 1}}}' if most > 1 else ""
    bodies: list[str] = []
    rules = [f'call: "{begin}\\n" body', ""]
    for name, function in known.items():
        if not options.tool_names or name in options.tool_names:
            number = len(bodies)
            bodies.append(f"body{number}")
            head = json.dumps(f'{{"name": "{name}", "arguments": ')
            rules.append(f'body{number}: {head} arguments{number} "}}"')
            rules.append(_arguments_rule(f"arguments{number}", name, function.parameters))
    rules[1] = f'body: ({" | ".join(bodies)}) "\\n{end}"'
    if options.tool_choice == "required":
        rules.insert(0, f"start: call{more}")
    elif options.json_schema:  # from the first token on: a call, or else what the schema describes
        rules.insert(0, f"start: call{more} | answer")
        rules.append(_schema_rule("answer", options.json_schema, "the JSON schema"))
    else:
        rules.insert(0, f'start: TEXT | before "\\n"? body{more}')
        rules.append(f"before[lazy]: /(?s:.*){begin}/")
        rules.append(f"TEXT: /(?s:.*)/ & ~/(?s:.*){begin}(?s:.*)/")
    text = "\n".join(rules)
    if len(text) > TOOLS_CHARS:
        raise GrammarError(f"the schemas of the tools have {len(text)} characters, at most {TOOLS_CHARS} are allowed")
    return text


def _arguments_rule(rule: str, name: str, parameters: dict[str, Any] | None) -> str:
    """The arguments are an object, whatever the schema specifies or leaves open."""
    what = f"the schema of tool {name!r}"
    schema = parameters or {"properties": {}}
    length = len(msgspec.json.encode(schema))
    if length > limits.GRAMMAR_CHARS:
        raise GrammarError(f"{what} has {length} characters, at most {limits.GRAMMAR_CHARS} are allowed")
    if schema.get("type", "object") != "object":
        raise GrammarError(f"{what} is of type {schema['type']!r}, and arguments are an object")
    return _rule(rule, {**schema, "type": "object"}, what)


# --- JSON schemas ----------------------------------------------------------------------------------------------------


def _schema_rule(rule: str, text: str, what: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{what} is no JSON: {error}") from error
    return _rule(rule, schema, what)


def _rule(rule: str, schema: Any, what: str) -> str:
    _check(schema, what)
    text = json.dumps({**_closed(schema), "x-guidance": JSON_OPTIONS})
    if problem := _problem(text):
        raise GrammarError(f"{what} cannot be used: {problem}")
    return f"{rule}: %json {text}"


@lru_cache(CHECKED)
def _problem(schema: str) -> str:
    """Why llguidance refuses a schema, or nothing."""
    text: str = LLMatcher.validate_grammar(f"start: %json {schema}")
    first = next((line for line in text.splitlines() if line.strip()), "")
    return first.rpartition("failed to compile JSON schema: ")[2]


def _check(schema: Any, what: str) -> None:
    if not isinstance(schema, dict):
        raise GrammarError(f"{what} is no object")
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, level = waiting.pop()
        if level > limits.GRAMMAR_DEPTH:
            raise GrammarError(f"{what} is nested more than {limits.GRAMMAR_DEPTH} deep")
        for key in REPETITION_KEYS if isinstance(value, dict) else ():
            count = value.get(key)
            if isinstance(count, int) and count > MAX_REPETITIONS:
                raise GrammarError(f"{what} has {key} {count}, at most {MAX_REPETITIONS} are allowed")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(each, level + 1) for each in inner]


def _closed(schema: Any) -> Any:
    """`properties` mean an object that has no others, unless the schema specifies more: people intend that, and a model
    would go on inventing keys. With `allOf` nothing is closed, because its parts would exclude each other.

    `nullable` is a word of OpenAPI's for `null` beside a type.
    """
    return _closing(schema, close='"allOf"' not in json.dumps(schema))


def _closing(value: Any, *, close: bool) -> Any:
    if isinstance(value, list):
        return [_closing(each, close=close) for each in value]
    if not isinstance(value, dict):
        return value
    made = {key: each if key in ("enum", "const") else _closing(each, close=close) for key, each in value.items()}
    properties = made.get("properties")
    if close and isinstance(properties, dict) and not made.keys() & _OPENING:
        made["additionalProperties"] = False
        made.setdefault("type", "object")
    if made.pop("nullable", None) is True and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made


#: Keywords by which a schema itself specifies what else an object may have.
_OPENING = {"additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref"}


# --- a user's own grammar --------------------------------------------------------------------------------------------


def _checked_gbnf(text: str) -> str:
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
