"""The options of requests and tasks, and the messages that are built from them.

A task (tokenize, detokenize, embed, model_info) is a request like any other, see `wire/tasks.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, TypedDict

import msgspec

from llambo.mesh.wire import limits, tasks
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, LlamboError

_encode = msgspec.msgpack.Encoder().encode
_checked = msgspec.msgpack.Decoder(m.InferenceRequest).decode
_checked_sampling = msgspec.msgpack.Decoder(m.Sampling).decode


class Options(TypedDict, total=False):
    """Options of one request. An option that is left out, or None, has its default."""

    #: Required only if the mesh serves several models.
    model: str | None
    max_tokens: int | None
    #: 0: always the likeliest token. Left out: the default of the model, or else 0.8. Likewise for other sampling.
    temperature: float | None
    #: The same seed gives the same random numbers. Chosen at random if left out.
    seed: int | None
    #: The answer ends before any of these strings.
    stop: str | Sequence[str] | None
    #: "text": the prompt as it is; "user": put into the model's chat template; "messages": a JSON list of them;
    #: "chat": a JSON object with "messages" and "tools".
    form: str | None
    #: With "user": the system message.
    system: str | None
    #: Return the log-probability of each token, and of so many of the likeliest tokens with it: 0 to 20.
    logprobs: int | None
    #: Other fields of `llambo.mesh.wire.messages.Sampling`: top_k, min_p, grammar, ...
    sampling: dict[str, Any] | None
    #: "interactive", "normal" or "batch".
    priority: str | None
    #: The request ends after this time, with the tokens it has by then. 0: no limit.
    deadline_ms: int | None
    #: False: all tokens arrive together, at the end.
    stream: bool | None


class TaskCall(TypedDict, total=False):
    """Options of every task. An option that is left out, or None, has its default."""

    #: Required only if the mesh serves several models.
    model: str | None
    #: "interactive", "normal" or "batch".
    priority: str | None
    #: The task fails after this time. 0: no limit.
    deadline_ms: int | None


def build_request(
    id: bytes, seed: int, prompt: str, detached: bool, options: Options
) -> tuple[m.InferenceRequest, bytes]:
    """The request and its prompt. They are checked here, so that a mistake raises an error at once."""
    given = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(given.keys() - Options.__optional_keys__)
    if unknown:
        raise LlamboError(Code.BAD_REQUEST, f"there is no option {unknown[0]!r}")
    sampling: dict[str, Any] = {**_known_sampling(given.pop("sampling", {}))}
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
        raise LlamboError(
            Code.BAD_REQUEST, f"{len(body)} bytes of sampling options, {limits.SAMPLING_BYTES} are allowed"
        )
    return request, encode_prompt(prompt)


def checked_request(fields: dict[str, Any]) -> m.InferenceRequest:
    """The message, checked as a broker checks it."""
    try:
        return _checked(_encode({**fields, "type": "inference_request"}))
    except (msgspec.MsgspecError, UnicodeError, TypeError, OverflowError) as error:
        raise _invalid(error) from error


def _invalid(error: Exception) -> LlamboError:
    return LlamboError(Code.BAD_REQUEST, f"the request is not valid: {error}")


def _known_sampling(sampling: Any) -> dict[str, Any]:
    """A worker ignores unknown fields. Here an unknown name is an error, because it is a mistake of the caller."""
    if not isinstance(sampling, dict):
        raise LlamboError(Code.BAD_REQUEST, "sampling options must be a dictionary")
    unknown = sorted(map(str, sampling.keys() - set(m.Sampling.__struct_fields__)))
    if unknown:
        raise LlamboError(Code.BAD_REQUEST, f"there is no sampling option {unknown[0]!r}")
    return sampling


def encode_prompt(prompt: str) -> bytes:
    try:
        encoded = prompt.encode()
    except UnicodeEncodeError as error:
        raise LlamboError(Code.BAD_REQUEST, f"the prompt is not text: {error}") from error
    if len(encoded) > limits.PROMPT_BYTES:
        raise LlamboError(Code.TOO_LONG, f"a prompt of {len(encoded)} bytes, {limits.PROMPT_BYTES} are allowed")
    return encoded


# --- tasks -------------------------------------------------------------------------------------------------------


def task_request(
    task: m.Task, inputs: int, input_bytes: int, options: tasks.TaskOptions, call: TaskCall
) -> m.InferenceRequest:
    fields = {name: value for name, value in call.items() if value is not None}
    unknown = sorted(fields.keys() - TaskCall.__optional_keys__)
    if unknown:
        raise LlamboError(Code.BAD_REQUEST, f"{task} has no option {unknown[0]!r}")
    return checked_request(
        {**fields, "id": secrets.token_bytes(limits.REQUEST_ID_BYTES), "task": task, "stream": False,
         "sampling": msgspec.Raw(_encode(options)), "max_tokens": tasks.most_pieces(task, inputs, input_bytes)}
    )  # fmt: skip


def task_input(value: Any) -> bytes:
    try:
        data = _encode(value)
        msgspec.msgpack.decode(data, type=tasks.Texts if value and isinstance(value[0], str) else tasks.Ids)
    except (msgspec.MsgspecError, UnicodeError, TypeError, OverflowError) as error:
        raise LlamboError(Code.BAD_REQUEST, f"the input is not valid: {error}") from error
    if len(data) > limits.PROMPT_BYTES:
        raise LlamboError(Code.TOO_LONG, f"an input of {len(data)} bytes, {limits.PROMPT_BYTES} are allowed")
    return data
