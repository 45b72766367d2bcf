"""A JSON schema, as a grammar of texts that satisfy it: compact JSON, with properties in the order of the schema.

What a grammar cannot express, or not in a reasonable size, is not enforced: `not`, `uniqueItems`, `if`, `multipleOf`,
and bounds of numbers that are not integers. Everything else is. As in most uses of schemas for models, an object that
lists its properties has no others, unless `additionalProperties` allows them.

Rules that all grammars of JSON need are in `PRIMITIVES`. An integer between two bounds becomes a choice of digit
patterns (`integer`). `Rules` collects the rules of one grammar while it walks through schemas.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from llambo.worker.grammar.pattern import MOST_TIMES, pattern_rule

#: Digits of a number that has no bounds.
DIGITS = 16

PRIMITIVES = {
    "ws": '" "?',
    "char": r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-Ce-fE-F] [0-9a-fA-F]{3} | [dD] [0-7] hex{2}))',
    "hex": "[0-9a-fA-F]",
    "string": r'"\"" char* "\""',
    "natural": f'"0" | [1-9] [0-9]{{0,{DIGITS - 1}}}',
    "integer": '"-"? natural',
    "number": f'"-"? natural ("." [0-9]{{1,{DIGITS}}})? ([eE] [-+]? [0-9]{{1,2}})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "pair": 'string ":" ws value',
    "object": '"{" (pair ("," ws pair)*)? "}"',
    "array": '"[" (value ("," ws value)*)? "]"',
    "value": "object | array | string | number | boolean | null",
    "day": '"0" [1-9] | [12] [0-9]',
    "month-and-day": (
        '("0" [13578] | "1" [02]) "-" (day | "3" [01]) | ("0" [469] | "11") "-" (day | "30")'
        ' | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8])'
    ),
    "date": '[0-9]{4} "-" month-and-day',
    "hours-and-minutes": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9]',
    "time": 'hours-and-minutes ":" [0-5] [0-9] ("." [0-9]{1,6})? ("Z" | [-+] hours-and-minutes)',
}
#: Formats of strings. The 29th of February is not allowed; other formats are not checked.
FORMATS = {
    "date": r'"\"" date "\""',
    "time": r'"\"" time "\""',
    "date-time": r'"\"" date "T" time "\""',
    "uuid": r'"\"" hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12} "\""',
}


class BadSchema(Exception):
    """What is wrong with a schema. `Rules.of` adds where."""


def quoted(text: str) -> str:
    """A literal in a grammar."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def integer(schema: dict[str, Any]) -> str:
    low, high = _bound(schema, "minimum", 1), _bound(schema, "maximum", -1)
    if low is None and high is None:
        return "integer"
    edge = 10**DIGITS - 1
    low, high = max(-edge, -edge if low is None else low), min(edge, edge if high is None else high)
    if low > high:
        raise BadSchema(f"no integer of {DIGITS} digits is within these bounds")
    ways = [f'"-" ({_span(max(1, -high), -low)})'] if low < 0 else []
    return " | ".join([*ways, _span(max(0, low), high)] if high >= 0 else ways)


def _bound(schema: dict[str, Any], name: str, step: int) -> int | None:
    """The first integer within the bound. `exclusive...` is a number, or in an old draft a bool beside the bound."""
    found, exclusive = schema.get(name), schema.get(f"exclusive{name.capitalize()}")
    bounds = []
    for value, excluded in ((found, exclusive is True), (exclusive, True)):
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 10.0**300:
            whole = int(value) if int(value) == value else int(value // 1) + (step > 0)
            bounds.append(whole + step if excluded and whole == value else whole)
    return (max(bounds) if step > 0 else min(bounds)) if bounds else None


def _span(low: int, high: int) -> str:
    """Integers from `low` to `high`, both at least 0."""
    ways = []
    for length in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (length - 1) if length > 1 else 0)
        ways.append(_digits(str(first), str(min(high, 10**length - 1))))
    return " | ".join(ways)


def _digits(low: str, high: str) -> str:
    """Integers between two of the same number of digits."""
    rest = len(low) - 1
    if low == high:
        return f'"{low}"'
    if set(low) == {"0"} and set(high) == {"9"}:
        return f"[0-9]{{{len(low)}}}"
    if low[0] == high[0]:
        return f'"{low[0]}" ({_digits(low[1:], high[1:])})'
    if rest == 0:
        return f"[{low}-{high}]"
    first, last = int(low[0]), int(high[0])
    ways = []
    if low[1:] != "0" * rest:
        ways.append(f'"{first}" ({_digits(low[1:], "9" * rest)})')
        first += 1
    tail = f'"{last}" ({_digits("0" * rest, high[1:])})' if high[1:] != "9" * rest else ""
    last -= 1 if tail else 0
    if first <= last:
        ways.append(f"[{first}-{last}] [0-9]{{{rest}}}")
    return " | ".join([*ways, tail] if tail else ways)


#: Keys that only combine or refer to other schemas.
_COMBINING = ("$ref", "anyOf", "oneOf", "allOf")
#: Keys that imply the type of a schema without one.
_HINTS = {
    "object": {"properties", "additionalProperties", "required", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"pattern", "format", "minLength", "maxLength"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
}


class Rules:
    """The rules of one grammar. Several schemas may share it."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = dict(PRIMITIVES)
        self._root: Any = {}
        #: The rule of each reference in the current schema.
        self._references: dict[str, str] = {}
        self._where: list[str] = []

    def text(self, root: str) -> str:
        rules = {"root": root, **self._rules}
        return "\n".join(f"{name} ::= {rule}" for name, rule in rules.items())

    def of(self, schema: Any) -> str:
        """The name of the rule for a whole schema. Raises ValueError with the place of the problem."""
        self._root, self._references, self._where = schema, {}, []
        try:
            return self._rule(schema)
        except RecursionError as error:
            raise ValueError("it refers to itself without end") from error
        except BadSchema as error:
            where = "/".join(self._where)
            raise ValueError(f"{error} (at #/{where})" if where else str(error)) from error

    def rule(self, body: str) -> str:
        name = f"r{len(self._rules)}"
        self._rules[name] = body
        return name

    # One schema.

    def _rule(self, schema: Any) -> str:
        """The name of the rule for this schema. Primitives have names already."""
        body = self._body(schema)
        return body if body in self._rules else self.rule(body)

    def _at(self, step: str, schema: Any) -> str:
        self._where.append(step)
        name = self._rule(schema)
        self._where.pop()
        return name

    def _body(self, schema: Any) -> str:
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, dict):
            raise BadSchema(f"a schema is an object, and not {json.dumps(schema)[:40]}")
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        if "const" in schema:
            return _constant(schema["const"])
        if "enum" in schema:
            return _any_of(_constant(value) for value in _list(schema, "enum"))
        if "allOf" in schema:
            rest = {key: value for key, value in schema.items() if key != "allOf"}
            for part in _list(schema, "allOf"):
                rest = _merged(rest, self._resolved(part))
            return self._body(rest)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                rest = {name: value for name, value in schema.items() if name != key}
                return _any_of(self._at(f"{key}/{at}", self._alternative(rest, part))
                               for at, part in enumerate(_list(schema, key)))  # fmt: skip
        kinds = schema.get("type", _hinted(schema))
        if schema.get("nullable") is True:
            kinds = [*(kinds if isinstance(kinds, list) else [kinds]), "null"]
        if isinstance(kinds, list):
            if not all(isinstance(kind, str) for kind in kinds):
                raise BadSchema(f"no types are called {json.dumps(kinds)[:40]}")
            return _any_of(self._at(f"type/{kind}", {**_single(schema), "type": kind}) for kind in dict.fromkeys(kinds))
        return self._of_kind(kinds, schema)

    def _of_kind(self, kind: Any, schema: dict[str, Any]) -> str:
        match kind:
            case "object":
                return self._object(schema)
            case "array":
                return self._array(schema)
            case "string":
                return self._string(schema)
            case "integer":
                return integer(schema)
            case "number" | "boolean" | "null" | "value":
                return str(kind)
            case _:
                raise BadSchema(f"no type is called {json.dumps(kind)[:40]}")

    def _alternative(self, rest: dict[str, Any], part: Any) -> Any:
        """The keys beside `anyOf` apply to each alternative. Mostly they are only a description."""
        if not any(key in rest for keys in _HINTS.values() for key in keys) and "type" not in rest:
            return part
        return _merged(rest, self._resolved(part))

    # References.

    def _reference(self, reference: Any) -> str:
        """By name, so that a schema that refers to itself becomes a rule that refers to itself."""
        key = str(reference)
        if key not in self._references:
            name = self._references[key] = self.rule("")
            self._rules[name] = self._body(self._target(reference))
        return self._references[key]

    def _resolved(self, schema: Any) -> Any:
        seen = 0
        while isinstance(schema, dict) and "$ref" in schema:
            schema, seen = self._target(schema["$ref"]), seen + 1
            if seen > len(self._rules) + 100:
                raise BadSchema("it refers to itself without end")
        if not isinstance(schema, dict | bool):
            raise BadSchema(f"a schema is an object, and not {json.dumps(schema)[:40]}")
        return {} if schema is True else schema

    def _target(self, reference: Any) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise BadSchema(f"only references within the schema can be used, and not {json.dumps(reference)[:80]}")
        found = self._root
        for step in reference.split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and key.isdecimal() and len(key) < DIGITS and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, dict) and key in found:
                found = found[key]
            else:
                raise BadSchema(f"nothing is at {reference[:80]}")
        return found

    # Objects.

    def _object(self, schema: dict[str, Any]) -> str:
        required = [name for name in _list(schema, "required", ()) if isinstance(name, str)]
        properties, more = _object_of(schema, "properties"), schema.get("additionalProperties")
        if not properties and not required and more in (None, True, {}):
            return "object" if "properties" not in schema or more is not None else '"{}"'
        missing = {name: more if isinstance(more, dict) else True for name in required if name not in properties}
        properties = {**properties, **missing}
        tail = ""
        if more is not None and more is not False:
            key = self._other_key(list(properties))
            tail = self.rule(f'{key} ":" ws {self._at("additionalProperties", more)}')
        pairs = [(self.rule(f'{_constant(name)} ":" ws {self._at(f"properties/{name}", each)}'), name in required)
                 for name, each in properties.items()]  # fmt: skip
        return f'"{{" {self._members(pairs, tail)} "}}"'

    def _members(self, pairs: list[tuple[str, bool]], tail: str) -> str:
        """Built from the last to the first. `after` follows another property, `first` is the start of the object."""
        after = self.rule(f'("," ws {tail})*' if tail else '""')
        first = self.rule(f"({tail} {after})?" if tail else '""')
        for pair, needed in reversed(pairs):
            start = f"{pair} {after}"
            first = self.rule(start if needed else f"{start} | {first}")
            after = self.rule(f'"," ws {pair} {after}' if needed else f'("," ws {pair})? {after}')
        return first

    def _other_key(self, names: list[str]) -> str:
        """Any key but these, because a property must not come twice. Compared letter by letter, without escapes."""
        plain = r'[^"\\\x00-\x1F\x7F]'
        if not names:
            return "string"
        words = {_inner(name) for name in names}
        return self.rule(rf'"\"" {self._unlike(words, self.rule(plain))} "\""')

    def _unlike(self, words: set[str], plain: str) -> str:
        heads = sorted({word[0] for word in words if word})
        others = "".join(f"\\U{ord(head):08X}" for head in heads if head not in '"\\')
        ways = [rf'[^"\\\x00-\x1F\x7F{others}] {plain}*']
        ways += [f'"\\U{ord(head):08X}" {self._unlike({word[1:] for word in words if word[:1] == head}, plain)}'
                 for head in heads if head not in '"\\']  # fmt: skip
        return self.rule(f"({' | '.join(ways)})" + ("" if "" in words else "?"))

    # Arrays and strings.

    def _array(self, schema: dict[str, Any]) -> str:
        least, most = _count(schema, "minItems") or 0, _count(schema, "maxItems")
        fixed = _list(schema, "prefixItems", ())
        if not fixed and isinstance(schema.get("items"), list):  # the name in older drafts
            fixed = schema["items"]
        if fixed:
            rules = ' "," ws '.join(self._at(f"prefixItems/{at}", item) for at, item in enumerate(fixed))
            return f'"[" {rules} "]"'
        if most == 0:
            return '"[]"'
        item = self._at("items", schema.get("items", True))
        more = f'("," ws {item}){_times(max(least - 1, 0), most - 1 if most is not None else None)}'
        return f'"[" {item} {more} "]"' if least else f'"[" ({item} {more})? "]"'

    def _string(self, schema: dict[str, Any]) -> str:
        if isinstance(schema.get("pattern"), str):
            try:
                return rf'"\"" {pattern_rule(schema["pattern"], self.rule)} "\""'
            except ValueError as error:
                raise BadSchema(str(error)) from error
        if (form := str(schema.get("format"))) in FORMATS:
            return FORMATS[form]
        least, most = _count(schema, "minLength"), _count(schema, "maxLength")
        if least is None and most is None:
            return "string"
        return rf'"\"" char{_times(least or 0, most)} "\""'


def _constant(value: Any) -> str:
    return quoted(json.dumps(value, ensure_ascii=False))


def _inner(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)[1:-1]


def _any_of(rules: Iterable[str]) -> str:
    found = list(dict.fromkeys(rules))
    if not found:
        raise BadSchema("nothing is allowed here")
    return " | ".join(found)


def _times(least: int, most: int | None) -> str:
    if least > MOST_TIMES:
        raise BadSchema(f"at least {least} are asked for, and {MOST_TIMES} may be")
    if most is None:
        return f"{{{least},}}"
    if most < least:
        raise BadSchema(f"at least {least} and at most {most}: nothing is allowed here")
    return f"{{{least},{min(most, MOST_TIMES)}}}"


def _count(schema: dict[str, Any], key: str) -> int | None:
    value = schema.get(key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    if isinstance(value, float) and value >= 0 and value.is_integer():
        return int(value)
    raise BadSchema(f"{key} is {json.dumps(value)[:40]}, and no number of things")


def _list(schema: dict[str, Any], key: str, default: Any = None) -> Any:
    value = schema.get(key, default)
    if not isinstance(value, list | tuple):
        raise BadSchema(f"{key} is no list")
    return value


def _object_of(schema: dict[str, Any], key: str) -> dict[str, Any]:
    value = schema.get(key, {})
    if not isinstance(value, dict):
        raise BadSchema(f"{key} is no object")
    return value


def _hinted(schema: Mapping[str, Any]) -> str:
    return next((kind for kind, keys in _HINTS.items() if keys & schema.keys()), "value")


def _single(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "nullable"}


def _merged(base: dict[str, Any], more: Any) -> dict[str, Any]:
    """An approximation of both at once: names are united, for any other key the second schema wins."""
    if more is False:
        raise BadSchema("nothing is allowed here")
    both = {**base, **more}
    for key in ("properties", "$defs", "definitions"):
        if isinstance(base.get(key), dict) and isinstance(more.get(key), dict):
            both[key] = {**base[key], **more[key]}
    if isinstance(base.get("required"), list) and isinstance(more.get("required"), list):
        both["required"] = list(dict.fromkeys([*base["required"], *more["required"]]))
    return both
