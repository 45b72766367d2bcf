"""Errors in the shape of the API that was used: a `LlamboError` becomes a status, a body and headers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import msgspec

from llambo.gateway.answers.api import JsonObject, encode
from llambo.mesh.wire.errors import Code, LlamboError, printable

Shape = Literal["openai", "anthropic"]

#: How msgspec reports where a wrong value is. Its exceptions have no attribute for the path.
_PATH = re.compile(r" - at `(?:key in )?\$\.?(.*?)`$")
#: Seconds after which to try again, where the mesh names no time.
RETRY_S = 1
_OPENAI = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    409: "server_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "api_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
#: Codes that OpenAI's clients know by another name.
_OPENAI_CODES = {Code.UNAUTHORIZED: "invalid_api_key", Code.UNKNOWN_MODEL: "model_not_found"}


#: Hints for a program that speaks HTTP, where those of the code name commands and options.
_HINTS = {
    Code.UNAUTHORIZED: "send an API token as `Authorization: Bearer`; `llambo keys token NAME` makes one",
    Code.FORBIDDEN: "use an API token with that right",
    Code.UNKNOWN_MODEL: "GET /v1/models lists the models",
    Code.MODEL_REQUIRED: "set `model`; GET /v1/models lists the models",
    Code.UNKNOWN_REQUEST: "check the id",
    Code.NO_WORKER: "try again later; the operator sees in `llambo workers` what is there",
    Code.ENGINE_FAILED: "send it again; the operator sees in `llambo why ID` what happened",
    Code.NO_BROKER: "try again later; the operator sees in `llambo status` what is there",
    Code.CANCELLED: "send it again",
}


class FieldError(LlamboError):
    """A field of a request is wrong. `field` is its path, as in `messages[0].role`; empty: the body as a whole."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(Code.BAD_REQUEST, f"{field}: {text}" if field else text)
        self.field = field


class StatusError(LlamboError):
    """An error that only HTTP knows: no such path, no such method, a body that is too long."""

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(Code.BAD_REQUEST, text)
        self.status = status
        self.headers = headers or {}


@dataclass(frozen=True, slots=True)
class ErrorReply:
    status: int
    body: bytes
    headers: dict[str, str]


def shape_of(path: str) -> Shape:
    return "anthropic" if path.startswith("/v1/messages") else "openai"


def decode_error(error: Exception, within: str = "") -> FieldError:
    """A body, or the part of it at the path `within`, does not have the form it should have."""
    text = str(error)
    found = _PATH.search(text)
    if found is None:
        return FieldError(within, text) if within else FieldError("", f"the body cannot be read: {text}")
    field = ".".join(filter(None, (within, found[1])))
    return FieldError(field, text[: found.start()] if field else f"the body: {text[: found.start()]}")


def hint_of(error: LlamboError) -> str:
    if isinstance(error, StatusError):
        return "GET /openapi.json lists the paths" if error.status in (404, 405) else ""
    if error.code is Code.BAD_REQUEST and not isinstance(error, FieldError):
        return ""
    return _HINTS.get(error.code, error.hint) if error.hint == error.trait.hint else error.hint


def status_of(error: LlamboError) -> int:
    return error.status if isinstance(error, StatusError) else error.trait.http


def error_reply(error: LlamboError, shape: Shape) -> ErrorReply:
    status = status_of(error)
    headers = dict(error.headers) if isinstance(error, StatusError) else {}
    # The clients of OpenAI and Anthropic follow it; without it they decide by the status.
    headers["x-should-retry"] = "true" if error.retryable else "false"
    if status in (429, 503):
        headers["retry-after"] = str(max(RETRY_S, -(-error.retry_after_ms // 1_000)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return ErrorReply(status, encode(error_body(error, shape)), headers)


def error_body(error: LlamboError, shape: Shape) -> JsonObject:
    # Some texts end in the hint for a command line.
    status, text = status_of(error), printable(error.text.removesuffix(f"; {error.trait.hint}"))
    if shape == "anthropic":
        kind = _ANTHROPIC.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": text, "retryable": error.retryable}}
    kind = _OPENAI.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code: str = _OPENAI_CODES.get(error.code, error.code.value)
    field = error.field if isinstance(error, FieldError) else "model" if error.code is Code.UNKNOWN_MODEL else ""
    about = {"param": field or None, "code": code, "hint": hint_of(error), "retryable": error.retryable}
    return {"error": {"message": text, "type": kind, **about}}


def as_llambo_error(error: Exception) -> LlamboError:
    if isinstance(error, LlamboError):
        return error
    if isinstance(error, (msgspec.MsgspecError, UnicodeDecodeError)):
        return decode_error(error)
    return LlamboError(Code.INTERNAL, "internal error; see the log of the gateway")
