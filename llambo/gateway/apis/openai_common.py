"""What OpenAI's APIs have in common: sampling options, finish reasons, usage, log probabilities."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from llambo.gateway.answers.api import JsonObject
from llambo.gateway.answers.api_errors import FieldError
from llambo.gateway.apis.prompts import LlamboFields
from llambo.mesh.client.answer_stream import Answer
from llambo.mesh.client.request_options import Options
from llambo.mesh.wire import limits
from llambo.mesh.wire.messages import Sampling
from llambo.mesh.wire.tokens import Logprob

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[int, Meta(ge=1, le=limits.MAX_TOKENS)]
Stop = Annotated[str, Meta(min_length=1, max_length=limits.STOP_CHARS)]
Choices = Annotated[int, Meta(ge=1, le=128)]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class OpenAIRequest(LlamboFields, kw_only=True):
    """The fields that chat and completions share."""

    model: Annotated[str, Meta(max_length=limits.NAME_CHARS)] = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    top_p: Share | None = None
    n: Choices | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=limits.STOP_STRINGS)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-100.0, le=100.0)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-100.0, le=100.0)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]],
                          Meta(max_length=limits.LOGIT_BIASES)] | None = None  # fmt: skip
    user: str | None = None
    # What llama.cpp's server has beyond OpenAI, by the names it has there.
    top_k: Annotated[int, Meta(ge=0, le=2**20)] | None = None
    min_p: Share | None = None
    typical_p: Share | None = None
    repeat_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, le=limits.MAX_TOKENS)] | None = None
    dry_multiplier: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    dry_base: Annotated[float, Meta(ge=1.0, le=100.0)] | None = None
    dry_allowed_length: Annotated[int, Meta(ge=1, le=4096)] | None = None
    dry_penalty_last_n: Annotated[int, Meta(ge=-1, le=limits.MAX_TOKENS)] | None = None
    xtc_probability: Share | None = None
    xtc_threshold: Share | None = None
    mirostat: Literal[0, 2] | None = None
    mirostat_tau: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    mirostat_eta: Share | None = None
    ignore_eos: bool | None = None
    grammar: Annotated[str, Meta(max_length=limits.GRAMMAR_CHARS)] | None = None
    json_schema: JsonObject | None = None


#: Fields that have the same name in the mesh.
_SAME = frozenset(OpenAIRequest.__struct_fields__) & frozenset(Sampling.__struct_fields__) - {"stop", "temperature"}


def options_of(body: OpenAIRequest, answer_tokens: int) -> Options:
    """`answer_tokens`: the longest answer if the caller sets no limit."""
    sampling: JsonObject = {
        name: value for name in sorted(_SAME) if (value := getattr(body, name)) is not None and name != "json_schema"
    }
    if body.repeat_last_n is not None:
        sampling["penalty_last_n"] = body.repeat_last_n
    if body.json_schema is not None:
        sampling["json_schema"] = schema_text(body.json_schema)
    if body.logit_bias:
        sampling["logit_bias"] = {_token_id(key): bias for key, bias in body.logit_bias.items()}
    return {
        **body.options(),
        "model": body.model_with_adapter(body.model),
        "max_tokens": body.max_tokens or answer_tokens,
        "temperature": body.temperature,
        "stop": body.stop,
        "sampling": sampling,
    }


def schema_text(schema: JsonObject) -> str:
    return msgspec.json.encode(schema).decode()


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise FieldError("logit_bias", f"{key[:40]!r} is not a token id")
    return int(key)


def wants_usage(body: OpenAIRequest) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def texts_or_ids(given: str | list[Any], field: str, limit: int) -> list[str | list[int]]:
    """A text, or a list of texts, of token ids, or of lists of token ids, as a list of inputs.

    msgspec has no such union.
    """
    if isinstance(given, str):
        return [given]
    if given and all(map(is_id, given)):
        return [given]
    lists = all(isinstance(each, list) and each and all(map(is_id, each)) for each in given)
    if not given or not (lists or all(isinstance(each, str) for each in given)):
        raise FieldError(field, "expected a text, a list of texts, of token ids, or of lists of token ids")
    if len(given) > limit:
        raise FieldError(field, f"{len(given)} inputs; at most {limit} are allowed")
    return given


def finish_reason(answer: Answer) -> str:
    """As in the mesh. OpenAI has no deadlines; an answer that ran out of time says "deadline"."""
    return answer.reason


def totals(answers: list[Answer], prompts: int = 1) -> JsonObject:
    """What follows the choices of a body, and is in the last chunk of a stream."""
    return {"usage": usage(answers, prompts), "llambo": llambo_fields(answers)}


def usage(answers: list[Answer], prompts: int = 1) -> JsonObject:
    """A prompt counts once, however many choices are made of it."""
    each = max(1, len(answers) // max(1, prompts))
    prompt = sum(answer.usage.prompt_tokens for answer in answers[::each])
    cached = sum(answer.usage.cached_tokens for answer in answers[::each])
    completion = sum(len(answer.ids) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def llambo_fields(answers: list[Answer]) -> JsonObject:
    """What the mesh adds: which workers made the answers, how often they moved, and how long each phase took."""
    fake = {"fake": True} if any(answer.fake for answer in answers) else {}
    return {
        **fake,
        "requests": [answer.id for answer in answers],
        "workers": [answer.worker for answer in answers],
        "moves": sum(answer.moves for answer in answers),
        "queued_ms": max((answer.queued_ms for answer in answers), default=0),
        "prefill_ms": round(sum(answer.usage.prefill_ms for answer in answers), 1),
        "decode_ms": round(sum(answer.usage.decode_ms for answer in answers), 1),
    }


def logprob_of(piece: bytes, logprob: Logprob) -> JsonObject:
    top = [_token_logprob(each.piece, each.logprob) for each in logprob.top]
    return {**_token_logprob(piece, logprob.logprob), "top_logprobs": top}


def _token_logprob(piece: bytes, logprob: float) -> JsonObject:
    return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}


def logprobs_of(answer: Answer) -> list[JsonObject]:
    pairs = zip(answer.pieces, answer.logprobs, strict=True)
    return [logprob_of(piece, logprob) for piece, logprob in pairs if logprob is not None]
