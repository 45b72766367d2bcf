"""The gateway as an ASGI application: which path leads where, and the OpenAPI document about it.

Litestar routes, limits bodies and handles CORS. msgspec decodes the bodies, strictly and once; the answers are ASGI
applications of their own (see `answers.asgi`).

Litestar makes the OpenAPI document of the routes. It describes its own errors, which this gateway never sends, and
cannot see what our ASGI applications answer: `completed` adds the errors, and what else a 200 may contain.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec
from litestar import Litestar, Request, Response, Router, WebSocket, delete, get, post, websocket
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.exceptions import HTTPException, InternalServerException, ValidationException
from litestar.handlers import BaseRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.spec import Components, SecurityScheme
from litestar.types import ASGIApp

import llambo
from llambo.gateway.access import Access, Caller
from llambo.gateway.answers.api import JsonObject, Parsed, encode
from llambo.gateway.answers.api_errors import (
    FieldError,
    StatusError,
    as_llambo_error,
    decode_error,
    error_reply,
    shape_of,
)
from llambo.gateway.answers.asgi import CODE_KEY, Connection, HttpRequest, Later, Streaming, Whole
from llambo.gateway.answers.feed import Arrival, Feeds, parse_event_id
from llambo.gateway.answers.unread import Unread
from llambo.gateway.answers.websocket import PROTOCOL, Apis, SocketSession, offered_protocols, offered_token
from llambo.gateway.apis import (
    anthropic_messages,
    embeddings,
    models,
    openai_chat,
    openai_completions,
    rerank,
    responses,
)
from llambo.gateway.apis.response_store import ResponseStore
from llambo.gateway.apis.responses import ResponsesRequest
from llambo.gateway.config import GatewayConfig
from llambo.gateway.dashboard import routes
from llambo.gateway.dashboard.routes import Watches
from llambo.gateway.gateway_metrics import GatewayMetrics
from llambo.gateway.middleware import CALLER_KEY, Middleware, Origins
from llambo.mesh.client.client import Client
from llambo.mesh.service import prometheus
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.tokens import UNDECODABLE

if TYPE_CHECKING:
    from llambo.gateway.tracing import OtelTraces


from llambo.gateway.answers.api_errors import Shape

log = logging.getLogger(__name__)

#: How long the answer of `/readyz` is reused: anybody may ask, at any rate.
READY_S = 0.25


class Readiness:
    """Whether a request would be answered. The mesh is asked once for all callers of about the same time."""

    def __init__(self, connect: Callable[[], Awaitable[Client]]) -> None:
        self._connect = connect
        self._known, self._known_until = "", 0.0
        self._query: asyncio.Task[str] | None = None

    async def why_not(self) -> str:
        """Empty: it would."""
        if time.monotonic() < self._known_until:
            return self._known
        if self._query is None:
            self._query = asyncio.create_task(self._ask())
        return await asyncio.shield(self._query)

    async def _ask(self) -> str:
        try:
            status = await (await self._connect()).status()
            # A host loads a model when it is asked for.
            self._known = "" if status.ready or any(row.hosts for row in status.models) else "no worker is ready"
        except LlamboError as error:
            # Without the text, which may contain the address of the broker: no token is needed to read this.
            self._known = f"the mesh does not answer: {error.code.value}"
        finally:
            self._query = None
        self._known_until = time.monotonic() + READY_S
        return self._known


class Gateway:
    """What the routes share."""

    def __init__(self, config: GatewayConfig, access: Access) -> None:
        self.config, self.access = config, access
        self.metrics = GatewayMetrics()
        self.feeds = Feeds(config.resume_ms, [self.metrics], Unread(config.http_unread_bytes))
        self.responses = ResponseStore()
        self.readiness = Readiness(access.own.client)
        self.stopping = False
        self._traces: OtelTraces | None = None

    def add_traces(self, traces: OtelTraces | None) -> None:
        if traces is not None:
            self._traces = traces
            self.feeds.observers.append(traces)

    async def answer(self, request: HttpRequest, parsed: Parsed) -> ASGIApp:
        """Submit the request, or resume its stream."""
        caller, route, submission = caller_of(request), request.url.path, parsed.submission
        digest = hashlib.blake2b(route.encode() + b"\n" + await request.body(), digest_size=16).digest()
        seen = request.headers.get("last-event-id")
        if not parsed.stream or not seen:
            arrival = Arrival(f"POST {route}", route, request.headers)
            feed = await self.feeds.begin(caller, submission, arrival, digest if parsed.stream else b"")
            return (Streaming if parsed.stream else Whole)(self.feeds, feed, parsed.renderer)
        place = parse_event_id(seen)
        feed = await self.feeds.resume(caller, place, submission, digest)
        return Streaming(self.feeds, feed, parsed.renderer, place)

    async def close(self, app: Litestar) -> None:
        self.feeds.close()
        if self._traces is not None:
            await self._traces.close()
        await self.access.close()


class BodyRequest(Request[Any, Any, State]):
    """Decodes a body as the type that its route declares, without conversions: "1" is not a number."""

    async def body(self) -> bytes:
        try:
            return await super().body()
        except InternalServerException as error:  # Litestar's only one here; it would be logged as our error
            raise StatusError(400, "the client disconnected before its body was complete") from error

    async def json(self) -> Any:
        field = self.route_handler.parsed_data_field
        assert field is not None, "only asked for where the route has data"
        body = await self.body()
        try:
            return _decoder(field.annotation)(body)
        except UNDECODABLE as error:
            raise decode_error(error) from error


@cache
def _decoder(kind: Any) -> Callable[[bytes], Any]:
    return msgspec.json.Decoder(kind).decode


def gateway_of(request: Connection) -> Gateway:
    found: Gateway = request.app.state.gateway
    return found


def caller_of(request: Connection) -> Caller:
    """Raises LlamboError if the token is not valid."""
    caller: Caller | None = request.scope.get(CALLER_KEY)  # type: ignore[assignment]
    if caller is None:
        caller = gateway_of(request).access.caller(token_of(request))
        request.scope[CALLER_KEY] = caller  # type: ignore[literal-required]
    return caller


def token_of(request: Connection) -> str:
    """As OpenAI's clients send it, or Anthropic's, or a browser with a WebSocket."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return request.headers.get("x-api-key", "").strip() or offered_token(request)


def has_token(connection: Connection, handler: BaseRouteHandler) -> None:
    """A guard: a request without a valid token is refused before its body is read."""
    caller_of(connection)


async def client_of(request: HttpRequest) -> Client:
    return await caller_of(request).client()


# OpenAI


@post("/chat/completions", status_code=200, summary="Answer a conversation")
async def chat(request: BodyRequest, data: openai_chat.ChatRequest) -> ASGIApp:
    gateway = gateway_of(request)
    return await gateway.answer(request, openai_chat.parse(data, gateway.config.answer_tokens))


@post("/completions", status_code=200, summary="Continue a text")
async def completions(request: BodyRequest, data: openai_completions.CompletionRequest) -> ASGIApp:
    gateway, client = gateway_of(request), await client_of(request)
    prompts = [
        given if isinstance(given, str) else await client.detokenize(given, special=True, model=data.model or None)
        for given in openai_completions.inputs_of(data)
    ]
    return await gateway.answer(request, openai_completions.parse(data, prompts, gateway.config.answer_tokens))


@post("/embeddings", status_code=200, summary="Vectors of texts")
async def embed(request: BodyRequest, data: embeddings.EmbeddingRequest) -> ASGIApp:
    return Later(embeddings.answer(await client_of(request), data))


@post(["/rerank", "/reranking"], status_code=200, summary="Documents by how well they fit a query")
async def rerank_v1(request: BodyRequest, data: rerank.RerankRequest) -> ASGIApp:
    return Later(rerank.answer(await client_of(request), data))


@post(list(rerank.MORE_PATHS), status_code=200, summary="Documents by how well they fit a query")
async def rerank_elsewhere(request: BodyRequest, data: rerank.RerankRequest) -> ASGIApp:
    return Later(rerank.answer(await client_of(request), data))


@post("/responses", status_code=200, summary="Answer, and store the response")
async def respond(request: BodyRequest, data: ResponsesRequest) -> ASGIApp:
    gateway, owner = gateway_of(request), caller_of(request).name
    return await gateway.answer(request, responses.parse(data, gateway.config.answer_tokens, gateway.responses, owner))


@get("/responses/{id:str}", summary="A stored response")
async def one_response(request: BodyRequest, id: str) -> Response[bytes]:
    body = gateway_of(request).responses.body(caller_of(request).name, id)
    return Response(body, media_type="application/json")


@delete("/responses/{id:str}", status_code=200, summary="Delete a stored response")
async def delete_response(request: BodyRequest, id: str) -> JsonObject:
    return gateway_of(request).responses.delete(caller_of(request).name, id)


@get("/models", summary="The models of the mesh")
async def list_models(request: BodyRequest) -> JsonObject:
    return await models.listed(await client_of(request))


@get("/models/{name:path}", summary="One model")
async def one_model(request: BodyRequest, name: str) -> JsonObject:
    return await models.one(await client_of(request), name.lstrip("/"))


# llama-server


@post("/models/load", status_code=200, summary="Load a model")
async def load_model(request: BodyRequest, data: models.LoadRequest) -> JsonObject:
    return await models.load(await client_of(request), data)


@post("/models/unload", status_code=200, summary="Unload a model")
async def unload_model(request: BodyRequest, data: models.UnloadRequest) -> JsonObject:
    return await models.unload(await client_of(request), data)


@websocket("/stream")
async def stream(socket: WebSocket[Any, Any, Any]) -> None:
    """Described in `answers.websocket`."""
    gateway = gateway_of(socket)
    await socket.accept(subprotocols=PROTOCOL if PROTOCOL in offered_protocols(socket) else None)
    limit, caller, token = gateway.config.answer_tokens, caller_of(socket), token_of(socket)

    apis: Apis = {
        "chat": lambda body: openai_chat.parse(_decoder(openai_chat.ChatRequest)(body), limit),
        "messages": lambda body: anthropic_messages.parse(_decoder(anthropic_messages.MessagesRequest)(body)),
        "responses": lambda body: responses.parse(
            _decoder(ResponsesRequest)(body), limit, gateway.responses, caller.name
        ),
    }
    # The token is checked at each request: a connection lasts long, and the token may be revoked meanwhile.
    await SocketSession(socket, lambda: gateway.access.caller(token), gateway.feeds, apis).run()


# Anthropic


@post("/messages", status_code=200, summary="Answer a conversation (Anthropic)")
async def messages(request: BodyRequest, data: anthropic_messages.MessagesRequest) -> ASGIApp:
    return await gateway_of(request).answer(request, anthropic_messages.parse(data))


@post("/messages/count_tokens", status_code=200, summary="The number of tokens of a conversation")
async def count_tokens(request: BodyRequest, data: anthropic_messages.CountRequest) -> ASGIApp:
    return Later(anthropic_messages.count(await client_of(request), data))


# Health and metrics


@get(["/healthz", "/health"], summary="Whether the gateway runs")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@get("/readyz", summary="Whether a request would be answered")
async def readyz(request: BodyRequest) -> Response[dict[str, str]]:
    gateway = gateway_of(request)
    if gateway.stopping:
        return Response({"status": "the gateway is stopping"}, status_code=503)
    why_not = await gateway.readiness.why_not()
    return Response({"status": why_not or "ok"}, status_code=503 if why_not else 200)


@get("/metrics", include_in_schema=False)
async def page_of_metrics(request: BodyRequest) -> Response[str]:
    """With keys for admins only: a peer on this host may be a proxy for anybody."""
    gateway = gateway_of(request)
    if gateway.access.requires_tokens and not caller_of(request).identity.may_manage:
        raise LlamboError(Code.FORBIDDEN, "the metrics require the token of an admin")
    return Response(gateway.metrics.page(), media_type=prometheus.MEDIA_TYPE)


@get("/openapi.json", include_in_schema=False)
async def openapi(request: BodyRequest) -> Response[bytes]:
    return Response(_document(tokens=gateway_of(request).access.requires_tokens), media_type="application/json")


@cache
def _document(*, tokens: bool) -> bytes:
    """Of an application that serves nothing: the one that serves would add paths with pages that load scripts."""
    described = Litestar(
        [*_apis(), *OWN],
        openapi_config=OpenAPIConfig(
            title="llambo",
            version=llambo.__version__,
            components=Components(security_schemes={"token": SecurityScheme(type="http", scheme="bearer")}),
        ),
        logging_config=None,
    )
    return encode(completed(described.openapi_schema.to_schema(), tokens=tokens))


# The application

#: Routes that require an API token where there are keys.
V1 = [
    chat, completions, embed, rerank_v1, list_models, one_model,
    respond, one_response, delete_response,
    messages, count_tokens, stream,
]  # fmt: skip

OWN = [healthz, readyz, page_of_metrics, openapi]


def _apis() -> list[Router]:
    return [
        Router(path, route_handlers=handlers, guards=[has_token], security=[{"token": []}])
        for path, handlers in (("/v1", V1), ("/", [rerank_elsewhere, list_models, load_model, unload_model]))
    ]


def make_app(gateway: Gateway) -> Middleware:
    config = gateway.config
    cors = CORSConfig(allow_origins=list(config.cors), expose_headers=["x-request-id", "retry-after"])
    pages = routes.routes(gateway.access, token_of, Watches(lambda: gateway.stopping))
    app = Litestar(
        [*_apis(), *OWN, *pages],
        request_class=BodyRequest,
        request_max_body_size=config.body_bytes,
        cors_config=cors if config.cors else None,
        exception_handlers={Exception: answer_error},
        on_shutdown=[gateway.close],
        openapi_config=None,
        state=State({"gateway": gateway}),
        logging_config=None,
    )
    origins = None if gateway.access.requires_tokens else Origins(config.hosts, config.cors)
    return Middleware(app, config.http_requests, gateway.metrics, origins)


def answer_error(request: HttpRequest, error: Exception) -> Response[bytes]:
    """Any error, in the shape of the API that was used."""
    if isinstance(error, ValidationException):  # no route has parameters that could be invalid, so it is the body
        error = FieldError("", "the body is empty")
    elif isinstance(error, HTTPException):
        ollama = error.status_code == 404 and request.scope["path"].startswith("/api/")
        text = "this is a path of Ollama's own API; here it is OpenAI's, at /v1" if ollama else error.detail
        error = StatusError(error.status_code, text, error.headers)
    elif not isinstance(error, LlamboError):
        log.error("a request to %s failed", request.scope["path"], exc_info=error)
    found = as_llambo_error(error)
    request.scope[CODE_KEY] = found.code.value  # type: ignore[literal-required]
    reply = error_reply(found, shape_of(request.scope["path"]))
    return Response(reply.body, status_code=reply.status, headers=reply.headers, media_type="application/json")


# The OpenAPI document


def _fields(*optional: str, **properties: JsonObject) -> JsonObject:
    """The schema of an object. All of its properties are required except for `optional`."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "required": required, "properties": properties}


_TEXT = {"type": "string"}
_OBJECT = {"type": "object"}
_MAYBE_TEXT = {"type": ["string", "null"]}
_RETRYABLE = {"type": "boolean", "description": "The same request may succeed later"}
_OPENAI_ERROR = _fields(
    "hint",
    message=_TEXT,
    type=_TEXT,
    param={**_MAYBE_TEXT, "description": "The field that is wrong"},
    code=_MAYBE_TEXT,
    hint={**_TEXT, "description": "What to do about it"},
    retryable=_RETRYABLE,
)
ERRORS: dict[Shape, JsonObject] = {
    "openai": {"title": "An error in the shape of OpenAI's API", **_fields(error=_OPENAI_ERROR)},
    "anthropic": {
        "title": "An error in the shape of Anthropic's API",
        **_fields(type={"const": "error"}, error=_fields(type=_TEXT, message=_TEXT, retryable=_RETRYABLE)),
    },
}
_SOME = {"type": "array", "minItems": 1, "maxItems": 128}
_IDS = {**_SOME, "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31}}
#: A text, texts, the token ids of a text, or lists of token ids; msgspec has no such union.
TEXTS = {"anyOf": [{**_TEXT, "minLength": 1}, {**_SOME, "items": {**_TEXT, "minLength": 1}}, _IDS,
                   {**_SOME, "items": _IDS}]}  # fmt: skip
#: Paths whose answer may be a stream.
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


def completed(document: JsonObject, *, tokens: bool) -> JsonObject:
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
            is_api = path.startswith("/v1/") or path in (*rerank.MORE_PATHS, *models.MORE_PATHS)
            if is_api:
                responses |= {
                    "4XX": _error(path, "The request is invalid"),
                    "5XX": _error(path, "The mesh cannot answer now"),
                }
            elif path == "/readyz":
                responses["503"] = {**responses["200"], "description": "No worker is ready"}
            if path in STREAMED and method == "post":
                responses["200"]["content"] = {"application/json": {"schema": _OBJECT}, "text/event-stream": {}}
            elif is_api:
                schema = {"type": ["object", "array"]} if "rerank" in path else _OBJECT
                responses["200"]["content"] = {"application/json": {"schema": schema}}
            if not tokens:
                operation.pop("security", None)
    return document


def _error(path: str, what: str) -> JsonObject:
    schema = {"$ref": f"#/components/schemas/{_name(shape_of(path))}"}
    return {"description": what, "content": {"application/json": {"schema": schema}}}


def _name(shape: Shape) -> str:
    return {"openai": "OpenAIError", "anthropic": "AnthropicError"}[shape]
