"""Metrics: how they are counted, and the page on which Prometheus reads them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import pytest

from llambo.broker.events import Counted, Event
from llambo.broker.records.measurements import Counters
from llambo.broker.records.meter import CLASSES, MODELS, TIMED
from llambo.broker.records.registry import CONDITIONS
from llambo.broker.report import metrics_http
from llambo.broker.report import metrics_page as broker_metrics
from llambo.broker.report.metrics_http import MetricsServer
from llambo.mesh.service import host
from llambo.mesh.service.prometheus import NONE, OTHER, SERIES, Metric, Names, page
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.identity import Identity
from tests.unit.broker_bench import Bench, Worker, small_mesh
from tests.unit.pages import check_page, value

SECONDS = Metric("a_seconds", "histogram", "Waits", ("who",), (0.1, 1.0))
THINGS = Metric("things_total", "counter", 'What is "counted"\nand \\', ("who",))


# --- mesh/service/prometheus.py -----------------------------------------------------------------------------------


def test_what_is_counted_is_what_is_read() -> None:
    things, waits = THINGS.scalars(), SECONDS.histograms()
    things.at('a "quoted"\nname\\').value += 3
    things.at("b").value += 0.5
    for seconds in (0.05, 0.1, 0.5, 7.0):
        waits.at("a").observe(seconds)
    waits.at("b").observe(0.25, 4)

    samples = check_page(page([things, waits]))

    assert samples["things_total"] == {(("who", 'a "quoted"\nname\\'),): 3.0, (("who", "b"),): 0.5}
    assert [samples["a_seconds_bucket"][("le", le), ("who", "a")] for le in ("0.1", "1.0", "+Inf")] == [2, 3, 4]
    assert samples["a_seconds_sum"][("who", "a"),] == pytest.approx(7.65)
    assert samples["a_seconds_sum"][("who", "b"),] == 1.0
    assert samples["a_seconds_count"][("who", "b"),] == 4


def test_a_metric_without_labels_is_there_from_the_beginning() -> None:
    assert check_page(page([Metric("ups_total", "counter", "Ups").scalars()])) == {"ups_total": {(): 0.0}}


def test_of_too_many_label_sets_the_rest_is_other() -> None:
    things = THINGS.scalars()
    for number in range(10_000):
        things.at(f"who-{number}").value += 1
    assert len(things) == SERIES["counter"]
    samples = check_page(page([things]))["things_total"]
    assert samples[("who", OTHER),] == 10_000 - SERIES["counter"] + 1
    assert sum(samples.values()) == 10_000


def test_names_are_learned_and_bounded() -> None:
    names = Names(2)
    for name in ("a", "", "b", "a"):
        names.learn(name)
    assert [names.of(name) for name in ("a", "", "b")] == ["a", NONE, OTHER]


def test_names_that_look_the_same_are_one() -> None:
    names, things = Names(9), THINGS.scalars()
    for name in ("a\x1b", "a\x07"):
        names.learn(name)
        things.at(names.of(name)).value += 1
    assert list(check_page(page([things]))["things_total"].values()) == [2.0]


@pytest.mark.parametrize(
    "wrong",
    [
        ("Things_total", "counter", (), ()),
        ("things", "counter", (), ()),
        ("things_total", "gauge", (), ()),
        ("a_seconds", "histogram", (), ()),
        ("a_seconds", "histogram", (), (1.0, 0.5)),
        ("a_seconds", "histogram", ("le",), (1.0,)),
    ],
)
def test_a_metric_that_prometheus_would_not_like_cannot_be_made(wrong: tuple[Any, Any, Any, Any]) -> None:
    name, kind, labels, bounds = wrong
    with pytest.raises(AssertionError):
        Metric(name, kind, "text", labels, bounds)


# --- broker/records/meter.py and broker/report/metrics_page.py ---


class Unchecked(Bench):
    """Its invariants cost time for each request there is, and here there are thousands."""

    def handle(self, event: Event) -> list[Any]:
        self.last = list(self.core.handle(event, self.now_ms))
        self.actions += self.last
        return self.last


def samples(bench: Bench) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    return check_page(broker_metrics.page(bench.state, bench.now_ms))


def test_every_counter_is_listed_once() -> None:
    slots = set(Counters().flat())
    assert set(broker_metrics.COUNTED) | set(broker_metrics.METERED) == slots
    assert not set(broker_metrics.COUNTED) & set(broker_metrics.METERED)
    assert set(broker_metrics.SHELL) == set(Counted.__struct_fields__)


def test_the_page_has_every_metric_of_the_table_and_no_other() -> None:
    bench = Bench()
    names = [line.split()[2] for line in broker_metrics.page(bench.state, 0).splitlines() if line.startswith("# TYPE")]
    assert sorted(names) == sorted(metric.name for metric in broker_metrics.TABLE)
    assert len(set(names)) == len(names)


def test_a_request_from_its_queue_to_its_end() -> None:
    bench = Bench()
    worker, client = bench.worker(slots=1, model="m"), bench.client()
    client.submit(1)
    client.submit(2, priority="batch")
    assert samples(bench)["llambo_broker_requests_waiting"] == {(("model", "m"),): 1.0}
    bench.now_ms += 400
    worker.publish(worker.chunk(0, 7))
    bench.now_ms += 50
    worker.publish(worker.chunk(1, 8))
    bench.now_ms += 60
    worker.publish(worker.chunk(2, 9, 9))
    bench.now_ms += 10
    worker.beat(seq=1, claims={worker.key(): 4})
    usage = m.Usage(prompt_tokens=12, cached_tokens=5, prefill_ms=300.0, decode_ms=110.0)
    dispatch = worker.dispatches[0]
    worker.send(m.End(dispatch.id, 4, "length", dispatch.dispatch, usage))

    seen = samples(bench)
    one = {"model": "m", "class": NONE}
    assert value(seen, "llambo_broker_tokens_total", **one) == 4
    assert value(seen, "llambo_broker_first_token_seconds_sum", **one) == 0.4
    assert value(seen, "llambo_broker_inter_token_seconds_count", **one) == 3
    assert value(seen, "llambo_broker_inter_token_seconds_sum", **one) == pytest.approx(0.11)
    assert value(seen, "llambo_broker_inter_token_seconds_bucket", le="0.05", **one) == 3  # 50 ms, and twice 30 ms
    assert value(seen, "llambo_broker_inter_token_seconds_bucket", le="0.025", **one) == 0
    assert value(seen, "llambo_broker_prompt_tokens_total", **one) == 12
    assert value(seen, "llambo_broker_cached_tokens_total", **one) == 5
    assert value(seen, "llambo_broker_prefill_seconds_sum", **one) == 0.3
    assert value(seen, "llambo_broker_requests_ended_total", model="m", reason="length") == 1
    assert value(seen, "llambo_broker_request_seconds_sum", model="m", priority="normal") == 0.52
    # The second one had to wait for the first.
    assert value(seen, "llambo_broker_queue_seconds_sum", model="m", priority="normal") == 0
    assert value(seen, "llambo_broker_queue_seconds_sum", model="m", priority="batch") == 0.52
    assert value(seen, "llambo_broker_requests_running", **one) == 1


def test_tokens_are_counted_while_they_come_and_only_once() -> None:
    bench, worker, client = small_mesh()
    client.submit(1)
    counts = []
    for index in range(3):
        worker.publish(worker.chunk(index, 7))
        counts.append(value(samples(bench), "llambo_broker_tokens_total", model="m", **{"class": NONE}))
    worker.end(3)
    counts.append(value(samples(bench), "llambo_broker_tokens_total", model="m", **{"class": NONE}))
    assert counts == [1, 2, 3, 3]


def test_a_move_is_counted_and_its_pause_is_taken() -> None:
    bench = Bench()
    first, client = bench.worker("w1"), bench.client()
    client.submit(1)
    first.publish(first.chunk(0, 7))
    second = bench.worker("w2", incarnation=b"2")
    stale = first.chunk(1, 8)
    first.send(m.Goodbye("off"))
    bench.now_ms += 1_500
    second.publish(second.chunk(1, 8), stale)
    second.end(2)
    seen = samples(bench)
    assert value(seen, "llambo_broker_moves_total", model="m") == 1
    assert value(seen, "llambo_broker_stale_chunks_total") == 1
    assert value(seen, "llambo_broker_inter_token_seconds_sum", model="m", **{"class": NONE}) == 1.5
    assert value(seen, "llambo_broker_tokens_total", model="m", **{"class": NONE}) == 2
    assert value(seen, "llambo_broker_first_token_seconds_count", model="m", **{"class": NONE}) == 1
    assert bench.state.measured.meter.timed == 0


def test_so_many_streams_are_timed_and_no_more() -> None:
    bench, worker, client = small_mesh(slots=100)
    for number in range(4 * TIMED):
        client.submit(number)
        worker.publish(worker.chunk(0, 7))
    assert bench.state.measured.meter.timed == TIMED
    assert sum(request.watched for request in bench.state.requests.values()) == TIMED
    for number in range(4 * TIMED):
        client.send(m.Cancel(number.to_bytes(16, "big")))
    assert bench.state.measured.meter.timed == 0
    assert value(samples(bench), "llambo_broker_requests_ended_total", model="m", reason="cancelled") == 4 * TIMED
    assert value(samples(bench), "llambo_broker_tokens_total", model="m", **{"class": NONE}) == 4 * TIMED


def test_results_are_no_tokens() -> None:
    bench, worker, client = small_mesh()
    client.submit(1, task="embed")
    worker.publish(worker.chunk(0, 7, flags=3))
    worker.end(1, reason="stop")
    seen = samples(bench)
    assert value(seen, "llambo_broker_requests_ended_total", model="m", reason="stop") == 1
    assert value(seen, "llambo_broker_tokens_total", model="m", **{"class": NONE}) == 0
    assert value(seen, "llambo_broker_first_token_seconds_count", model="m", **{"class": NONE}) == 0


def test_refusals_by_reason_and_failures_by_code() -> None:
    bench = Bench(queue_requests=1, queue_ms=1_000)
    client = bench.client()
    client.submit(1)
    bench.worker(slots=1)
    client.submit(2, model="absent")
    client.submit(3, prompt=b"")
    for number in (4, 5, 6):
        client.submit(number)
    bench.pass_time(1_500)
    seen = samples(bench)
    reasons = {reason: count for ((_, reason),), count in seen["llambo_broker_refusals_total"].items()}
    assert reasons == {"no_worker": 1, "unknown_model": 1, "bad_request": 1, "busy": 1}
    assert sum(reasons.values()) == bench.state.counters.requests.refused
    assert seen["llambo_broker_request_errors_total"] == {(("code", "queue_timeout"),): 1.0}


def test_workers_by_state_and_class_with_zeros() -> None:
    bench = Bench()
    assert value(samples(bench), "llambo_broker_workers_ready") == 0
    bench.worker("w1", slots=3)
    hello = m.WorkerHello("w2", b"j", [m.ModelInfo("n")], 5, state="starting", node_class="gpu")
    Worker(bench, b"w2", hello)
    seen = samples(bench)
    assert value(seen, "llambo_broker_workers_ready") == 1
    assert len(seen["llambo_broker_workers"]) == 2 * len(CONDITIONS)
    assert value(seen, "llambo_broker_workers", state="loading", **{"class": "gpu"}) == 1
    assert value(seen, "llambo_broker_workers", state="ready", **{"class": "gpu"}) == 0
    assert seen["llambo_broker_model_workers_ready"] == {(("model", "m"),): 1.0, (("model", "n"),): 0.0}
    assert value(seen, "llambo_broker_slots", **{"class": "gpu"}) == 5


def test_what_the_shell_has_counted_is_shown() -> None:
    bench = Bench()
    bench.handle(Counted(dropped_frames=3, doors_refused=2))
    assert value(samples(bench), "llambo_broker_dropped_frames_total") == 3
    assert value(samples(bench), "llambo_broker_auth_refusals_total") == 2


def test_labels_are_bounded_whatever_is_asked_and_served() -> None:
    """A hundred identities ask for 10,000 models that do not exist; half of the requests are admitted all the same."""
    bench = Unchecked()
    who = [Identity("admin", "admin"), *(Identity(f"i{number}", "client") for number in range(100))]
    bench.keys(*who)
    lines = []
    for number in range(100):
        client = bench.client(b"c%d" % number, user=f"i{number}")
        for ask in range(100):
            id = b"%08d" % number + b"%08d" % ask
            client.send(m.InferenceRequest(id, f"no-{number}-{ask}", 10, resume=ask % 2 == 1), blob=b"hello")
        client.send(m.Goodbye())  # its request has ended
        lines.append(len(broker_metrics.page(bench.state, bench.now_ms).splitlines()))
    text = broker_metrics.page(bench.state, bench.now_ms)
    seen = check_page(text)
    assert "no-" not in text and "i99" not in text
    ended = sum(seen["llambo_broker_requests_ended_total"].values())
    assert sum(seen["llambo_broker_refusals_total"].values()) + ended == 10_000
    assert ended == value(seen, "llambo_broker_requests_ended_total", model=OTHER, reason="cancelled") == 5_000
    assert lines[0] == lines[-1]


def test_labels_are_bounded_whatever_is_served() -> None:
    plain = Unchecked()
    for number in range(300):
        names = [m.ModelInfo(f"model-{number}-{each}" * 6) for each in range(limits.MODELS_PER_WORKER)]
        hello = m.WorkerHello(f"w{number}", b"i", names, 1, node_class=f"class-{number}" * 8)
        worker = Worker(plain, b"r%d" % number, hello)
        client = plain.client(b"c%d" % number)
        client.submit(number, model=names[0].name)
        worker.publish(worker.chunk(0, 7))
        worker.end(1)
    text = broker_metrics.page(plain.state, plain.now_ms)
    seen = check_page(text)
    for labels in seen.values():
        models = {dict(key).get("model") for key in labels}
        classes = {dict(key).get("class") for key in labels}
        assert len(models) <= MODELS + 1 and len(classes) <= CLASSES + 1
    assert value(seen, "llambo_broker_requests_ended_total", model=OTHER, reason="length") == 300 - MODELS // 32
    assert sum(seen["llambo_broker_tokens_total"].values()) == 300
    assert len(text) < limits.RESULT_BYTES


@pytest.mark.parametrize(("role", "may"), [("admin", True), ("client", False)])
def test_only_an_admin_may_ask_for_them(role: Any, may: bool) -> None:
    bench = Bench()
    bench.keys(Identity("me", role))
    client = bench.client(user="me")
    client.send(m.Query(1, "metrics"))
    if may:
        check_page(msgspec.msgpack.decode(client.received(m.Result)[0].data)["page"])
    else:
        assert [problem.error.code for problem in client.received(m.Problem)] == [Code.FORBIDDEN]


def test_what_a_process_says_of_itself() -> None:
    seen = check_page(host.process_metrics_page())
    assert value(seen, "process_resident_memory_bytes") > 2**20
    assert value(seen, "process_open_fds") >= 3
    assert 0 <= time.time() - value(seen, "process_start_time_seconds") < 86_400


# --- broker/report/metrics_http.py ------------------------------------------------------------------------------------


@contextmanager
def serving(token: str = "") -> Iterator[MetricsServer]:
    """A server, and a thread that turns as the broker's loop does."""
    server, stopping = MetricsServer("127.0.0.1:0", token), threading.Event()

    def loop() -> None:
        while not stopping.wait(0.001):
            server.snapshot.turned(lambda: "the page\n")

    turning = threading.Thread(target=loop)
    turning.start()
    server.start()
    try:
        yield server
    finally:
        stopping.set()
        turning.join()
        server.close()


@pytest.fixture(scope="module")
def open_server() -> Iterator[MetricsServer]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def token_server() -> Iterator[MetricsServer]:
    with serving("right-and-long-enough") as server:
        yield server


def asked(server: MetricsServer, head: bytes) -> tuple[int, str]:
    with socket.create_connection(("127.0.0.1", server.port), 10) as peer:
        peer.sendall(head)
        reply = b""
        with suppress(ConnectionResetError):  # it may close with unread data
            while part := peer.recv(4096):
                reply += part
    first, _, body = reply.decode().partition("\r\n\r\n")
    assert f"Content-Length: {len(body)}" in first and "Connection: close" in first
    return int(first.split()[1]), body


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:9330\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.1\r\nhost: LocalHost:9330\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.1\r\nHost: [::1]:9330\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1.evil.example:9330\r\n\r\n", 403),
        (b"GET /metrics HTTP/1.1\r\nHost: \xff\r\n\r\n", 403),
        (b"GET /metrics?a=b HTTP/1.0\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../etc HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /metrics HTTP/2\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * metrics_http.HEAD_BYTES + b"\r\n\r\n", 431),
    ],
)
def test_what_the_server_answers(open_server: MetricsServer, head: bytes, status: int) -> None:
    assert asked(open_server, head)[0] == status


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Authorization: Bearer right-and-long-enough", 200),
        (b"authorization:  bearer  right-and-long-enough ", 200),
        (b"Authorization: Bearer wrong", 401),
        (b"Authorization: Basic right-and-long-enough", 401),
        (b"Authorization: Bearer ", 401),
        (b"Authorization: Bearer \xff\xfe", 401),
        (b"Host: box.example\r\nAuthorization: Bearer right-and-long-enough", 200),
        (b"X-Authorization: Bearer right-and-long-enough", 401),
    ],
)
def test_a_token_has_to_be_shown(token_server: MetricsServer, header: bytes, status: int) -> None:
    head = b"GET /metrics HTTP/1.1\r\n" + header + b"\r\n\r\n"
    assert asked(token_server, head)[0] == status
    assert asked(token_server, head.replace(b"/metrics", b"/healthz"))[0] == 200


# --- models at hosts ----------------------------------------------------------------------------------------------


def test_models_that_are_loaded_and_unloaded_and_what_waits_for_them() -> None:
    bench = Bench(lease_ms=10**9)
    host, client = (
        bench.host("box", *(m.HostedModel(name, needs={"ram": 60}) for name in "ab"), ram=100),
        bench.client(),
    )
    client.submit(1, model="a")
    bench.pass_time(100)
    assert value(samples(bench), "llambo_broker_requests_waiting_for_load", model=OTHER) == 1
    bench.worker("box-a", model="a", slots=1)
    for state in ("loading", "ready"):
        host.report(m.HostedModel("a", state=state, needs={"ram": 60}, worker="box-a", load_ms=2_000),
                    m.HostedModel("b", needs={"ram": 60}))  # fmt: skip
    page_now = samples(bench)
    assert value(page_now, "llambo_broker_requests_waiting_for_load", model="a") == 0
    assert value(page_now, "llambo_broker_model_loads_total", model="a") == 1
    assert value(page_now, "llambo_broker_model_load_seconds_sum", model="a") == 2
    states = {state: value(page_now, "llambo_broker_hosted_models", host="box", state=state)
              for state in ("ready", "stored", "failed")}  # fmt: skip
    assert states == {"ready": 1, "stored": 1, "failed": 0}
    assert value(page_now, "llambo_broker_host_memory_bytes", host="box", memory="ram") == 100
    assert value(page_now, "llambo_broker_host_memory_used_bytes", host="box", memory="ram") == 60
    host.report(m.HostedModel("a", needs={"ram": 60}),
                m.HostedModel("b", state="failed", needs={"ram": 60}, note="damaged", retry_ms=5_000))  # fmt: skip
    page_now = samples(bench)
    assert value(page_now, "llambo_broker_model_unloads_total", model="a") == 1
    assert value(page_now, "llambo_broker_model_load_failures_total", model=OTHER) == 1
