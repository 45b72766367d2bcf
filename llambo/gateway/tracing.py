"""OpenTelemetry traces of answers, from `traceparent` to the decoding in the engine, exported by OTLP over HTTP.

The mesh carries nothing of it, and nothing follows a request while it runs: when an answer is over, its story is
queried and becomes the phases of its span:

    queue      it waits for a worker             dispatch   a worker has it and has not accepted it yet
    prefill    the prompt is processed           decode     tokens are made
    run        the work of a worker that did not finish it; the next phase is elsewhere

Times are milliseconds since the broker received the request. The durations of prefill and decode are the engine's;
what lies between them, and after them, is neither.

This file needs the extra `otel`; `traces_of` in `server.py` imports it if traces are wanted.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from llambo.gateway.answers.feed import Arrival, Feed, Observer
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.messages import Usage
from llambo.mesh.wire.reports import StoryStep

log = logging.getLogger(__name__)

SERVICE = "llambo-gateway"
#: Stories that are being queried at once. Beyond it a trace has no phases.
QUERIES = 256
#: How long to wait for queries, and for the exporter, when the gateway stops.
CLOSE_S = 2.0
_MS = 1_000_000

Value = str | int | float | bool

#: A story has the worker and the attempt in its texts only. From a text of another form a span has fewer attributes.
_TO = re.compile(r"to (?P<worker>.+), attempt (?P<attempt>\d+), from token (?P<first>\d+)$")
_FROM = re.compile(r"from (?P<worker>.+), which has ")
#: Reasons of an end that are errors. The text of the error is left out: it may quote the prompt.
_ERRORS = ("error", "deadline", "cancelled")
#: Steps with which a request leaves its worker and waits again.
_LEAVES = ("lost", "refused")


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    begin_ms: float
    end_ms: float
    about: Mapping[str, Value] = field(default_factory=dict)
    #: Empty: none.
    error: str = ""


def phases(story: Iterable[StoryStep], usage: Usage, reason: str = "") -> Iterator[Phase]:
    """Also of a story whose middle was dropped: its phases still follow on each other. `reason`: why it ended."""
    phase, since = "queue", 0.0
    about: dict[str, Value] = {}
    for step in story:
        what, detail, at = step.what, step.detail, float(step.at_ms)
        if what == "dispatched":
            if phase == "queue":
                yield Phase("queue", since, at)
            phase, since, about = "dispatch", at, _about(_TO.match(detail))
        elif what == "adopted":
            if phase == "queue":
                yield Phase("queue", since, at)
            phase, since, about = "run", at, _about(_FROM.match(detail))
        elif what == "accepted" and phase == "dispatch":
            yield Phase("dispatch", since, at, about)
            phase, since = "run", at
        elif what in _LEAVES and phase != "queue":
            # A refusal may quote the prompt.
            yield Phase(phase, since, at, about, f"lost: {detail}" if what == "lost" else what)
            phase, since = "queue", at
        elif what == "worker done" and phase == "run":
            yield from _done(since, at, about, usage)
            phase = ""
        elif what == "ended" and phase:
            yield Phase(phase, since, at, about if phase != "queue" else {}, reason if reason in _ERRORS else "")
            phase = ""


def _about(found: re.Match[str] | None) -> dict[str, Value]:
    if found is None:
        return {}
    named: dict[str, Value] = {f"llambo.{name}": text for name, text in found.groupdict().items()}
    return {name: int(text) if name != "llambo.worker" else text for name, text in named.items()}


def _done(since: float, at: float, about: dict[str, Value], usage: Usage) -> Iterator[Phase]:
    """The durations that the engine measured, within the times that the broker saw."""
    if not usage.prefill_ms and not usage.decode_ms:
        yield Phase("run", since, at, about)
        return
    read = min(since + usage.prefill_ms, at)
    yield Phase("prefill", since, read, about | {"llambo.cached_tokens": usage.cached_tokens})
    yield Phase("decode", max(read, at - usage.decode_ms), at, about)


class OtelTraces(Observer):
    def __init__(self, resource: Resource, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._provider = provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = provider.get_tracer("llambo.gateway")
        self._extract = TraceContextTextMapPropagator().extract
        #: The span of each open feed, and when it began.
        self._open: dict[Feed, tuple[Span, int]] = {}
        self._finishing: set[asyncio.Task[None]] = set()

    def began(self, feed: Feed, arrival: Arrival | None) -> None:
        if arrival is None:  # its trace belongs to the gateway where it was begun
            return
        headers, began = arrival.headers, time.time_ns()
        carrier = {key: headers[key] for key in ("traceparent", "tracestate") if key in headers}
        span = self._tracer.start_span(
            arrival.name, self._extract(carrier), SpanKind.SERVER, attributes={"http.route": arrival.route},
            start_time=began,
        )  # fmt: skip
        if span.is_recording():
            self._open[feed] = span, began

    def ended(self, feed: Feed) -> None:
        if (found := self._open.pop(feed, None)) is None:
            return
        span, began = found
        ended = time.time_ns()
        if len(self._finishing) >= QUERIES:
            self._close(span, feed, ended)
            return
        finishing = asyncio.get_running_loop().create_task(self._finish(feed, span, began, ended))
        self._finishing.add(finishing)
        finishing.add_done_callback(self._finishing.discard)

    async def _finish(self, feed: Feed, span: Span, began: int, ended: int) -> None:
        """The phases of each of its requests, and then the span that contains them."""
        try:
            client = await feed.caller.client()
            several = len(feed.requests) > 1
            for choice, id in enumerate(feed.requests):
                answer = feed.answers.get(choice)
                report = await client.why(id)
                found = phases(report.story, answer.usage if answer else Usage(), report.reason)
                self._add_phases(span, found, began, choice if several else -1)
        except LlamboError as error:
            # It was never accepted, or the broker has dropped its story: its trace has no phases.
            log.debug("no story of %s: %s", feed.id, error.text)
        finally:
            self._close(span, feed, ended)

    def _add_phases(self, parent: Span, found: Iterable[Phase], began: int, choice: int) -> None:
        context = set_span_in_context(parent)
        for phase in found:
            attributes = dict(phase.about) | ({"llambo.choice": choice} if choice >= 0 else {})
            span = self._tracer.start_span(
                phase.name, context, attributes=attributes, start_time=began + round(phase.begin_ms * _MS)
            )
            if phase.error:
                span.set_status(Status(StatusCode.ERROR, phase.error))
            span.end(began + round(phase.end_ms * _MS))

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
        """Send what is known, if the collector takes it in time."""
        if self._finishing:
            await asyncio.wait(self._finishing, timeout=CLOSE_S)
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, CLOSE_S)
        if thread.is_alive():
            # The SDK retries a collector that does not answer; this ends the retries.
            self._exporter.shutdown()


def sender(named: bool) -> OtelTraces:
    """`named`: the variables name this service. The SDK itself reads the others."""
    return OtelTraces(Resource.create({} if named else {"service.name": SERVICE}), OTLPSpanExporter())
