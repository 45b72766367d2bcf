"""Reranking: `/v1/rerank` and its other paths. The documents that fit a query, by their scores.

There is no standard. One reply serves the clients of Jina, Cohere (version 1 and 2) and llama.cpp's server, which read
different fields of it. A request with `texts` instead of `documents` is one of text-embeddings-inference, whose reply
is a list. Documents that are too long for the model are refused and never cut, so fields that ask for that are ignored.
"""

from __future__ import annotations

import uuid
from typing import Annotated

import msgspec
from msgspec import Meta

from llambo.gateway.answers.api import JsonObject, WholeBody
from llambo.gateway.answers.api_errors import FieldError
from llambo.mesh.client.client import Client
from llambo.mesh.client.task_results import RankedDocument, Ranking
from llambo.mesh.wire import limits

#: Paths beside those below `/v1`: of Cohere's second version, and of text-embeddings-inference and llama.cpp's server.
MORE_PATHS = ("/v2/rerank", "/rerank", "/reranking")


class RerankRequest(msgspec.Struct):
    query: Annotated[str, Meta(min_length=1)]
    #: Each is a text, or an object with the field `text`.
    documents: list[str | JsonObject] | None = None
    model: Annotated[str, Meta(max_length=limits.NAME_CHARS)] = ""
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool | None = None
    # Of text-embeddings-inference.
    texts: list[str] | None = None
    return_text: bool | None = None
    #: Scores as the model gives them, and not from 0 to 1. Also with `documents`.
    raw_scores: bool | None = None


async def answer(client: Client, body: RerankRequest) -> WholeBody:
    texts = _texts(body)
    found = await client.rerank(
        body.query, texts, top_n=body.top_n, raw=bool(body.raw_scores), model=body.model or None
    )  # fmt: skip
    return WholeBody(_scores(found, body) if body.documents is None else _results(found, body), found.fake)


def _texts(body: RerankRequest) -> list[str]:
    if body.documents is not None and body.texts is not None:
        raise FieldError("texts", "a request has either `documents` or `texts`")
    if body.documents is None:
        field, texts = "texts", body.texts
    else:
        field, texts = "documents", [_text(number, each) for number, each in enumerate(body.documents)]
    if not texts:
        raise FieldError(field if texts is not None else "documents", "at least one document is needed")
    if len(texts) > limits.RERANK_DOCUMENTS:
        raise FieldError(field, f"{len(texts)} documents; at most {limits.RERANK_DOCUMENTS} are allowed")
    return texts


def _text(number: int, given: str | JsonObject) -> str:
    text = given if isinstance(given, str) else given.get("text")
    if not isinstance(text, str):
        raise FieldError(f"documents[{number}].text", "a document is a text, or an object with the field `text`")
    return text


def _results(found: Ranking, body: RerankRequest) -> JsonObject:
    tokens = sum(found.tokens)
    return {
        "id": str(uuid.uuid4()),
        "object": "list",
        "model": found.model or body.model,
        "results": [_result(each, body) for each in found.results],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "meta": {"billed_units": {"search_units": 1}, "tokens": {"input_tokens": tokens}},
        **({"llambo": {"fake": True}} if found.fake else {}),
    }


def _result(ranked: RankedDocument, body: RerankRequest) -> JsonObject:
    document: JsonObject = {"document": {"text": ranked.document}} if body.return_documents else {}
    return {"index": ranked.index, "relevance_score": ranked.score, **document}


def _scores(found: Ranking, body: RerankRequest) -> list[JsonObject]:
    """As text-embeddings-inference."""
    return [
        {"index": each.index, "score": each.score, **({"text": each.document} if body.return_text else {})}
        for each in found.results
    ]
