"""The rules of the broker core, each tested through `handle`."""

from __future__ import annotations

import msgspec
import pytest

from llambo.broker import housekeeping
from llambo.broker.events import StopAsked, Tick
from llambo.broker.records.request import Lane
from llambo.broker.records.transcript import reservation
from llambo.broker.report import queries
from llambo.mesh.wire import limits, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.codec import NO_SESSION
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.identity import ANYONE
from llambo.worker.engine.fake_model import logprob_of
from tests.unit.broker_bench import Bench, request_id, small_mesh


def test_a_request_goes_from_submit_to_end() -> None:
    bench, worker, client = small_mesh()
    # When a request is submitted, it is accepted and dispatched at once
    id = client.submit(1, max_tokens=2)
    assert [a.id for a in client.received(m.Accepted)] == [id]
    assert worker.dispatches[0].max_tokens == 2
    # and tokens are forwarded as they come
    worker.publish(worker.chunk(0, 7))
    worker.publish(worker.chunk(1, 8, flags=tokens.FINAL))
    assert client.streamed() == [7, 8]
    # Then the worker's END ends it, and the worker may forget it
    key = worker.key()
    worker.end(2)
    assert [(e.count, e.reason, e.worker) for e in client.ends] == [(2, "length", "w")]
    assert worker.received(m.EndAck)[-1].ids == [key]
    # and the transcript is freed when the client has acknowledged
    client.send(m.EndAck([id]))
    assert bench.state.archive.owed_bytes == 0
    assert bench.state.reserved == 0


def test_the_client_learns_which_stop_string_it_was_even_if_the_end_was_there_before_the_tokens() -> None:
    _, worker, client = small_mesh()
    client.submit(1)
    worker.end(1, reason="stop", stop="##")
    assert client.ends == []
    worker.publish(worker.chunk(0, 7, flags=tokens.FINAL | tokens.STOPPED))
    assert [(e.reason, e.stop) for e in client.ends] == [("stop", "##")]


def test_the_same_submit_again_attaches() -> None:
    bench = Bench()
    worker, client, other = bench.worker(), bench.client(b"a"), bench.client(b"b")
    client.submit(1)
    client.submit(1)
    worker.publish(worker.chunk(0, 5))
    other.submit(1)
    assert len(worker.dispatches) == 1
    assert len(client.received(m.Accepted)) == 2
    # The client that came late gets the tokens so far.
    assert other.received(m.Page)[-1].next == 1
    worker.publish(worker.chunk(1, 6))
    assert client.streamed() == [5, 6]
    assert other.streamed() == [6]


def test_without_any_worker_ever_there_is_nothing_to_wait_for() -> None:
    client = Bench().client()
    client.submit(1)
    assert client.problems[0].error.code is Code.NO_WORKER
    assert client.problems[0].error.retry_after_ms > 0


@pytest.mark.parametrize(
    ("fields", "prompt", "code"),
    [
        ({"model": "other"}, b"hello", Code.UNKNOWN_MODEL),
        ({}, b"", Code.BAD_REQUEST),
        ({}, b"x" * (4 * 2**20 + 1), Code.TOO_LONG),
        ({"have": 3}, b"hello", Code.UNKNOWN_REQUEST),
        ({"sampling": msgspec.Raw(b"\xc5\xff\xff" + bytes(65535) + b"\xc0")}, b"hello", Code.BAD_REQUEST),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, object], prompt: bytes, code: Code) -> None:
    bench, _, client = small_mesh()
    client.submit(1, prompt, **fields)
    assert [p.error.code for p in client.problems] == [code]
    assert client.problems[0].id == request_id(1)
    assert bench.state.counters.requests.refused == 1


def test_with_several_models_one_has_to_be_named() -> None:
    bench = Bench()
    bench.worker("a", model="one")
    bench.worker("b", model="two")
    client = bench.client()
    client.submit(1)
    assert client.problems[0].error.code is Code.MODEL_REQUIRED
    assert "one, two" in client.problems[0].error.text
    client.submit(2, model="two")
    assert len(client.problems) == 1


def test_a_full_queue_is_busy_at_once_and_says_when_to_come_back() -> None:
    _, worker, client = small_mesh(slots=1, queue_requests=2)
    for number in range(4):
        client.submit(number)
    assert [p.error.code for p in client.problems] == [Code.BUSY]
    assert client.problems[0].error.retry_after_ms > 0
    assert [a.ahead for a in client.received(m.Accepted)] == [0, 0, 1]
    # When the running one ends, the next one is dispatched in the same event.
    worker.end(0)
    assert len(worker.dispatches) == 2


def test_transcripts_are_reserved_when_a_request_is_admitted() -> None:
    _, _, client = small_mesh(transcript_bytes=reservation(10) + 5)
    client.submit(1)
    client.submit(2)
    client.submit(3, max_tokens=100_000)
    assert [p.error.code for p in client.problems] == [Code.BUSY, Code.TOO_LONG]


def test_chunks_under_an_old_dispatch_are_stale() -> None:
    bench = Bench()
    first, client = bench.worker("a", slots=1), bench.client()
    client.submit(1)
    late = first.chunk(0, 99)
    second = bench.worker("b", slots=1)
    first.send(m.Goodbye())
    assert second.dispatches[0].id == request_id(1)
    first.publish(late)
    assert client.streamed() == []
    assert bench.state.counters.tokens.stale_chunks == 1


def test_another_worker_continues_from_the_transcript() -> None:
    bench = Bench()
    first, client = bench.worker("a"), bench.client()
    client.submit(1, seed=5)
    first.publish(first.chunk(0, 11, 12))
    second = bench.worker("b")
    first.send(m.Goodbye())
    assert second.dispatches[0].prefix == [11, 12]
    assert second.dispatches[0].seed == 5
    assert second.dispatches[0].dispatch != first.dispatches[0].dispatch
    second.publish(second.chunk(2, 13))
    second.end(3)
    assert client.streamed() == [11, 12, 13]
    assert client.ends[0].moves == 1


def test_a_last_token_that_outlived_its_worker_is_an_end() -> None:
    _, worker, client = small_mesh()
    client.submit(1)
    worker.publish(worker.chunk(0, 1, 2, flags=tokens.FINAL | tokens.STOPPED))
    worker.send(m.Goodbye())
    assert [(e.count, e.reason) for e in client.ends] == [(2, "stop")]


def test_overlaps_are_trimmed_and_repeats_dropped() -> None:
    bench, worker, client = small_mesh()
    client.submit(1)
    worker.publish(worker.chunk(0, 1, 2), worker.chunk(0, 1, 2), worker.chunk(1, 2, 3))
    assert client.streamed() == [1, 2, 3]
    assert bench.state.counters.tokens.duplicate_chunks == 1


def test_a_gap_is_asked_for_once_and_only_what_is_missing() -> None:
    bench, worker, client = small_mesh(tail_grace_ms=10, resend_ms=500)
    client.submit(1)
    worker.publish(worker.chunk(3, 4, 5), worker.chunk(5, 6))
    assert worker.received(m.Replay) == []
    bench.pass_time(9)
    assert worker.received(m.Replay) == []
    bench.pass_time(50)
    assert [(r.first, r.until) for r in worker.received(m.Replay)] == [(0, 3)]
    # The page closes the gap, and the stashed chunks follow.
    dispatch = worker.dispatches[0]
    worker.send(m.Page(dispatch.id, 0, 3, 6, [worker.chunk(0, 1, 2, 3)], dispatch.dispatch))
    assert client.streamed() == [1, 2, 3, 4, 5, 6]
    bench.pass_time(1_000)
    assert len(worker.received(m.Replay)) == 1


def test_an_end_that_overtakes_its_last_token_waits_a_moment() -> None:
    bench, worker, client = small_mesh()
    client.submit(1)
    worker.end(1)
    assert client.ends == []
    worker.publish(worker.chunk(0, 1))
    assert [e.count for e in client.ends] == [1]
    bench.pass_time(100)
    assert worker.received(m.Replay) == []


def test_progress_in_a_beat_shows_a_lost_tail() -> None:
    bench, worker, client = small_mesh()
    client.submit(1)
    worker.beat(seq=1, claims={worker.key(): 4})
    bench.pass_time(20)
    assert [(r.first, r.until) for r in worker.received(m.Replay)] == [(0, 0)]


def test_only_a_dispatch_the_worker_must_have_seen_can_be_missing() -> None:
    bench, worker, client = small_mesh()
    client.submit(1)
    seq = worker.dispatches[0].seq
    worker.beat(seq=seq - 1)
    assert len(worker.dispatches) == 1
    worker.beat(seq=seq)
    assert len(worker.dispatches) == 2
    assert bench.state.counters.requests.moved == 1


def test_a_claimed_run_that_the_broker_does_not_know_is_cancelled() -> None:
    bench = Bench()
    worker = bench.worker()
    worker.beat(claims={b"r" * 16 + b"d" * 8: 3})
    assert [(c.id, c.dispatch) for c in worker.received(m.Cancel)] == [(b"r" * 16, b"d" * 8)]


def test_cancel_ends_at_once_and_frees_the_slot_when_the_worker_has_stopped() -> None:
    _, worker, client = small_mesh(slots=1)
    id = client.submit(1)
    client.submit(2)
    client.send(m.Cancel(id))
    assert [(e.id, e.reason) for e in client.ends] == [(id, "cancelled")]
    assert len(worker.dispatches) == 1
    worker.end(0, number=0, reason="cancelled")
    assert [d.id for d in worker.dispatches] == [id, request_id(2)]
    # Cancelled twice, or too late: the same END.
    client.send(m.Cancel(id))
    assert client.ends[-1] == client.ends[0]
    client.send(m.Cancel(request_id(99)))
    assert client.problems[-1].error.code is Code.UNKNOWN_REQUEST


def test_a_silent_worker_loses_its_lease_and_a_silent_client_its_requests() -> None:
    bench, worker, client = small_mesh(lease_ms=1_000, client_lease_ms=2_000)
    client.submit(1)
    bench.pass_time(900)
    assert worker.session in bench.state.registry.workers
    bench.pass_time(300)
    assert worker.session not in bench.state.registry.workers
    assert bench.state.requests[request_id(1)].state.value == "waiting"
    bench.pass_time(1_000)
    assert not bench.state.requests
    assert not bench.state.registry.clients


def test_a_detached_request_goes_on_without_its_client_and_is_kept() -> None:
    bench, worker, client = small_mesh(client_lease_ms=1_000, detached_ms=60_000, lease_ms=10**6)
    id = client.submit(1, detached=True)
    client.send(m.Goodbye())
    worker.publish(worker.chunk(0, 1))
    worker.end(1)
    other = bench.client(b"o")
    other.send(m.Attach(id))
    assert other.ends[0].count == 1
    other.send(m.Replay(id, 0))
    assert other.received(m.Page)[-1].next == 1
    other.send(m.EndAck([id]))
    bench.pass_time(61_000)
    third = bench.client(b"t")
    third.send(m.Attach(id))
    assert third.problems[0].error.code is Code.EXPIRED


def test_a_client_that_comes_back_an_hour_later_has_its_result_and_a_minute_after_that_not() -> None:
    # With the defaults.
    bench, worker, client = small_mesh()
    id = client.submit(1, detached=True)
    worker.publish(worker.chunk(0, 5, 6))
    worker.end(2)
    client.send(m.Goodbye())
    worker.send(m.Goodbye())
    for number, later_ms, code in ((1, 59 * 60_000, None), (2, 60_000, Code.EXPIRED)):
        bench.now_ms += later_ms
        bench.handle(Tick())
        back = bench.client(b"back %d" % number)
        back.send(m.Attach(id))
        back.send(m.Replay(id, 0))
        pages = [tokens.ids_of(page.chunks) for page in back.received(m.Page)]
        assert ([5, 6] in pages) == (code is None)
        assert [problem.error.code for problem in back.problems[:1]] == ([code] if code else [])


def test_a_detached_client_receives_nothing_more_and_only_the_last_one_ends_it() -> None:
    bench = Bench()
    worker, client, other = bench.worker(), bench.client(b"a"), bench.client(b"b")
    id = client.submit(1)
    other.send(m.Attach(id))
    worker.publish(worker.chunk(0, 1))
    other.send(m.Detach(id))
    worker.publish(worker.chunk(1, 2))
    assert (client.streamed(), other.streamed()) == ([1, 2], [1])
    client.send(m.Detach(id))
    assert bench.state.requests == {}
    assert client.ends == other.ends == []
    assert len(worker.received(m.Cancel)) == 1
    # A detached one goes on without any client.
    id = client.submit(2, detached=True)
    client.send(m.Detach(id))
    assert id in bench.state.requests


def test_detached_results_are_bounded_the_oldest_go_first() -> None:
    bench, worker, client = small_mesh(detached_bytes=100)
    for number in (1, 2):
        client.submit(number, detached=True)
        worker.publish(worker.chunk(0, *range(10)))
        worker.end(10)
    assert bench.state.archive.detached_bytes <= 100
    assert bench.state.archive.ended[request_id(1)].transcript is None
    assert bench.state.archive.ended[request_id(2)].transcript is not None


def test_without_a_stream_the_end_brings_the_first_page() -> None:
    _, worker, client = small_mesh()
    client.submit(1, stream=False)
    worker.publish(worker.chunk(0, 1, 2))
    assert client.streamed() == []
    worker.end(2)
    assert (client.ends[0].count, client.received(m.Page)[0].next) == (2, 2)


def test_an_end_is_sent_until_it_is_acknowledged() -> None:
    bench, worker, client = small_mesh(resend_ms=500, heartbeat_ms=200, lease_ms=10**6)
    id = client.submit(1)
    worker.end(0)
    bench.pass_time(1_500)
    assert len(client.ends) >= 3
    client.send(m.EndAck([id]))
    before = len(client.ends)
    bench.pass_time(1_500)
    assert len(client.ends) == before


def test_a_deadline_stops_the_decode_and_ends_the_request() -> None:
    bench, worker, client = small_mesh()
    client.submit(1, deadline_ms=300)
    assert worker.dispatches[0].deadline_ms == 300
    bench.pass_time(301)
    assert client.ends[0].reason == "deadline"
    assert client.ends[0].error is not None
    assert len(worker.received(m.Cancel)) == 1


def test_requests_are_held_when_the_last_worker_is_gone_and_not_for_ever() -> None:
    bench, worker, client = small_mesh(hold_ms=5_000)
    client.submit(1)
    worker.send(m.Goodbye())
    client.submit(2)
    assert client.problems == []
    bench.pass_time(3_000)
    client.send(m.ClientHeartbeat())
    back = bench.worker(incarnation=b"j")
    assert sorted(d.id for d in back.dispatches) == [request_id(1), request_id(2)]
    back.send(m.Goodbye())
    bench.pass_time(7_000)
    assert {e.error.code for e in client.ends if e.error} == {Code.NO_WORKER}


def shown(bench: Bench) -> list[str]:
    return [row.model for row in queries.models(bench.state, "", bench.now_ms, ANYONE)]


def test_a_name_that_never_served_is_forgotten_with_its_worker() -> None:
    bench = Bench(startup_grace_ms=0, hold_ms=3_000)
    client, junk = bench.client(), bench.worker("j", model="junk", state="starting")
    junk.beat(state="starting")
    client.submit(1, model="junk")
    assert shown(bench) == ["junk"] and client.problems == []
    # When its worker cannot load it: what waits already is held, as the worker may be started again
    junk.send(m.Goodbye("junk is no GGUF file"))
    assert client.ends == []
    bench.pass_time(5_000)
    client.send(m.ClientHeartbeat())
    assert {end.error.code for end in client.ends if end.error} == {Code.NO_WORKER}
    # Then nothing lists it, and a request for it is refused at once
    assert shown(bench) == []
    bench.worker("w", model="m")
    client.submit(2, model="junk")
    assert [problem.error.code for problem in client.problems] == [Code.UNKNOWN_MODEL]
    # Without a request in its queue it is gone at once
    other = bench.worker("k", model="other", state="starting")
    other.send(m.Goodbye("other is no GGUF file"))
    assert shown(bench) == ["m"]


def test_a_model_that_is_gone_holds_no_request_and_is_not_listed() -> None:
    bench, worker, client = small_mesh(hold_ms=5_000)
    worker.send(m.Goodbye())
    bench.pass_time(4_000)
    client.send(m.ClientHeartbeat())
    # A moment later it is still waited for: its worker may be restarting. The wait is that of the mesh, not another one
    client.submit(1)
    assert shown(bench) == ["m"] and client.problems == []
    bench.pass_time(2_000)
    client.send(m.ClientHeartbeat())
    assert [end.error and end.error.code for end in client.ends[:1]] == [Code.NO_WORKER]
    assert shown(bench) == []
    for model in ("m", ""):
        client.submit(2, model=model)
    assert [problem.error.code for problem in client.problems] == [Code.NO_WORKER, Code.NO_WORKER]
    assert "the last one left 6 s ago" in client.problems[0].error.text and client.problems[0].error.retry_after_ms
    # And when it is back, all is as before
    back = bench.worker(incarnation=b"j")
    client.submit(3)
    assert shown(bench) == ["m"] and [dispatch.id for dispatch in back.dispatches] == [request_id(3)]


def test_what_had_a_broker_or_a_worker_before_is_held_for_the_whole_time() -> None:
    bench, worker, client = small_mesh(hold_ms=5_000)
    client.submit(1)
    worker.send(m.Goodbye())
    bench.pass_time(4_000)
    client.send(m.ClientHeartbeat())
    client.submit(2, resume=True)
    bench.pass_time(3_000)
    client.send(m.ClientHeartbeat())
    assert {end.id for end in client.ends} == {request_id(1)}


def test_a_refusal_closes_a_worker_until_its_next_beat() -> None:
    _, worker, client = small_mesh()
    client.submit(1)
    dispatch = worker.dispatches[0]
    worker.send(m.Reject(dispatch.id, dispatch.dispatch, ErrorInfo(Code.BUSY, "full")))
    assert len(worker.dispatches) == 1
    worker.beat(seq=dispatch.seq)
    assert len(worker.dispatches) == 2
    # A final refusal is the answer.
    dispatch = worker.dispatches[1]
    worker.send(m.Reject(dispatch.id, dispatch.dispatch, ErrorInfo(Code.TOO_LONG, "9 > 8"), final=True))
    assert client.ends[0].error == ErrorInfo(Code.TOO_LONG, "9 > 8")


def test_a_name_belongs_to_the_living() -> None:
    bench = Bench(lease_ms=10**6)
    worker = bench.worker("w", incarnation=b"1")
    thief = bench.worker("w", incarnation=b"2")
    error = thief.received(m.Problem)[0].error
    assert error.code is Code.NAME_TAKEN and error.text.endswith("start this one with --name w-2")
    # The same process on fresh sockets is welcome, and so is its successor once it is gone.
    again = bench.worker("w", incarnation=b"1", route=b"fresh")
    assert again.session not in (NO_SESSION, worker.session)
    bench.route_gone(again.route)
    successor = bench.worker("w", incarnation=b"3")
    assert successor.received(m.Welcome)


def test_after_a_suspension_of_the_broker_no_peer_is_given_up() -> None:
    # Given a machine that was suspended for a minute, in the middle of an answer
    bench, worker, client = small_mesh()
    client.submit(1)
    bench.pass_time(500)
    bench.now_ms += 60_000
    # When it goes on
    bench.handle(Tick())
    assert (bench.state.counters.peers.workers_lost, bench.state.counters.peers.clients_lost) == (0, 0)
    assert worker.received(m.Cancel) == []
    # Then silence counts from there on.
    bench.pass_time(2_100)
    assert bench.state.counters.peers.workers_lost == 1


def test_a_blink_of_the_connection_moves_the_session_and_nothing_else() -> None:
    bench, worker, client = small_mesh(reconnect_grace_ms=300)
    client.submit(1)
    bench.route_gone(worker.route)
    bench.pass_time(200)
    worker.route = b"new"
    worker.beat(seq=1, claims={})
    bench.pass_time(400)
    assert worker.session in bench.state.registry.workers
    bench.route_gone(b"new")
    bench.pass_time(400)
    assert worker.session not in bench.state.registry.workers


def test_an_unknown_session_is_answered_under_its_own_name() -> None:
    bench = Bench()
    client = bench.client()
    client.session = b"forgotte"
    client.send(m.ClientHeartbeat(), m.ClientHeartbeat())
    assert [p.error.code for p in client.received_last(m.Problem)] == [Code.UNKNOWN_SESSION]
    assert bench.last[0].session == b"forgotte"


@pytest.mark.parametrize("versions", [(2, 3), (0, 0)])
def test_versions_that_do_not_meet_are_refused(versions: tuple[int, int]) -> None:
    bench = Bench()
    client = bench.client()
    client.route, client.session = b"x", bytes(8)
    client.send(m.ClientHello(versions))
    assert client.problems[0].error.code is Code.BAD_VERSION


def test_junk_on_the_token_plane_is_counted_and_harmless() -> None:
    bench, worker, client = small_mesh()
    client.submit(1)
    good = worker.chunk(0, 1)
    forged = tokens.encode_chunk(b"k" * 24, 0, [1], [b"x"])
    worker.publish(b"", b"T", b"x" * 300, good[:30], good[:32], forged, good)
    assert client.streamed() == [1]
    assert bench.state.counters.tokens.malformed_frames == 5
    assert bench.state.counters.tokens.stale_chunks == 1


DEEP = b"\x93\x91\x01\x91\xc4\x01x" + b"\x91" * 9_000 + b"\xc0"


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", b"\x92\x91\x01\x90", b"\x92\x92\x01\x02\x91\xc4\x01x", DEEP],
    ids=["empty", "no msgpack", "no piece", "other count", "deep"],
)
def test_a_malformed_chunk_never_enters_a_transcript(body: bytes) -> None:
    bench, worker, client = small_mesh()
    client.submit(1)
    bad = worker.chunk(0, 1)[: tokens.HEAD_BYTES] + body
    worker.publish(bad)
    assert client.streamed() == []
    assert bench.state.counters.tokens.malformed_frames == 1
    # On the token plane any peer may have sent it. In a page it comes from the worker itself.
    dispatch = worker.dispatches[0]
    worker.send(m.Page(dispatch.id, 0, 1, 1, [bad], dispatch.dispatch))
    assert client.ends[0].error is not None
    assert client.ends[0].error.code is Code.ENGINE_FAILED


def test_flags_of_a_later_release_do_not_end_an_answer() -> None:
    bench = Bench()
    worker, client = bench.worker("a"), bench.client()
    client.submit(1)
    worker.publish(worker.chunk(0, 1, flags=16))
    worker.send(m.Goodbye())
    assert bench.worker("b").dispatches[0].prefix == [1]


def test_a_worker_that_sends_more_than_was_asked_for_is_stopped() -> None:
    _, worker, client = small_mesh()
    client.submit(1, max_tokens=1)
    piece = b"y" * 2_500
    worker.publish(tokens.encode_chunk(worker.key(), 0, [1], [piece]))
    assert client.ends[0].error is not None
    assert client.ends[0].error.code is Code.ENGINE_FAILED


def test_logprobs_are_kept_trimmed_and_paged_with_their_tokens_and_have_room() -> None:
    bench = Bench()
    worker, client, late = bench.worker(), bench.client(), bench.client()
    count, most = 300, limits.TOP_LOGPROBS
    id = client.submit(1, max_tokens=count, logprobs=most)
    dispatch = worker.dispatches[0]
    assert dispatch.logprobs == most
    logprobs = [logprob_of(token, token, most) for token in range(count)]

    def chunk(first: int, until: int) -> bytes:
        ids = list(range(first, until))
        return tokens.encode_chunk(worker.key(), first, ids, [b" word"] * len(ids), 0, logprobs[first:until])

    # Given chunks that overlap, of tokens that come one by one: the worst case for their size
    worker.publish(chunk(0, 3), chunk(1, 5), *[chunk(at, at + 1) for at in range(5, count)])
    worker.send(m.End(dispatch.id, count, "length", dispatch.dispatch))
    # Then they fit the reservation
    assert [end.reason for end in client.ends] == ["length"]
    assert client.ends[0].error is None
    # And a client that fetches them later gets all of them
    fetched: list[tokens.Logprob] = []
    while len(fetched) < count:
        late.send(m.Replay(id, len(fetched)))
        for frame in late.received_last(m.Page)[0].chunks:
            found = tokens.decode_chunk(frame)
            assert found is not None and found.body.logprobs is not None
            fetched += found.body.logprobs[len(fetched) - found.first :]
    assert fetched == logprobs


def test_malformed_logprobs_are_dropped_on_arrival() -> None:
    bench, worker, client = small_mesh()
    client.submit(1, logprobs=0)
    worker.publish(tokens.encode_chunk(worker.key(), 0, [1, 2], [b"x", b"y"], 0, [tokens.Logprob(-1.0)]))
    assert client.streamed() == []
    assert bench.state.counters.tokens.malformed_frames == 1


def test_queries_answer_in_pages_and_name_what_they_do_not_know() -> None:
    _, _, client = small_mesh()
    id = client.submit(1)
    for number, (what, argument) in enumerate(
        [("status", ""), ("workers", ""), ("models", ""), ("requests", ""), ("events", "0"), ("why", id.hex())]
    ):
        client.send(m.Query(number, what, argument))
        result = client.received_last(m.Result)[0]
        assert (result.query, result.pages) == (number, 1)
        assert msgspec.msgpack.decode(result.data)
    story = msgspec.msgpack.decode(result.data)["story"]
    assert [entry["what"] for entry in story] == ["submitted", "dispatched"]
    for what, argument in [("weather", ""), ("why", "zz"), ("why", "abcdef")]:
        client.send(m.Query(9, what, argument))
        assert client.received_last(m.Problem)[0].query == 9


def test_a_broker_that_stops_says_so() -> None:
    bench, worker, client = small_mesh()
    bench.handle(StopAsked("maintenance"))
    assert worker.received(m.Goodbye)[0].reason == client.received(m.Goodbye)[0].reason == "maintenance"


def test_names_of_models_are_not_remembered_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "MODELS_KNOWN", 3)
    bench = Bench(lease_ms=10**6)
    for number in range(6):
        bench.worker(f"w{number}", model=f"m{number}").send(m.Goodbye())
        bench.pass_time(100)
    bench.worker("w", model="m0")
    bench.pass_time(2_000)
    assert sorted(bench.state.models.unserved_since) == ["m0", "m4", "m5"]


def test_a_story_tells_when_the_first_token_came_and_what_prompt_and_answer_took() -> None:
    bench, worker, client = small_mesh()
    client.submit(1)
    key = worker.dispatches[0]
    worker.send(m.Accept(key.id, key.dispatch))
    bench.pass_time(300)
    worker.publish(worker.chunk(0, 5, 6))
    usage = m.Usage(prompt_tokens=812, cached_tokens=12, prefill_ms=290.4, decode_ms=20)
    worker.send(m.End(key.id, 2, "length", key.dispatch, usage=usage))
    story = queries.why(bench.state, request_id(1).hex(), bench.now_ms, ANYONE)["story"]
    assert [(step["what"], step["detail"]) for step in story[2:5]] == [
        ("accepted", ""),
        ("first token", "from w"),
        ("worker done", "2 tokens, length; prompt of 812 tokens, 12 cached, prefill 0.290 s, decode 0.020 s"),
    ]
    assert story[3]["at_ms"] == 300


def test_a_story_is_bounded_and_keeps_both_ends() -> None:
    bench, worker, client = small_mesh(engine_failures=10**6)
    client.submit(1)
    for _ in range(100):
        worker.send(m.EngineLost([worker.key()], "again", [], True))
        worker.beat(seq=10**6, claims={})
    story = bench.state.requests[request_id(1)].story
    assert len(story) == 64
    assert story[0][1] == "submitted"
    assert story[-1][1] == "dispatched"


# --- the very same model -------------------------------------------------------------------------------


def test_a_stream_goes_on_only_where_the_model_is_the_very_same() -> None:
    # Given a stream with tokens from one of three workers, of which two have the very same model
    bench = Bench(hold_ms=1_000)
    same = bench.worker("a", fingerprint="one")
    client = bench.client()
    client.submit(1)
    same.publish(same.chunk(0, 5, 6))
    other = bench.worker("b", fingerprint="two")
    bench.route_gone(same.route)
    # When its worker is lost
    bench.pass_time(600)
    # Then it waits, although there is a worker with a model of that name
    assert other.dispatches == []
    # ... new requests do not
    client.submit(2)
    assert [dispatch.prefix for dispatch in other.dispatches] == [[]]
    # ... and it goes on where it can
    again = bench.worker("c", fingerprint="one")
    assert [dispatch.prefix for dispatch in again.dispatches] == [[5, 6]]


def test_without_tokens_any_worker_with_the_model_will_do() -> None:
    bench = Bench()
    first = bench.worker("a", fingerprint="one")
    client = bench.client()
    client.submit(1)
    other = bench.worker("b", fingerprint="two")
    bench.route_gone(first.route)
    bench.pass_time(600)
    assert len(other.dispatches) == 1
    other.publish(other.chunk(0, 5))
    assert client.streamed() == [5]


def test_the_wait_for_the_same_model_is_bounded() -> None:
    bench = Bench(hold_ms=1_000)
    worker, client = bench.worker("a", fingerprint="one"), bench.client()
    client.submit(1)
    worker.publish(worker.chunk(0, 5))
    other = bench.worker("b", fingerprint="two")
    bench.route_gone(worker.route)
    for _ in range(40):
        bench.pass_time(100)
        other.beat()
        client.send(m.ClientHeartbeat())
    assert [(end.reason, end.error and end.error.code) for end in client.ends[:1]] == [("error", Code.NO_WORKER)]
    assert set(bench.state.pools) == {Lane("m")}


def test_requests_for_a_model_that_is_loading_wait_for_it() -> None:
    # Given a worker that has come and is loading
    bench = Bench()
    client = bench.client()
    worker = bench.worker(state="starting")
    # When its model is asked for, named or as the only one
    client.submit(1, model="m")
    client.submit(2)
    # Then the requests wait, for longer than a lost worker is waited for
    assert client.problems == []
    for percent in range(100):
        bench.pass_time(500)
        worker.beat(state="starting", percent=percent)
        client.send(m.ClientHeartbeat())
    assert worker.dispatches == [] and client.ends == []
    assert queries.status(bench.state, "", bench.now_ms, ANYONE).loading == {"w": 99}
    assert queries.workers(bench.state, "", bench.now_ms, ANYONE)[0].state == "loading"
    # And go to it as soon as it is ready
    worker.beat(models=[m.ModelInfo("m", "f")], slots=2)
    assert [dispatch.id for dispatch in worker.dispatches] == [request_id(1), request_id(2)]
    assert queries.status(bench.state, "", bench.now_ms, ANYONE).loading == {}


def test_a_wait_for_a_model_that_is_loading_is_bounded_as_any_other() -> None:
    bench = Bench(queue_ms=3_000)
    worker, client = bench.worker(state="starting"), bench.client()
    client.submit(1)
    for _ in range(50):
        bench.pass_time(100)
        worker.beat(state="starting")
        client.send(m.ClientHeartbeat())
    assert [end.error and end.error.code for end in client.ends[:1]] == [Code.QUEUE_TIMEOUT]
    # A load that fails for good takes its worker away: then it is a model without workers
    client.submit(2)
    worker.send(m.Goodbye("cannot serve m"))
    assert bench.state.models.unserved_since["m"] > 0


def test_what_was_loaded_decides_who_continues_a_stream() -> None:
    # Given a stream whose worker is lost, while two others load a model of that name
    bench = Bench(hold_ms=1_000)
    first, client = bench.worker("a", fingerprint="one"), bench.client()
    client.submit(1)
    first.publish(first.chunk(0, 5, 6))
    other, same = bench.worker("b", state="starting"), bench.worker("c", state="starting")
    bench.route_gone(first.route)
    # When that takes longer than a missing model is waited for
    for _ in range(30):
        bench.pass_time(100)
        other.beat(state="starting")
        same.beat(state="starting")
        client.send(m.ClientHeartbeat())
    # Then it is still held: either may load the same model
    assert client.ends == []
    # And goes on at the one that is
    other.beat(models=[m.ModelInfo("m", "two")], slots=2)
    assert other.dispatches == []
    same.beat(models=[m.ModelInfo("m", "one")], slots=2)
    assert [dispatch.prefix for dispatch in same.dispatches] == [[5, 6]]


def test_a_worker_that_turns_out_to_serve_another_model_is_moved_there() -> None:
    bench = Bench()
    worker, client = bench.worker(model="m"), bench.client()
    worker.beat(models=[m.ModelInfo("n", "f")], slots=1)
    assert bench.state.models.unserved_since["m"] > 0 and bench.state.models.unserved_since["n"] == 0
    client.submit(1)
    assert [dispatch.model for dispatch in worker.dispatches] == ["n"]
    # One slot is what it has now
    client.submit(2)
    assert len(worker.dispatches) == 1


def test_a_client_learns_of_each_model_file_that_its_request_goes_to() -> None:
    bench = Bench()
    first, client = bench.worker("a", fingerprint="one"), bench.client()
    client.submit(1)
    bench.worker("b", fingerprint="two")
    first.send(m.Goodbye())
    assert [accepted.fingerprint for accepted in client.received(m.Accepted)] == ["one", "two"]


def test_a_frame_with_a_valid_key_that_is_no_chunk_is_dropped() -> None:
    bench, worker, client = small_mesh()
    client.submit(1)
    chunk = worker.chunk(0, 7)
    worker.publish(b"X" + chunk[1:], b"B" + chunk[1:])
    assert client.streamed() == [] and bench.state.counters.tokens.malformed_frames == 2
    worker.publish(chunk)
    assert client.streamed() == [7]
