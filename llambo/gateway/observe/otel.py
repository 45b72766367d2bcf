"""OpenTelemetry traces of answers, from `traceparent` to the engine's decoding. One exporter of OTLP over HTTP.

The mesh itself carries nothing of it: when an answer is over its story is asked for, and made spans of (`spans`). This
file needs the extra `otel`; `tracing` says whether it is wanted.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from llambo.gateway.answers.feed import Feed
from llambo.gateway.observe.spans import Value, spans
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.messages import Usage

log = logging.getLogger(__name__)

SERVICE = "llambo-gateway"
#: Answers whose story is being asked for, and how long that may take at the end.
ASKED = 256
LEAVE_S = 2.0
_MS = 1_000_000


class OtelTraces:
    def __init__(self, resource: Resource, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._provider = provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = provider.get_tracer("llambo.gateway")
        self._extract = TraceContextTextMapPropagator().extract
        self._telling: set[asyncio.Task[None]] = set()

    def follow(self, feed: Feed, name: str, headers: Mapping[str, str], about: Mapping[str, Value]) -> None:
        """From its begin, which is now, to its end."""
        carrier = {key: headers[key] for key in ("traceparent", "tracestate") if key in headers}
        began = time.time_ns()
        span = self._tracer.start_span(
            name, self._extract(carrier), SpanKind.SERVER, attributes=dict(about), start_time=began
        )
        if span.is_recording():
            feed.on_over = lambda over: self._over(over, span, began)

    def _over(self, feed: Feed, span: Span, began: int) -> None:
        ended = time.time_ns()
        if len(self._telling) >= ASKED:
            self._close(span, feed, ended)
            return
        telling = asyncio.get_running_loop().create_task(self._tell(feed, span, began, ended))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    async def _tell(self, feed: Feed, span: Span, began: int, ended: int) -> None:
        """The phases of each of its requests, and then the span they are in."""
        try:
            client = await feed.caller.client()
            several = len(feed.requests) > 1
            for choice, id in enumerate(feed.requests):
                answer = feed.answers.get(choice)
                told = await client.query("why", id)
                self._phases(span, told, answer.usage if answer else Usage(), began, choice if several else -1)
        except LlamboError as error:
            # It was never accepted, or is forgotten already: its trace has no phases.
            log.debug("no story of %s: %s", feed.id, error.text)
        finally:
            self._close(span, feed, ended)

    def _phases(self, parent: Span, told: dict[str, Any], usage: Usage, began: int, choice: int) -> None:
        context = set_span_in_context(parent)
        for each in spans(told, usage):
            about = dict(each.about) | ({"llambo.choice": choice} if choice >= 0 else {})
            span = self._tracer.start_span(
                each.name, context, attributes=about, start_time=began + round(each.begin_ms * _MS)
            )
            if each.error:
                span.set_status(Status(StatusCode.ERROR, each.error))
            span.end(began + round(each.end_ms * _MS))

    def _close(self, span: Span, feed: Feed, ended: int) -> None:
        answers = list(feed.answers.values())
        span.set_attributes({
            "llambo.request": feed.id,
            "llambo.moves": sum(answer.moves for answer in answers),
            "gen_ai.response.model": feed.accepted_model,
            "gen_ai.response.finish_reasons": [answer.reason for answer in answers],
            "gen_ai.usage.input_tokens": sum(answer.usage.prompt_tokens for answer in answers[:1]),
            "gen_ai.usage.output_tokens": sum(len(answer.ids) for answer in answers),
        })  # fmt: skip
        if feed.error is not None:
            span.set_attribute("error.type", feed.error.code.value)
            span.set_status(Status(StatusCode.ERROR, feed.error.code.value))
        span.end(ended)

    async def close(self) -> None:
        """What is known is still sent, if somebody takes it."""
        if self._telling:
            await asyncio.wait(self._telling, timeout=LEAVE_S)
        leaving = threading.Thread(target=self._provider.shutdown, daemon=True)
        leaving.start()
        await asyncio.to_thread(leaving.join, LEAVE_S)
        if leaving.is_alive():
            # A collector that is not there is tried again and again.
            self._exporter.shutdown()


def sender(named: bool) -> OtelTraces:
    """`named`: the variables say what this service is called. They say the rest as well, and are read by the SDK."""
    return OtelTraces(Resource.create({} if named else {"service.name": SERVICE}), OTLPSpanExporter())
