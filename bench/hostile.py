"""Hostile input: chat templates and grammars."""

from __future__ import annotations

import json
from typing import Any

_GROW = "{% set n = namespace(v=START) %}{% for i in range(200) %}{% set n.v = STEP %}{% endfor %}{{ n.v }}"

#: By what they try. Some fail when the model is loaded, some only with a message.
TEMPLATES: dict[str, str] = {
    "no template": "{% if %}",
    "deeply nested": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a helper": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "another file": "{% include '/etc/passwd' %}",
    "an endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a huge range": "{{ range(10 ** 9) | list }}",
    "a huge text": "{{ 'x' * (10 ** 9) * 10 }}",
    "a huge power": "{{ 10 ** 10 ** 10 }}",
    "doubling text": _GROW.replace("START", "'x'").replace("STEP", "n.v ~ n.v"),
    "doubling a list": _GROW.replace("START", "[1]").replace("STEP", "n.v + n.v"),
    "squaring a number": _GROW.replace("START", "3").replace("STEP", "n.v * n.v"),
    "adding numbers up": _GROW.replace("START", "3").replace("STEP", "n.v + n.v").replace("200", "99999"),
    "padding by a method": "{{ 'x'.ljust(10 ** 10) }}",
    "padding by a format": "{{ '{:>9999999999}'.format('x') }}",
    "padding by percent": "{{ '%9999999999d' % 1 }}",
    "replacing by more": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "indenting": "{{ 'x\n' | indent(10 ** 10) }}",
    "failing on a message": "{% for m in messages %}{% if loop.length and m.content == 'Hello' and not loop.index0 %}"
    "{{ 1 / 0 }}{% endif %}{% endfor %}",
    "a lot of nothing": "{% for a in range(3000) %}{{ ' ' * 1000 }}{% endfor %}",
    "complaining": "{{ raise_exception('this model does not answer') }}",
}


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"json_schema": json.dumps(schema)}


def _nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


#: By what they try, as options of a request.
GRAMMARS: dict[str, dict[str, Any]] = {
    "nonsense": {"grammar": "this is none"},
    "no root": {"grammar": 'other ::= "a"'},
    "a rule that is not there": {"grammar": "root ::= missing"},
    "left recursion": {"grammar": 'root ::= root "a" | "a"'},
    "left recursion by way of others": {"grammar": 'root ::= a\na ::= b\nb ::= a "x" | "y"'},
    "empty recursion": {"grammar": 'root ::= a\na ::= "" | a a'},
    "nested 90 deep": {"grammar": "root ::= " + "(" * 90 + '"a"' + ")" * 90},
    "nested 5000 deep": {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
    "a long one": {"grammar": 'root ::= "' + "a" * 15_000 + '"'},
    "too long a one": {"grammar": 'root ::= "' + "a" * 200_000 + '"'},
    "many repetitions": {"grammar": 'root ::= "a"{1000000}'},
    "repeated repetitions": {"grammar": 'root ::= (("a"{0,900}){0,900}){0,900}'},
    "repetitions of nothing": {"grammar": 'root ::= ((("a"?){0,900})*)*'},
    "stars of stars": {"grammar": 'root ::= ((("a"*)*)*)*'},
    "ambiguous": {"grammar": "root ::= " + " ".join(['("a" | "aa" | "")'] * 400)},
    "many alternatives": {"grammar": "root ::= " + " | ".join(f'"{number}"' for number in range(1500))},
    "a wide class": {"grammar": "root ::= [\\U00000000-\\U0010FFFF]*"},
    "a broken class": {"grammar": "root ::= [a-"},
    "a NUL": {"grammar": 'root ::= "a\0b"'},
    "no JSON": {"json_schema": "{"},
    "no object": {"json_schema": "[]"},
    "both": {"grammar": 'root ::= "a"', "json_schema": "{}"},
    "a schema of itself": _schema({"$ref": "#"}),
    "definitions in a ring": _schema({"$ref": "#/a", "a": {"$ref": "#/b"}, "b": {"$ref": "#/a"}}),
    "another host's schema": _schema({"$ref": "https://example.invalid/schema.json"}),
    "a schema nested 90 deep": _schema(_nested(40)),
    "a schema nested 900 deep": {"json_schema": '{"a":' * 900 + "1" + "}" * 900},
    "a long text": _schema({"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    "many items": _schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**6}),
    "lists of lists": _schema(
        {"type": "array", "maxItems": 900, "items": {"type": "array", "maxItems": 900, "items": {"type": "null"}}}
    ),
    "a bad pattern": _schema({"type": "string", "pattern": "^(((((a+)+)+)+)+)+$"}),
    "a pattern that is none": _schema({"type": "string", "pattern": "^[$"}),
    "a long pattern": _schema({"type": "string", "pattern": "^(a{0,900}){0,900}$"}),
    "many choices": _schema({"enum": [f"choice {number}" for number in range(700)]}),
    "many properties": _schema({"type": "object", "properties": {f"p{n}": {"type": "null"} for n in range(300)}}),
    "types that are none": _schema({"type": "llama"}),
    "a list of types": _schema({"type": [[["object"]]]}),
}
