"""Queue, pools, transcripts and the subscription grants of the token plane, each alone."""

from __future__ import annotations

from collections import Counter

import pytest

from llambo.broker.ports import SubscriptionGrants
from llambo.broker.records.accounts import Account
from llambo.broker.records.backlog import Backlog
from llambo.broker.records.pools import Pool
from llambo.broker.records.queue import RequestQueue
from llambo.broker.records.registry import ClientEntry, Session, WorkerEntry
from llambo.broker.records.request import REQUEST_STEPS, Lane, Request, RequestState
from llambo.broker.records.schedule import POLICIES
from llambo.broker.records.transcript import Transcript
from llambo.mesh.wire import limits, tokens
from llambo.mesh.wire import messages as m
from tests.unit.broker_bench import request_id

KEY = b"k" * 24


def a_request(number: int, now_ms: int = 0, account: Account | None = None, **fields: object) -> Request:
    asked = m.InferenceRequest(request_id(number), **fields)  # type: ignore[arg-type]
    return Request(asked, "m", b"hello", now_ms, account or Account(""))


def a_worker(name: str, slots: int) -> WorkerEntry:
    hello = m.WorkerHello(name, b"i", [m.ModelInfo("m")], slots)
    worker = WorkerEntry(hello, Session(name.encode(), m.Welcome(name.encode(), 1), 0, 0), Backlog(4_000))
    worker.beats.echo = worker.beats.beat = 1
    return worker


def serve(room: RequestQueue) -> Request:
    request = room.first(Lane("m"))
    assert request is not None
    request.run.attempt += 1
    request.step(RequestState.DISPATCHED)
    room.left(request)
    return request


# --- queue ---------------------------------------------------------------------------------------------


def test_the_most_urgent_goes_first_and_none_starves() -> None:
    room = RequestQueue(100, 10**6, queue_ms=1_000)
    room.put(a_request(1), 0)
    room.put(a_request(2, deadline_ms=500), 0)
    room.put(a_request(3, deadline_ms=400), 700)  # due at 400 after its submit at 0, but comes later
    assert [serve(room).id for _ in range(3)] == [request_id(n) for n in (3, 2, 1)]


def test_classes_share_by_weight() -> None:
    room = RequestQueue(1_000, 10**6, 10**6)
    for number in range(300):
        room.put(a_request(number, priority=("interactive", "normal", "batch")[number % 3]), 0)
    served = Counter(serve(room).asked.priority for _ in range(84))
    assert served == {"interactive": 64, "normal": 16, "batch": 4}


def test_a_class_that_was_idle_has_no_turns_saved_up() -> None:
    room = RequestQueue(1_000, 10**6, 10**6)
    for number in range(200):
        room.put(a_request(number, priority="interactive"), 0)
    for _ in range(100):
        serve(room)
    for number in range(200, 260):
        room.put(a_request(number, priority="batch"), 0)
    assert Counter(serve(room).asked.priority for _ in range(34))["batch"] <= 3


def test_who_lost_a_worker_goes_before_all_and_is_not_counted_out() -> None:
    room = RequestQueue(1, 10**6, 10**6)
    room.put(a_request(1, priority="interactive"), 0)
    moved = a_request(2, priority="batch")
    moved.run.attempt = 1
    assert room.full(0)
    room.put(moved, 50)
    assert serve(room) is moved
    assert [r.id for r in room.expired(10**6 + 49)] == [request_id(1)]


def test_the_room_is_bounded_in_bytes() -> None:
    room = RequestQueue(10, 12, 10**6)
    room.put(a_request(1), 0)
    assert not room.full(7)
    assert room.full(8)


def test_who_left_is_skipped_and_who_came_back_waits_once() -> None:
    room = RequestQueue(10, 10**6, 10**6)
    first, second = a_request(1), a_request(2)
    room.put(first, 0)
    room.put(second, 0)
    first.step(RequestState.ENDED)
    room.left(first)
    assert serve(room) is second
    second.step(RequestState.WAITING)
    room.put(second, 5)
    assert serve(room) is second
    assert room.count == room.bytes == 0
    assert room.lines == {}


# --- pools and policies --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_uses_all_slots_and_never_more(policy: str) -> None:
    workers = [a_worker(f"w{n}", slots=n + 1) for n in range(5)]
    pool = Pool(Lane("m"))
    for worker in workers:
        pool.update(worker)
    for turn in range(sum(worker.slots for worker in workers)):
        chosen = POLICIES[policy](a_request(turn * 7919), pool)
        assert chosen is not None
        chosen.turn = turn + 1
        chosen.claims[request_id(turn)] = 1
        pool.update(chosen)
    assert all(worker.free == 0 for worker in workers)
    assert POLICIES[policy](a_request(1), pool) is None
    # One becomes free: it is found again.
    workers[2].claims.popitem()
    pool.update(workers[2])
    assert POLICIES[policy](a_request(1), pool) is workers[2]


def test_least_loaded_is_by_share_of_slots_and_takes_turns_among_equals() -> None:
    big, small = a_worker("big", 8), a_worker("small", 2)
    pool = Pool(Lane("m"))
    pool.update(big)
    pool.update(small)
    chosen = []
    for turn in range(5):
        worker = pool.least_loaded()
        assert worker is not None
        chosen.append(worker.name)
        worker.turn = turn + 1
        worker.claims[request_id(turn)] = 1
        pool.update(worker)
    assert chosen == ["big", "small", "big", "big", "big"]


def test_ten_thousand_workers_choose_without_a_scan() -> None:
    pool = Pool(Lane("m"))
    workers = [a_worker(f"w{n}", 4) for n in range(10_000)]
    for worker in workers:
        pool.update(worker)
    looked_at = 0

    class Counted(list[WorkerEntry]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            nonlocal looked_at
            looked_at += 1
            return super().__iter__()

    pool.free = Counted(pool.free)
    for turn in range(1_000):
        chosen = pool.least_loaded()
        assert chosen is not None
        chosen.turn = turn + 1
        chosen.claims[request_id(turn)] = 1
        pool.update(chosen)
    assert looked_at == 0


def test_a_pool_forgets_who_cannot_work() -> None:
    pool = Pool(Lane("m"))
    one, two = a_worker("one", 1), a_worker("two", 1)
    pool.update(one)
    pool.update(two)
    for part, spoil in ((one.drain, "drained"), (one, "refusing")):
        setattr(part, spoil, True)
        pool.update(one)
        assert pool.free == [two]
        setattr(part, spoil, False)
        pool.update(one)
    one.beats.beat = one.beats.echo + 4  # its token plane is down
    pool.update(one)
    assert pool.least_loaded() is two


# --- transcripts ---------------------------------------------------------------------------------------


def chunk(first: int, count: int, size: int = 1) -> bytes:
    return tokens.encode_chunk(KEY, first, list(range(first, first + count)), [b"x" * size] * count)


def a_transcript(chunks: list[bytes]) -> Transcript:
    transcript = Transcript(10_000)
    for frame in chunks:
        first, count, _ = tokens.head(frame, tokens.KEY_END)
        transcript.chunks.append(frame)
        transcript.next_index = first + count
    return transcript


def test_a_page_begins_with_the_chunk_that_holds_the_index() -> None:
    transcript = a_transcript([chunk(0, 3), chunk(3, 2), chunk(5, 4)])
    assert transcript.page(4, 0) == ([chunk(3, 2), chunk(5, 4)], 9)
    assert transcript.page(0, 3) == ([chunk(0, 3)], 3)
    assert transcript.page(9, 0) == ([], 9)
    assert transcript.ids() == list(range(9))


def test_pages_are_bounded_and_together_they_are_everything() -> None:
    transcript = a_transcript([chunk(n * 10, 10, size=300) for n in range(200)])
    at, pages = 0, 0
    while at < transcript.next_index:
        chunks, after = transcript.page(at, 0)
        assert sum(map(len, chunks)) <= limits.PAGE_BYTES
        assert tokens.ids_of(chunks) == list(range(at, after))
        at, pages = after, pages + 1
    assert pages == 3


# --- the gate of the token plane -----------------------------------------------------------------------


def client_of(topic: bytes, user: str = "") -> ClientEntry:
    return ClientEntry(m.ClientHello(), Session(b"route", m.Welcome(b"session!", 1, topic), 0, 0, user), Backlog(4_000))


def test_a_topic_is_granted_to_the_key_of_its_session_only() -> None:
    topic = b"t" * limits.TOPIC_BYTES
    gate = SubscriptionGrants({topic: client_of(topic, "alice")})
    assert [gate.admit(b"\x01" + topic, user) for user in ("bob", "", "alice")] == [None, None, topic]


def test_only_a_whole_session_topic_is_granted() -> None:
    topic = b"t" * limits.TOPIC_BYTES
    gate = SubscriptionGrants({topic: client_of(topic)})
    assert gate.admit(b"\x01" + topic) == topic
    for frame in (b"\x01", b"\x01t", b"\x01" + topic[:-1], b"\x01" + topic + b"x", b"\x01" + b"u" * 16):
        assert gate.admit(frame) is None
    assert gate.refused == 5
    assert gate.admit(b"\x00" + topic) is None
    assert gate.refused == 5


def test_after_junk_no_grant_is_given_until_the_socket_is_in_step_again() -> None:
    topic = b"t" * limits.TOPIC_BYTES
    gate = SubscriptionGrants({topic: client_of(topic)})
    assert gate.admit(b"\x07junk") is None
    assert gate.admit(b"\x01" + topic) is None
    gate.drained()
    assert gate.admit(b"\x01" + topic) == topic
    assert gate.junk == 1


def test_the_table_of_steps_is_closed() -> None:
    for state, steps in REQUEST_STEPS.items():
        assert state not in steps
        assert all(target in REQUEST_STEPS for target in steps)
    reachable = {RequestState.WAITING}
    for _ in REQUEST_STEPS:
        reachable |= {target for state in reachable for target in REQUEST_STEPS[state]}
    assert reachable == set(RequestState)
