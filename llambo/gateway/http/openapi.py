"""The parts of the OpenAPI document that do not follow from the routes: errors, and what else a 200 may contain.

Litestar describes its own errors, which this gateway never sends, and cannot see what our ASGI applications answer.
"""

from __future__ import annotations

from typing import Any

from llambo.gateway.answers.api_errors import Shape, shape_of

_TEXT = {"type": "string"}
_OBJECT = {"type": "object"}
_MAYBE_TEXT = {"type": ["string", "null"]}
ERRORS: dict[Shape, dict[str, Any]] = {
    "openai": {
        "title": "An error in the shape of OpenAI's API",
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": {**_MAYBE_TEXT, "description": "The field that is wrong"},
                    "code": _MAYBE_TEXT,
                    "hint": {**_TEXT, "description": "What to do about it"},
                },
            }
        },
    },
    "anthropic": {
        "title": "An error in the shape of Anthropic's API",
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": _TEXT, "message": _TEXT},
            },
        },
    },
}  # fmt: skip
_SOME = {"type": "array", "minItems": 1, "maxItems": 128}
_IDS = {**_SOME, "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31}}
#: A text, texts, the token ids of a text, or lists of token ids; msgspec has no such union.
TEXTS = {"anyOf": [{**_TEXT, "minLength": 1}, {**_SOME, "items": {**_TEXT, "minLength": 1}}, _IDS,
                   {**_SOME, "items": _IDS}]}  # fmt: skip
#: Paths whose answer may be a stream.
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


def completed(document: dict[str, Any], *, tokens: bool) -> dict[str, Any]:
    """`tokens`: an API token is required."""
    components = document["components"]
    components["schemas"] |= {_name(shape): schema for shape, schema in ERRORS.items()}
    components["schemas"]["CompletionRequest"]["properties"]["prompt"] = TEXTS
    components["schemas"]["EmbeddingRequest"]["properties"]["input"] = TEXTS
    if not tokens:
        components.pop("securitySchemes", None)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            responses.pop("400", None)
            if path.startswith("/v1/"):
                responses |= {
                    "4XX": _error(path, "The request is invalid"),
                    "5XX": _error(path, "The mesh cannot answer now"),
                }
            elif path == "/readyz":
                responses["503"] = {**responses["200"], "description": "No worker is ready"}
            if path in STREAMED and method == "post":
                responses["200"]["content"] = {"application/json": {"schema": _OBJECT}, "text/event-stream": {}}
            elif path.startswith("/v1/"):
                responses["200"]["content"] = {"application/json": {"schema": _OBJECT}}
            if not tokens:
                operation.pop("security", None)
    return document


def _error(path: str, what: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{_name(shape_of(path))}"}
    return {"description": what, "content": {"application/json": {"schema": schema}}}


def _name(shape: Shape) -> str:
    return {"openai": "OpenAIError", "anthropic": "AnthropicError"}[shape]
