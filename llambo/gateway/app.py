"""The gateway as an application: which path leads where.

Litestar routes, limits bodies and answers other origins. What an API reads is decoded by msgspec, strictly and once;
what it answers is an application of its own (see `replies`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, Router, WebSocket, delete, get, post, websocket
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.exceptions import HTTPException, ValidationException
from litestar.handlers import BaseRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.spec import Components, SecurityScheme
from litestar.types import ASGIApp

import llambo
from llambo.gateway.access import Access, Caller
from llambo.gateway.answers.asking import Prepared, encode
from llambo.gateway.answers.feed import Feeds
from llambo.gateway.answers.problems import FieldError, StatusError, of_exception, shape_of, told, unread
from llambo.gateway.answers.rendering import place_of
from llambo.gateway.answers.replies import CODE_KEY, Later, Streaming, Whole
from llambo.gateway.apis import anthropic_messages, embeddings, model_list, openai_chat, openai_completions, responses
from llambo.gateway.apis.responses_input import ResponsesRequest
from llambo.gateway.apis.responses_store import Store
from llambo.gateway.config import GatewayConfig
from llambo.gateway.dashboard import dashboard
from llambo.gateway.dashboard.watching import Watches
from llambo.gateway.http.front import CALLER_KEY, Front
from llambo.gateway.http.openapi import completed
from llambo.gateway.http.origins import Origins
from llambo.gateway.http.readiness import Readiness
from llambo.gateway.http.websocket import PROTOCOL, Apis, Conversation, offered_token
from llambo.gateway.observe.telemetry import Telemetry
from llambo.mesh.client.client import Client
from llambo.mesh.service import prometheus
from llambo.mesh.wire.errors import Code, LlamboError

log = logging.getLogger(__name__)


class Gateway:
    """What the routes share."""

    def __init__(self, config: GatewayConfig, access: Access) -> None:
        self.config, self.access = config, access
        self.telemetry = Telemetry()
        self.feeds = Feeds(config.resume_ms, self.telemetry)
        self.responses = Store()
        self.readiness = Readiness(access.own.client)
        self.stopping = False

    async def answer(self, request: Request[Any, Any, Any], prepared: Prepared) -> ASGIApp:
        """Begin what was asked for, or go on with it, and say how it is told."""
        caller = caller_of(request)
        digest = hashlib.blake2b(request.url.path.encode() + b"\n" + await request.body(), digest_size=16).digest()
        seen = request.headers.get("last-event-id")
        renderer = prepared.renderer
        if renderer is None or not seen:
            feed = await self.feeds.begin(caller, prepared.ask, digest if renderer is not None else b"")
            route = request.url.path
            self.feeds.trace(feed, f"POST {route}", request.headers, route)
            if renderer is None:
                return Whole(self.feeds, feed, prepared.whole)
            return Streaming(self.feeds, feed, renderer)
        if prepared.ask.choices > 1 or prepared.ask.more:
            raise FieldError("Last-Event-ID", "Last-Event-ID: a stream of several answers cannot be resumed")
        id, created, skip = place_of(seen)
        return Streaming(self.feeds, await self.feeds.resume(caller, id, created, digest), renderer, skip)

    async def close(self, app: Litestar) -> None:
        self.feeds.close()
        if self.feeds.traces is not None:
            await self.feeds.traces.close()
        await self.access.close()


class BodyRequest(Request[Any, Any, State]):
    """Decodes a body as the very type that its route asks for: "1" is no number, and what is wrong is named."""

    async def json(self) -> Any:
        field = self.route_handler.parsed_data_field
        assert field is not None, "only asked for where the route has data"
        try:
            return _decoder(field.annotation)(await self.body())
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise unread(error) from error


@cache
def _decoder(kind: Any) -> Callable[[bytes], Any]:
    return msgspec.json.Decoder(kind).decode


def gateway_of(request: ASGIConnection[Any, Any, Any, Any]) -> Gateway:
    found: Gateway = request.app.state.gateway
    return found


def caller_of(request: ASGIConnection[Any, Any, Any, Any]) -> Caller:
    """Who asks. Raises LlamboError if nobody knows him."""
    known: Caller | None = request.scope.get(CALLER_KEY)  # type: ignore[assignment]
    if known is None:
        known = gateway_of(request).access.caller(token_of(request))
        request.scope[CALLER_KEY] = known  # type: ignore[literal-required]
    return known


def token_of(request: ASGIConnection[Any, Any, Any, Any]) -> str:
    """As OpenAI's clients give it, or as Anthropic's do."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return request.headers.get("x-api-key", "").strip() or offered_token(request)


def known(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """A guard: strangers are turned away before their body is read."""
    caller_of(connection)


async def client_of(request: Request[Any, Any, Any]) -> Client:
    return await caller_of(request).client()


# --- OpenAI --------------------------------------------------------------------------------------------------


@post("/chat/completions", status_code=200, summary="Answer a conversation")
async def chat(request: BodyRequest, data: openai_chat.ChatRequest) -> ASGIApp:
    gateway = gateway_of(request)
    return await gateway.answer(request, openai_chat.prepare(data, gateway.config.answer_tokens))


@post("/completions", status_code=200, summary="Continue a text")
async def completions(request: BodyRequest, data: openai_completions.CompletionRequest) -> ASGIApp:
    gateway, client = gateway_of(request), await client_of(request)
    prompts = [
        given if isinstance(given, str) else await client.detokenize(given, special=True, model=data.model or None)
        for given in openai_completions.inputs_of(data)
    ]
    return await gateway.answer(request, openai_completions.prepare(data, prompts, gateway.config.answer_tokens))


@post("/embeddings", status_code=200, summary="Vectors of texts")
async def embed(request: BodyRequest, data: embeddings.EmbeddingRequest) -> ASGIApp:
    return Later(embeddings.answer(await client_of(request), data))


@post("/responses", status_code=200, summary="Answer, and remember it")
async def respond(request: BodyRequest, data: ResponsesRequest) -> ASGIApp:
    gateway, owner = gateway_of(request), caller_of(request).name
    return await gateway.answer(
        request, responses.prepare(data, gateway.config.answer_tokens, gateway.responses, owner)
    )


@get("/responses/{id:str}", summary="A response that was kept")
async def one_response(request: BodyRequest, id: str) -> Response[bytes]:
    body = gateway_of(request).responses.body(caller_of(request).name, id)
    return Response(body, media_type="application/json")


@delete("/responses/{id:str}", status_code=200, summary="Forget a response")
async def forget_response(request: BodyRequest, id: str) -> dict[str, Any]:
    return gateway_of(request).responses.delete(caller_of(request).name, id)


@get("/models", summary="The models that are served")
async def list_models(request: BodyRequest) -> dict[str, Any]:
    return await model_list.listed(await client_of(request))


@get("/models/{name:path}", summary="One model")
async def one_model(request: BodyRequest, name: str) -> dict[str, Any]:
    return await model_list.one(await client_of(request), name.lstrip("/"))


@websocket("/stream")
async def stream(socket: WebSocket[Any, Any, Any]) -> None:
    """See `websocket`."""
    gateway = gateway_of(socket)
    offered = [each.strip() for each in socket.headers.get("sec-websocket-protocol", "").split(",")]
    await socket.accept(subprotocols=PROTOCOL if PROTOCOL in offered else None)
    most, caller, token = gateway.config.answer_tokens, caller_of(socket), token_of(socket)

    def read(kind: Any, body: bytes) -> Any:
        return msgspec.structs.replace(_decoder(kind)(body), stream=True)

    apis: Apis = {
        "chat": lambda body: openai_chat.prepare(read(openai_chat.ChatRequest, body), most),
        "messages": lambda body: anthropic_messages.prepare(read(anthropic_messages.MessagesRequest, body)),
        "responses": lambda body: responses.prepare(read(ResponsesRequest, body), most, gateway.responses, caller.name),
    }
    # Asked at each request: a connection lasts, and a token may be withdrawn meanwhile.
    await Conversation(socket, lambda: gateway.access.caller(token), gateway.feeds, apis).run()


# --- Anthropic -----------------------------------------------------------------------------------------------


@post("/messages", status_code=200, summary="Answer a conversation, as Anthropic does")
async def messages(request: BodyRequest, data: anthropic_messages.MessagesRequest) -> ASGIApp:
    return await gateway_of(request).answer(request, anthropic_messages.prepare(data))


@post("/messages/count_tokens", status_code=200, summary="How many tokens a conversation has")
async def count_tokens(request: BodyRequest, data: anthropic_messages.CountRequest) -> ASGIApp:
    return Later(anthropic_messages.count(await client_of(request), data))


# --- how it is ---------------------------------------------------------------------------------------------


@get("/healthz", summary="Whether the gateway runs")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@get("/readyz", summary="Whether somebody would be answered")
async def readyz(request: BodyRequest) -> Response[dict[str, str]]:
    gateway = gateway_of(request)
    if gateway.stopping:
        return Response({"status": "the gateway stops"}, status_code=503)
    why_not = await gateway.readiness.why_not()
    return Response({"status": why_not or "ok"}, status_code=503 if why_not else 200)


@get("/metrics", include_in_schema=False)
async def page_of_metrics(request: BodyRequest) -> Response[str]:
    """With keys for an admin alone: a peer on this machine may be a proxy that speaks for anybody."""
    gateway = gateway_of(request)
    if gateway.access.wants_tokens and not caller_of(request).identity.may_manage:
        raise LlamboError(Code.FORBIDDEN, "only an admin's token may read the metrics")
    return Response(gateway.telemetry.page(gateway.feeds), media_type=prometheus.MEDIA_TYPE)


@get("/openapi.json", include_in_schema=False)
async def openapi(request: BodyRequest) -> Response[bytes]:
    return Response(_document(request.app), media_type="application/json")


@cache
def _document(app: Litestar) -> bytes:
    gateway: Gateway = app.state.gateway
    return encode(completed(app.openapi_schema.to_schema(), tokens=gateway.access.wants_tokens))


# --- putting it together -------------------------------------------------------------------------------------

#: What wants an API token where there are keys.
V1 = [
    chat, completions, embed, list_models, one_model,
    respond, one_response, forget_response,
    messages, count_tokens, stream,
]  # fmt: skip

OWN = [healthz, readyz, page_of_metrics, openapi]


def make_app(gateway: Gateway) -> Front:
    config = gateway.config
    cors = CORSConfig(allow_origins=list(config.cors), expose_headers=["x-request-id", "retry-after"])
    pages = dashboard.routes(gateway.access, token_of, Watches(lambda: gateway.stopping))
    app = Litestar(
        [Router("/v1", route_handlers=V1, guards=[known], security=[{"token": []}]), *OWN, *pages],
        request_class=BodyRequest,
        request_max_body_size=config.body_bytes,
        cors_config=cors if config.cors else None,
        exception_handlers={Exception: problem},
        on_shutdown=[gateway.close],
        openapi_config=OpenAPIConfig(
            title="llambo",
            version=llambo.__version__,
            render_plugins=[],
            components=Components(security_schemes={"token": SecurityScheme(type="http", scheme="bearer")}),
        ),
        state=State({"gateway": gateway}),
        logging_config=None,
    )
    origins = None if gateway.access.wants_tokens else Origins(config.hosts, config.cors)
    return Front(app, config.http_requests, gateway.telemetry, origins)


def problem(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Whatever went wrong, in the shape of the API that was asked."""
    if isinstance(error, ValidationException):  # no route has parameters that could be wrong
        error = FieldError("", "the body is empty")
    elif isinstance(error, HTTPException):
        # Litestar calls a client who left before his body was whole a fault of the server.
        left = error.detail == "client disconnected prematurely"
        error = StatusError(400 if left else error.status_code, error.detail, error.headers)
    elif not isinstance(error, LlamboError):
        log.error("a request to %s failed", request.scope["path"], exc_info=error)
    found = of_exception(error)
    request.scope[CODE_KEY] = found.code.value  # type: ignore[literal-required]
    said = told(found, shape_of(request.scope["path"]))
    return Response(said.body, status_code=said.status, headers=said.headers, media_type="application/json")
