"""What is sent to a peer that does not read is bounded in bytes, and one that reads late is served in the end."""

from __future__ import annotations

import pytest

from llambo.broker.config import Bounds
from llambo.broker.events import ClientSaid, ToClient, ToWorker, WorkerSaid
from llambo.broker.records.backlog import HEARTBEAT_BYTES, MESSAGE_BYTES
from llambo.mesh.wire import codec, limits, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.codec import NO_SESSION
from llambo.mesh.wire.errors import Code, ErrorInfo
from tests.unit.broker_bench import Bench, Client, Peer, Worker, request_id

BACKLOG_BYTES = Bounds().backlog_bytes
#: One answer may go beyond the bound. Heartbeats and requests for receipts go on.
MOST_BYTES = BACKLOG_BYTES + limits.RESULT_BYTES + 256 * 1024
ANSWER = request_id(1)
#: Large enough that all three kinds of questions have answers of some hundred kilobytes.
PIECES = [b"x" * 16_000] * 40


def with_answer(bench: Bench, client: Client) -> Worker:
    """A request that has ended, and whose tokens are stored."""
    worker = bench.worker()
    client.submit(1, max_tokens=100_000, detached=True)
    for at, piece in enumerate(PIECES):
        worker.publish(tokens.encode_chunk(worker.key(), at, [at], [piece]))
    worker.end(len(PIECES))
    client.send(m.EndAck([ANSWER]))
    return worker


def sent_to(peer: Peer) -> int:
    """Bytes on control since the start, as they are on the wire."""
    mine = [a for a in peer.bench.actions if isinstance(a, ToClient | ToWorker) and a.route == peer.route]
    blobs = sum(len(a.blob or b"") for a in mine if isinstance(a, ToWorker))
    return blobs + sum(len(codec.encode(NO_SESSION, [(a.message, None)])[1]) for a in mine)


def receipts_asked(client: Client) -> list[bytes]:
    return [end.id for end in client.ends if end.id != ANSWER]


QUESTIONS: dict[str, list[m.Message]] = {
    "replays": [m.Replay(ANSWER, 0)] * 256,
    "attaches": [m.Attach(ANSWER)] * 256,
    "queries": [m.Query(n, what) for n in range(1, 65) for what in ("events", "status", "requests", "metrics")],
    "unknown kinds": [m.Query(n, "x" * 128) for n in range(1, 257)],
    "unknown requests": [m.Attach(bytes(16), 0)] * 256,
}


@pytest.mark.parametrize("incarnation", [b"", b"i"])
@pytest.mark.parametrize("asked", QUESTIONS)
def test_a_client_that_does_not_read_is_owed_no_more_than_some_megabytes(asked: str, incarnation: bytes) -> None:
    bench = Bench()
    with_answer(bench, bench.client(b"other"))
    client = bench.client(b"evil", incarnation=incarnation)
    # Its heartbeats name whatever it likes, as fast as it likes
    rounds = 300
    for number in range(rounds):
        client.send(m.ClientHeartbeat(number), m.EndAck([b"", ANSWER]), *QUESTIONS[asked])
        if number % 4 == 0:
            bench.pass_time(200)
    slack = 0 if incarnation else rounds // 4 * HEARTBEAT_BYTES
    assert 128 * 1024 < sent_to(client) < MOST_BYTES + slack, asked
    # and neither another session, nor another address of the same, lets it begin anew.
    for _ in range(20):
        client.send(m.Goodbye())
        client.session = NO_SESSION
        client.send(m.ClientHello(incarnation=incarnation))
        client.session = client.received(m.Welcome)[-1].session
        client.send(*QUESTIONS[asked])
    assert sent_to(client) < MOST_BYTES + slack + 64 * 1024
    # Others are answered meanwhile.
    bench.client(b"third").send(m.Query(7, "status"))
    assert [a.message.query for a in bench.last if isinstance(a.message, m.Result)] == [7]


def test_parts_that_cannot_be_read_are_bounded_as_well() -> None:
    bench = Bench()
    client = bench.client()
    problems = [m.Problem(ErrorInfo(Code.BAD_MESSAGE, "x" * 200))] * 256
    for _ in range(200):
        bench.handle(ClientSaid(client.route, client.session, [], problems))
    assert sent_to(client) < MOST_BYTES
    # A stranger gets one answer to each of its messages, whatever is in it.
    for said in (ClientSaid, WorkerSaid):
        assert len(bench.handle(said(b"stranger", NO_SESSION, [], problems))) == 1
    hellos: list[tuple[m.Message, bytes]] = [(m.ClientHello(), b"")] * 256
    assert len(bench.handle(ClientSaid(b"other", NO_SESSION, hellos))) == 1


def test_a_client_that_reads_gets_all_it_asks_for() -> None:
    bench = Bench()
    with_answer(bench, bench.client(b"other"))
    client = bench.client(incarnation=b"i")
    for _ in range(100):
        client.send(m.Replay(ANSWER, 0))
        if bench.state.registry.clients[client.session].backlog.receipt:
            client.send(m.EndAck(receipts_asked(client)[-1:]))
    assert len(client.received(m.Page)) == 100 and bench.state.counters.peers.unread == 0
    assert sent_to(client) > 2 * MOST_BYTES


def test_who_reads_late_is_served_when_it_asks_again() -> None:
    bench = Bench()
    with_answer(bench, bench.client(b"other"))
    client = bench.client(incarnation=b"i")
    for _ in range(100):
        client.send(m.Replay(ANSWER, 0))
    pages = len(client.received(m.Page))
    assert pages < 100 and bench.state.counters.peers.unread
    # The request for a receipt may be lost with a connection: it is repeated. A wrong one is worth nothing.
    client.send(m.EndAck([bytes(16), b""]))
    assert bench.state.registry.clients[client.session].backlog.full
    bench.pass_time(1_000)
    asked = receipts_asked(client)
    assert len(asked) > 2 and len(set(asked)) == 1
    client.send(m.EndAck(asked[-1:]), m.Replay(ANSWER, 0))
    assert receipts_asked(client)[-1] != asked[-1], "what was sent since then has no receipt yet"
    client.send(m.EndAck(receipts_asked(client)[-1:]), m.Replay(ANSWER, 0))
    assert len(client.received(m.Page)) > pages


def test_a_client_without_an_incarnation_is_asked_for_nothing_and_served_by_its_heartbeats() -> None:
    bench = Bench()
    with_answer(bench, bench.client(b"other"))
    client = bench.client()
    for _ in range(100):
        client.send(m.ClientHeartbeat(1), m.Replay(ANSWER, 0))
        bench.pass_time(200)
    assert not receipts_asked(client), "it may take any END for its own"
    assert len(client.received(m.Page)) > 100 * HEARTBEAT_BYTES // limits.PAGE_BYTES


def test_a_client_without_an_incarnation_may_ask_faster_than_its_heartbeats_count() -> None:
    bench = Bench(backlog_bytes=20 * MESSAGE_BYTES)
    worker, client = bench.worker(), bench.client()
    for number in range(1, 101):
        client.submit(number)
        worker.end(0)
        assert client.ends[-1].id == request_id(number), "it was not served"
        client.send(m.EndAck([request_id(number)]))
        worker.send(*[m.End(cancel.id, 0, "cancelled", cancel.dispatch) for cancel in worker.received(m.Cancel)[-1:]])


def test_an_end_that_is_asked_for_again_and_again_is_paid_once() -> None:
    bench = Bench(backlog_bytes=20 * MESSAGE_BYTES)
    with_answer(bench, bench.client(b"other"))
    client = bench.client()
    for _ in range(30):
        client.send(m.Attach(ANSWER, len(PIECES)), m.EndAck([ANSWER]))
    assert bench.state.registry.clients[client.session].backlog.full


def test_ends_and_progress_are_not_repeated_to_who_does_not_read() -> None:
    bench = Bench(transcript_bytes=2**30)
    worker, client = bench.worker(slots=1_000), bench.client(incarnation=b"i")
    for number in range(1, 401):
        client.submit(number, max_tokens=1)
        worker.publish(worker.chunk(0, 5))
        if number % 2:
            worker.end(1)
    for _ in range(150):
        bench.pass_time(500)
        client.send(m.ClientHeartbeat(1))
        worker.beat(seq=2_000, claims=dict.fromkeys(bench.state.running, 1))
    assert sent_to(client) < BACKLOG_BYTES
    before = len(client.ends)
    bench.pass_time(1_000)
    receipt = bench.state.registry.clients[client.session].backlog.receipt
    assert {end.id for end in client.ends[before:]} == {receipt}, "an END is repeated, and not read"
    # When it shows that it reads, it gets them.
    client.send(m.EndAck([receipt]))
    bench.pass_time(1_000)
    assert {end.id for end in client.ends[before:]} >= {request_id(number) for number in range(1, 401, 2)}
    assert any(beat.progress for beat in client.received(m.BrokerHeartbeat)[-8:])


def test_a_worker_that_does_not_read_is_not_sent_prompts_again_and_again() -> None:
    bench = Bench()
    evil, client = bench.worker("evil"), bench.client(incarnation=b"i")
    for number in (1, 2):
        client.submit(number, b"x" * 2**20)
    # It says that it has seen everything, and runs nothing: each time they are dispatched anew,
    for _ in range(200):
        evil.beat(seq=2**50)
    assert sent_to(evil) < MOST_BYTES, "a heartbeat of 40 bytes is answered with prompts"
    # but not for ever; a new session over the same connection changes nothing, and other workers take over.
    evil.send(m.Goodbye())
    again = Worker(bench, evil.route, m.WorkerHello("evil", b"i", [m.ModelInfo("m")], 2))
    for _ in range(20):
        again.beat(seq=2**50)
    assert sent_to(evil) < MOST_BYTES
    other = bench.worker("other")
    assert {dispatch.id for dispatch in other.dispatches} == {request_id(1), request_id(2)}


def test_a_worker_that_reads_gets_prompts_of_any_size() -> None:
    bench = Bench(queue_bytes=2**30)
    worker, client = bench.worker(slots=20), bench.client(incarnation=b"i")
    for number in range(1, 21):
        client.submit(number, b"x" * 2**20)
    assert len(worker.dispatches) < 20
    bench.pass_time(100)
    while cancels := worker.received_last(m.Cancel):  # of a run that it does not have
        worker.send(*(m.End(cancel.id, 0, "cancelled", cancel.dispatch) for cancel in cancels))
    assert len(worker.dispatches) == 20
