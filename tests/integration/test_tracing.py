"""Traces of answers, sent by a gateway to a collector that this test is."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from llambo.testing.mesh import Mesh
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import FakeOptions
from tests.integration.gateway_process import GatewayProcess, chat, events

CHAT = "/v1/chat/completions"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Takes what is sent to it, by OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.came = threading.Condition()

    def until(self, name: str, count: int) -> list[Any]:
        """The spans, as soon as there are so many of this name."""
        with self.came:
            there = self.came.wait_for(lambda: len([s for s in self.spans if s.name == name]) >= count, TIMEOUT_S)
            assert there, f"no {count} spans {name!r} within {TIMEOUT_S} s; there are {[s.name for s in self.spans]}"
            return list(self.spans)


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        exported = ExportTraceServiceRequest.FromString(body)
        with self.server.came:
            for each in exported.resource_spans:
                self.server.services |= {
                    a.value.string_value for a in each.resource.attributes if a.key == "service.name"
                }
                for scope in each.scope_spans:
                    self.server.spans += scope.spans
            self.server.came.notify_all()
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Not to stderr."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    yield collector
    collector.shutdown()
    thread.join(TIMEOUT_S)
    collector.server_close()


def about(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_an_answer_is_one_trace_from_its_caller_to_the_engine(collector: Collector) -> None:
    fake = FakeOptions(tokens_per_s=100, ttft_ms=50)
    with Mesh(workers=1, fake=fake) as mesh, GatewayProcess(mesh.address) as gateway:
        began = time.time_ns()
        gateway.post(CHAT, chat(max_tokens=10), traceparent=f"00-{TRACE}-{PARENT}-01")
        found = collector.until(f"POST {CHAT}", 1)
        ended = time.time_ns()
        assert collector.services == {"llambo-gateway"}
        assert {span.trace_id.hex() for span in found} == {TRACE}
        root = next(span for span in found if span.name.startswith("POST"))
        assert root.parent_span_id.hex() == PARENT
        attributes = about(root)
        assert (attributes["http.route"], attributes["gen_ai.response.model"]) == (CHAT, "fake")
        assert attributes["gen_ai.usage.output_tokens"] == 10 and len(attributes["llambo.request"]) == 32
        phases = sorted((span for span in found if span is not root), key=lambda span: span.start_time_unix_nano)
        assert [span.name for span in phases] == ["queue", "dispatch", "prefill", "decode"]
        assert {span.parent_span_id for span in phases} == {root.span_id}
        assert about(phases[-1])["llambo.worker"] == "w0"
        assert began <= root.start_time_unix_nano <= root.end_time_unix_nano <= ended
        for span in phases:
            assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        decode = phases[-1].end_time_unix_nano - phases[-1].start_time_unix_nano
        assert decode >= 60e6, "nine pauses of 10 ms"

        # One that is not sampled leaves nothing; one without a parent begins a trace of its own.
        gateway.post(CHAT, chat(max_tokens=1), traceparent=f"00-{'1' * 32}-{PARENT}-00")
        gateway.post(CHAT, chat(max_tokens=1), traceparent="junk")
        assert gateway.ask("POST", CHAT, chat(model="no-such-model"))[0] == 404
        found = collector.until(f"POST {CHAT}", 3)
        roots = [span for span in found if span.name.startswith("POST")]
        assert len({span.trace_id for span in roots}) == 3 and "1" * 32 not in {span.trace_id.hex() for span in roots}
        assert about(roots[2])["error.type"] == "unknown_model" and roots[2].status.code == 2


def test_a_move_is_in_the_trace(collector: Collector) -> None:
    with Mesh(workers=1, fake=FakeOptions(tokens_per_s=100)) as mesh, GatewayProcess(mesh.address) as gateway:
        with gateway.open("POST", CHAT, chat(max_tokens=60, stream=True)) as response:
            events(response, 10)
            second = mesh.spawn("w1")
            mesh.workers[0].send(9)
            second.first_line()
            events(response)
        found = collector.until(f"POST {CHAT}", 1)
        root = next(span for span in found if span.name.startswith("POST"))
        assert about(root)["llambo.moves"] == 1
        lost = next(span for span in found if span.status.code == 2)
        assert lost.name == "run" and lost.status.message.startswith("lost: worker w0")
        assert [about(span)["llambo.worker"] for span in found if span.name == "decode"] == ["w1"]


def test_a_collector_that_is_away_delays_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with Mesh(workers=1, fake=FakeOptions()) as mesh, GatewayProcess(mesh.address) as gateway:
        assert gateway.post(CHAT, chat(max_tokens=5))["usage"]["completion_tokens"] == 5
        assert gateway.stop() == 0
