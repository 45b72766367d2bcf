"""Errors, each in the shape of the API that was asked.

What is wrong is a `LlamboError` as everywhere; here it becomes a status, a body and headers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from llambo.gateway.answers.asking import encode
from llambo.mesh.wire.errors import Code, LlamboError, printable

Shape = Literal["openai", "anthropic"]

#: Where msgspec says what a wrong value is part of.
_AT = re.compile(r" - at `(?:key in )?\$\.?(.*?)`$")
#: Seconds after which to try again, where the mesh names no time.
RETRY_S = 1
_OPENAI = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
#: Codes that OpenAI's clients know under another name.
_KNOWN_AS = {Code.UNAUTHORIZED: "invalid_api_key", Code.UNKNOWN_MODEL: "model_not_found"}


class FieldError(LlamboError):
    """A field of the body is wrong. `field` is its path, as in `messages[0].role`."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(Code.BAD_REQUEST, text)
        self.field = field


class StatusError(LlamboError):
    """What only HTTP knows: no such path, no such method, a body that is too long."""

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(Code.BAD_REQUEST, text)
        self.status = status
        self.headers = headers or {}


@dataclass(frozen=True, slots=True)
class Told:
    status: int
    body: bytes
    headers: dict[str, str]


def shape_of(path: str) -> Shape:
    return "anthropic" if path.startswith("/v1/messages") else "openai"


def unread(error: Exception) -> FieldError:
    """A body that is not what it should be."""
    text = str(error)
    found = _AT.search(text)
    if found is None:
        return FieldError("", f"the body cannot be read: {text}")
    return FieldError(found[1], f"{found[1] or 'the body'}: {text[: found.start()]}")


def status_of(error: LlamboError) -> int:
    return error.status if isinstance(error, StatusError) else error.trait.http


def told(error: LlamboError, shape: Shape) -> Told:
    status = status_of(error)
    headers = dict(error.headers) if isinstance(error, StatusError) else {}
    if status in (429, 503):
        headers["retry-after"] = str(max(RETRY_S, -(-error.retry_after_ms // 1_000)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Told(status, encode(body(error, shape)), headers)


def body(error: LlamboError, shape: Shape) -> dict[str, Any]:
    status, text = status_of(error), printable(error.text)
    if shape == "anthropic":
        kind = _ANTHROPIC.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": text}}
    kind = _OPENAI.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code: str = _KNOWN_AS.get(error.code, error.code.value)
    field = error.field if isinstance(error, FieldError) else "model" if error.code is Code.UNKNOWN_MODEL else ""
    said = {"message": text, "type": kind, "param": field or None, "code": code, "hint": error.hint}
    return {"error": said}


def of_exception(error: Exception) -> LlamboError:
    """Whatever was raised, as one of ours."""
    if isinstance(error, LlamboError):
        return error
    if isinstance(error, (msgspec.MsgspecError, UnicodeDecodeError)):
        return unread(error)
    return LlamboError(Code.INTERNAL, "something went wrong here; the gateway's log says what")
