"""OpenAI's `/v1/embeddings`: vectors of texts."""

from __future__ import annotations

import base64
from array import array
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from llambo.gateway.answers.api import WholeBody
from llambo.gateway.answers.api_errors import FieldError
from llambo.gateway.apis.openai_common import texts_or_ids
from llambo.mesh.client.client import Client
from llambo.mesh.wire import limits, tasks


class EmbeddingRequest(msgspec.Struct):
    input: str | list[Any]
    model: Annotated[str, Meta(max_length=limits.NAME_CHARS)] = ""
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    user: str | None = None


async def answer(client: Client, body: EmbeddingRequest) -> WholeBody:
    texts = [await _text(client, body.model, each) for each in texts_or_ids(body.input, "input", limits.EMBED_INPUTS)]
    found = await client.embed(texts, model=body.model or None)
    vectors, size = found.vectors, len(found.vectors[0])
    if body.dimensions is not None:
        if body.dimensions > size:
            raise FieldError("dimensions", f"the vectors of this model have {size} numbers, not {body.dimensions}")
        vectors = [tasks.shortened(vector, body.dimensions, normalized=True) for vector in vectors]
    tokens = sum(found.tokens)
    packed = body.encoding_format == "base64"
    content = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": number, "embedding": _packed(vector) if packed else vector}
            for number, vector in enumerate(vectors)
        ],
        "model": body.model or found.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        **({"llambo": {"fake": True}} if found.fake else {}),
    }
    return WholeBody(content, found.fake)


async def _text(client: Client, model: str, given: str | list[int]) -> str:
    return given if isinstance(given, str) else await client.detokenize(given, model=model or None)


def _packed(vector: list[float]) -> str:
    return base64.b64encode(tasks.data_of(array("f", vector))).decode()
