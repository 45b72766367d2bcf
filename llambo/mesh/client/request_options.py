"""What a caller may ask for, and the message that comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import msgspec

from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, LlamboError

_encode = msgspec.msgpack.Encoder().encode
_checked = msgspec.msgpack.Decoder(m.InferenceRequest).decode
_checked_sampling = msgspec.msgpack.Decoder(m.Sampling).decode


class Options(TypedDict, total=False):
    """Options of one request; what is left out (or None) takes its default."""

    #: Needed only where the mesh serves several.
    model: str | None
    max_tokens: int | None
    #: 0: always the likeliest token. Left out: the model's default if it has one, else 0.8; likewise for the rest.
    temperature: float | None
    #: The same seed gives the same chances. Chosen at random when left out.
    seed: int | None
    #: Generation ends before any of these strings.
    stop: str | Sequence[str] | None
    #: "text": the prompt as it is; "user": put into the model's chat template; "messages": a JSON list of them;
    #: "chat": a JSON object with "messages" and "tools".
    form: str | None
    #: With "user": how the model is to behave.
    system: str | None
    #: Tell how likely the model held each token, and so many of the likeliest with it: 0 to 20.
    logprobs: int | None
    #: Whatever else `llambo.mesh.wire.messages.Sampling` has: top_k, min_p, grammar, ...
    sampling: dict[str, Any] | None
    #: "interactive", "normal" or "batch".
    priority: str | None
    #: The request ends when this is over, whatever it has by then. 0: never.
    deadline_ms: int | None
    #: False: the tokens come all together at the end.
    stream: bool | None


def build_request(
    id: bytes, seed: int, prompt: str, detached: bool, options: Options
) -> tuple[m.InferenceRequest, bytes]:
    """The request and its prompt, checked here, so that the caller learns of a mistake at once."""
    given = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(given.keys() - Options.__optional_keys__)
    if unknown:
        raise LlamboError(Code.BAD_REQUEST, f"no option is called {unknown[0]!r}")
    sampling: dict[str, Any] = {**_more(given.pop("sampling", {}))}
    sampling |= {name: given.pop(name) for name in ("temperature", "stop", "form", "system") if name in given}
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = [sampling["stop"]]
    fields = {"seed": seed, **given, "id": id, "detached": detached}
    try:
        body = _encode(sampling)
        _checked_sampling(body)
    except (msgspec.MsgspecError, UnicodeError, TypeError, OverflowError) as error:
        raise _invalid(error) from error
    request = checked_request({**fields, "sampling": msgspec.Raw(body)})
    if len(body) > limits.SAMPLING_BYTES:
        raise LlamboError(Code.BAD_REQUEST, f"sampling options of {len(body)} bytes, {limits.SAMPLING_BYTES} may be")
    return request, encode_prompt(prompt)


def checked_request(fields: dict[str, Any]) -> m.InferenceRequest:
    """As a broker would read it."""
    try:
        return _checked(_encode({**fields, "type": "inference_request"}))
    except (msgspec.MsgspecError, UnicodeError, TypeError, OverflowError) as error:
        raise _invalid(error) from error


def _invalid(error: Exception) -> LlamboError:
    return LlamboError(Code.BAD_REQUEST, f"the request is not valid: {error}")


def _more(sampling: Any) -> dict[str, Any]:
    """A worker ignores a field it does not know; here a name that means nothing is a mistake."""
    if not isinstance(sampling, dict):
        raise LlamboError(Code.BAD_REQUEST, "sampling options are no dictionary")
    unknown = sorted(map(str, sampling.keys() - set(m.Sampling.__struct_fields__)))
    if unknown:
        raise LlamboError(Code.BAD_REQUEST, f"no sampling option is called {unknown[0]!r}")
    return sampling


def encode_prompt(prompt: str) -> bytes:
    try:
        encoded = prompt.encode()
    except UnicodeEncodeError as error:
        raise LlamboError(Code.BAD_REQUEST, f"the prompt is not text: {error}") from error
    if len(encoded) > limits.PROMPT_BYTES:
        raise LlamboError(Code.TOO_LONG, f"a prompt of {len(encoded)} bytes, {limits.PROMPT_BYTES} are allowed")
    return encoded


__all__ = ["Options", "Unpack", "build_request"]
