"""`/v1/embeddings`: vectors of texts."""

from __future__ import annotations

import base64
from array import array
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from llambo.gateway.answers.problems import FieldError
from llambo.gateway.apis.openai_completions import _is_id
from llambo.mesh.client.client import Client
from llambo.mesh.wire import limits, tasks


class EmbeddingRequest(msgspec.Struct):
    input: str | list[Any]
    model: Annotated[str, Meta(max_length=limits.NAME_CHARS)] = ""
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    user: str | None = None


async def answer(client: Client, asked: EmbeddingRequest) -> dict[str, Any]:
    texts = [await _text(client, asked.model, each) for each in _inputs(asked.input)]
    found = await client.embed(texts, model=asked.model or None)
    size = len(found.vectors[0])
    if asked.dimensions is not None and asked.dimensions != size:
        text = f"dimensions: this model's vectors have {size} numbers, and cannot have {asked.dimensions}"
        raise FieldError("dimensions", text)
    tokens = sum(found.tokens)
    packed = asked.encoding_format == "base64"
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": number, "embedding": _packed(vector) if packed else vector}
            for number, vector in enumerate(found.vectors)
        ],
        "model": asked.model or await _only_model(client),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _inputs(given: str | list[Any]) -> list[Any]:
    """Texts, or lists of token ids."""
    if isinstance(given, str):
        return [given]
    if given and all(map(_is_id, given)):
        return [given]
    right = all(isinstance(each, str) or (isinstance(each, list) and each and all(map(_is_id, each))) for each in given)
    if not given or not right:
        raise FieldError("input", "input: expected a text, a list of texts, of token ids, or of lists of token ids")
    if len(given) > limits.EMBED_INPUTS:
        raise FieldError("input", f"input: {len(given)} texts, {limits.EMBED_INPUTS} may be")
    return given


async def _text(client: Client, model: str, given: str | list[int]) -> str:
    return given if isinstance(given, str) else await client.detokenize(given, model=model or None)


async def _only_model(client: Client) -> str:
    models = await client.models()
    return models[0].model if models else ""


def _packed(vector: list[float]) -> str:
    return base64.b64encode(tasks.data_of(array("f", vector))).decode()
