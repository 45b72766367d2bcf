"""The checker finds every kind of error: each is put into a history here."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest

from llambo.mesh.security.keyring import Folder
from llambo.mesh.security.keys import to_line
from llambo.mesh.wire.identity import Identity
from llambo.worker.engine import fake_model
from llambo.worker.engine.fake_model import START, pieces_of, plain_token, wander_token
from tests.chaos import checker, hosts, leaks, promises, report
from tests.chaos.checker import Streams
from tests.chaos.history import Line, parse

ID, PROMPT, SEED, MAX = "aa" * 16, "how many", 7, 6
FIRST, SECOND = "0000000111111111", "0000000222222222"
TRUTH = [plain_token(SEED, PROMPT.encode(), index) for index in range(MAX)]


def line(t: int, event: str, **facts: Any) -> Line:
    return {"t": t, "who": "c0.1", "e": event, "id": ID, **facts}


def submit(**facts: Any) -> Line:
    return line(0, "submit", seed=SEED, prompt=PROMPT, max=MAX, how="stream") | facts


def chunk(t: int, first: int, count: int, dispatch: str = FIRST, ids: list[int] | None = None, **facts: Any) -> Line:
    ids = TRUTH[first : first + count] if ids is None else ids
    return line(t, "chunk", i=first, ids=ids, d=[(dispatch, len(ids))], **facts)


def end(t: int = 90, count: int = MAX, ids: list[int] | None = None, **facts: Any) -> Line:
    text = b"".join(pieces_of(TRUTH if ids is None else ids)).decode("utf-8", "replace")
    given = {"reason": "length", "count": count, "moves": 0, "worker": "w0", "crc": zlib.crc32(text.encode())}
    return line(t, "end", **(given | facts))


def judged(*lines: Line, style: str = "plain") -> Streams:
    return checker.judge(lines, style=style, split=False)


def sorts(*lines: Line, style: str = "plain") -> list[str]:
    return [wrong.sort for wrong in judged(*lines, style=style).wrong]


def test_a_whole_answer_in_order_is_right() -> None:
    streams = judged(submit(), chunk(10, 0, 2), chunk(20, 2, 4), end())
    assert (streams.wrong, streams.tokens) == ([], MAX)


def test_an_answer_that_moved_is_right() -> None:
    assert not sorts(submit(), chunk(10, 0, 2), chunk(20, 2, 4, SECOND), end(moves=1))


def test_a_chunk_may_hold_tokens_of_two_dispatches() -> None:
    both = chunk(10, 0, MAX) | {"d": [(FIRST, 2), (SECOND, 4)]}
    assert not sorts(submit(), both, end())


@pytest.mark.parametrize(
    ("sort", "lines"),
    [
        (checker.LOST, [chunk(10, 0, 2), chunk(20, 3, 3), end(count=5)]),
        (checker.DUPLICATED, [chunk(10, 0, 3), chunk(20, 2, 4), end()]),
        (checker.LOST, [chunk(10, 0, 5), end()]),
        (checker.WRONG, [chunk(10, 0, 2), chunk(20, 2, 4, ids=[*TRUTH[2:5], TRUTH[0]]), end()]),
        (checker.HUNG, [chunk(10, 0, 2)]),
        (checker.HUNG, []),
        (checker.END, [chunk(10, 0, MAX), end(80), end(90)]),
        (checker.END, [chunk(10, 0, 4), end(80, count=4, ids=TRUTH[:4], reason="stop")]),
        (checker.WRONG, [chunk(10, 0, MAX), end(crc=1)]),
        (checker.ERROR, [chunk(10, 0, 2), line(20, "error", code="no_worker", text="none")]),
        (checker.WRONG, [chunk(10, 0, MAX) | {"d": [(FIRST, 2)]}, end()]),
        (checker.STALE, [chunk(10, 0, 2), chunk(20, 2, 2, SECOND), chunk(30, 4, 2), end()]),
        (checker.WRONG, [chunk(10, 0, MAX), end(), chunk(20, 0, 2, ids=TRUTH[1:3], r=1),
                         chunk(30, 2, 4, r=1), end(40, r=1)]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(sort: str, lines: list[Line]) -> None:
    found = sorts(submit(), *lines)
    assert found
    assert sort in found


def test_a_token_after_the_end_is_found() -> None:
    late = line(95, "chunk", i=MAX, ids=[1], d=[])
    assert checker.END in sorts(submit(), chunk(10, 0, MAX), end(), late)


def test_two_readings_that_differ_are_found_without_a_known_truth() -> None:
    lines = [submit(), chunk(10, 0, MAX), end(), chunk(20, 0, MAX, ids=[*TRUTH[:5], 1], r=1), end(30, r=1)]
    assert sorts(*lines, style="") == [checker.WRONG]


def test_an_error_before_there_was_an_id_counts() -> None:
    assert sorts(line(10, "error", code="busy", text="full") | {"id": ""}) == [checker.ERROR]


def test_a_request_whose_client_was_killed_may_stay_open() -> None:
    streams = judged(submit(), chunk(10, 0, 2), {"t": 20, "who": "harness", "e": "killed", "whom": "c0.1"})
    assert (streams.wrong, streams.orphaned) == ([], 1)


def test_but_what_it_saw_until_then_has_to_be_right() -> None:
    killed = {"t": 20, "who": "harness", "e": "killed", "whom": "c0.1"}
    assert sorts(submit(), chunk(10, 0, 2, ids=[1, 2]), killed) == [checker.WRONG]


def test_a_fate_has_to_be_met() -> None:
    fate = submit(fate="engine_failed")
    met = judged(fate, line(10, "error", code="engine_failed", text="poison"))
    assert (met.wrong, met.foreseen) == ([], 1)
    assert sorts(fate, chunk(10, 0, MAX), end()) == [checker.END]
    assert sorts(fate, line(10, "error", code="no_worker", text="none")) == [checker.ERROR]


@pytest.mark.parametrize(("deaths", "wrong"), [(1, 1), (2, 0), (3, 1)])
def test_what_kills_engines_may_kill_two(deaths: int, wrong: int) -> None:
    lines = [
        {"t": 5, "who": "harness", "e": "fault", "kind": "poison"},
        submit(fate="engine_failed"),
        line(10, "error", code="engine_failed", text="poison"),
        line(11, "why", story=[{"at_ms": 1, "what": "engine died", "detail": ""}] * deaths),
    ]
    streams = judged(*lines)
    assert (len(streams.wrong), streams.deaths) == (wrong, [deaths])
    # Where engines die of other causes too, other deaths may be in the story.
    other = {"t": 6, "who": "harness", "e": "fault", "kind": "kill"}
    assert judged(*lines, other).wrong == []


def test_a_kept_result_may_be_forgotten_by_a_broker_that_was_restarted_and_by_no_other() -> None:
    lines = [submit(how="detached"), chunk(10, 0, MAX), end(20),
             line(40, "error", code="unknown_request", text="not here", r=1)]  # fmt: skip
    restart = {"t": 30, "who": "harness", "e": "fault", "kind": "broker"}
    assert sorts(*lines) == [checker.ERROR]
    assert judged(*lines, restart).forgotten == 1
    assert not sorts(*lines, restart)


def test_a_token_of_a_zombie_is_seen_in_wander() -> None:
    ids, previous = [], START
    for index in range(MAX):
        previous = wander_token(bytes.fromhex(FIRST if index < 3 else SECOND), PROMPT.encode(), previous)
        ids.append(previous)
    lines = [submit(), chunk(10, 0, 3, ids=ids[:3]), chunk(20, 3, 3, SECOND, ids=ids[3:]), end(ids=ids)]
    assert not sorts(*lines, style="wander")
    # The first dispatch had made a fourth token, which is delivered in the place of the second one's first.
    zombie = wander_token(bytes.fromhex(FIRST), PROMPT.encode(), ids[2])
    lines[2] = chunk(20, 3, 3, SECOND, ids=[zombie, *ids[4:]])
    assert checker.WRONG in sorts(*lines, style="wander")


def test_stalls_are_counted_apart_for_streams_that_moved() -> None:
    streams = judged(submit(), chunk(10, 0, 2), chunk(410, 2, 2, SECOND), chunk(420, 4, 2, SECOND), end(430, moves=1))
    assert checker.stalls(streams) == ([400], [])


def test_the_cut_line_of_a_killed_process_is_left_out() -> None:
    assert list(parse(['{"t":1}\n', '{"t":2'])) == [{"t": 1}]


# --- promises ----------------------------------------------------------------------------------------


def fault(t: int, kind: str, whom: str = "w1", length: int = 3_000, n: int = 0, **facts: Any) -> Line:
    return {"t": t, "who": "harness", "e": "fault", "n": n, "kind": kind, "whom": whom, "length": length, **facts}


def entry(t: int, event: str, **facts: Any) -> Line:
    return {"t": t, "who": "harness", "e": event, **facts}


def view(t: int, *ready: str) -> Line:
    return entry(t, "workers", broker="b0", names=["w0", "w1"], ready=list(ready))


def late(*lines: Line) -> list[str]:
    return [wrong.text for wrong in promises.judge(lines, lease_ms=2_000, stall_ms=2_000).wrong]


def test_a_lost_link_has_to_be_noticed_within_the_lease() -> None:
    lost = entry(2_900, "event", broker="b0", kind="worker lost", text="w1: silent for 2000 ms")
    assert not late(fault(1_000, "link"), lost)
    assert late(fault(1_000, "link"))
    assert late(fault(1_000, "link"), lost | {"t": 5_000})
    assert late(fault(1_000, "link"), lost | {"text": "w0: silent"})
    # One that is shorter than a lease need not be noticed at all.
    assert not late(fault(1_000, "link", length=1_000))


def test_after_a_fault_its_victim_has_to_be_back() -> None:
    hurt = [fault(1_000, "cut"), entry(1_000, "healed", n=0)]
    assert not late(*hurt, view(1_500, "w0"), view(3_000, "w0", "w1"), view(9_000, "w0"))
    assert late(*hurt, view(1_500, "w0"), view(9_000, "w0"))
    assert late(*hurt, view(1_500, "w0"), view(9_000, "w0", "w1"))
    # A victim that is hit again has no deadline.
    assert not late(*hurt, fault(2_000, "kill", n=1), view(9_000, "w0"))


def test_a_hung_decode_has_to_be_ended() -> None:
    assert not late(fault(1_000, "hang", busy=3), entry(3_100, "gone", n=0))
    assert late(fault(1_000, "hang", busy=3))
    assert late(fault(1_000, "hang", busy=3), entry(6_000, "gone", n=0))


def test_workers_have_to_be_back_after_their_broker() -> None:
    assert not late(entry(1, "back", broker="b0", ms=2_900, missing=[]))
    assert late(entry(1, "back", broker="b0", ms=3_900, missing=[]))
    assert late(entry(1, "back", broker="b0", ms=None, missing=["w1"]))


def test_what_is_left_at_the_end_is_found() -> None:
    last = entry(1, "last", broker="b0", running=0, waiting=0, busy=0, ready=4, workers_wanted=4)
    assert not late(last)
    for what in ("running", "waiting", "busy"):
        assert late(last | {what: 1})
    assert late(last | {"ready": 3})
    assert late(last | {"left": ["a on w0 is loading and held by []"]})
    assert late(entry(1, "orphan", pid=7, whom="w1"))
    assert late(entry(1, "broken", whom="w1", text="it did not come back"))
    assert late(entry(1, "emptied", whom="w1", how="rolling", ms=100, code=1))
    assert late(entry(1, "workers", broker="b0", names=["w0", "w0"], ready=[]))


def test_counters_of_all_lives_of_a_broker_are_added_up() -> None:
    lines = [entry(t, "status", broker="b0", pid=pid, counters={"moved": moved})
             for t, pid, moved in ((1, 10, 1), (2, 10, 3), (3, 11, 2))]  # fmt: skip
    assert promises.judge(lines, lease_ms=1, stall_ms=1).counters["moved"] == 5


def test_totals_add_up_over_runs() -> None:
    run = {"runs": 1, "streams": 2, "ms hang noticed": [1, 2], "fault kill": 3}
    assert report.add([run, run, {"fault stop": 1}]) == {
        "runs": 2, "streams": 4, "ms hang noticed": [1, 2, 1, 2], "fault kill": 6, "fault stop": 1,
    }  # fmt: skip


def test_growth_is_the_slope_of_a_line() -> None:
    assert report.slope([(0, 10), (10, 30), (20, 50)]) == pytest.approx(2.0)


def test_a_story_has_the_events_of_the_request_and_around_it() -> None:
    lines = [submit(), chunk(10, 0, 2), chunk(20, 2, 1), fault(30, "kill", n=4), chunk(900, 3, 3, SECOND)]
    wrong = judged(*lines).wrong[0]
    text = "\n".join(report.story(wrong, lines, {"b0": [{"at_ms": 5, "what": "lost", "detail": "w1"}]}))
    assert wrong.sort == checker.HUNG
    for word in ("kill", SECOND, "what b0 knows", "lost: w1"):
        assert word in text


# --- models that are loaded on demand ----------------------------------------------------------------------

SEEN = [entry(1, "memory", whom="w0", bytes=90, engines=2), entry(2, "memory samples", count=7)]


def with_models(*lines: Line) -> hosts.Found:
    lines = (*SEEN, *lines)
    return hosts.judge(list(lines), judged(*lines), 100, 60_000)


def test_what_a_request_waited_for_is_where_its_time_counts() -> None:
    for waited, sort in (([], "warm"), (["w0 is about to load a"], "cold"), (["loading a on w0"], "cold"),
                         (["until b is unloaded on w0 for a", "loading a on w0"], "evict"),
                         (["for memory on w0: what is loaded there is in use or held"], "evict")):  # fmt: skip
        asked = submit(model="a"), chunk(40, 0, MAX), end(worker="w0-a"), line(99, "waited", **{"for": waited})
        found = with_models(*asked)
        assert not found.wrong
        assert {name: times for name, times in found.first.items() if times} == {sort: [40]}


def test_what_is_wrong_with_models_is_found() -> None:
    whole = submit(model="a"), chunk(40, 0, MAX)
    error = line(50, "error", code="engine_failed", text="'a' could not be loaded on w0: why")
    assert not with_models(submit(model="a"), error).wrong
    assert with_models(submit(model="a"), error).refused == {"engine_failed": 1}
    for sort, lines in (
        (hosts.OVER, [entry(5, "memory", whom="w1", bytes=101, engines=3)]),
        (hosts.PLACE, [*whole, end(worker="w0-b")]),
        (hosts.OVERDUE, [submit(model="a"), error | {"text": ""}]),
        (hosts.OVERDUE, [submit(model="a"), error | {"t": 70_000}]),
        (hosts.OVERDUE, [submit(model="a"), chunk(70_000, 0, MAX), end(70_001, worker="w0-a")]),
    ):
        assert [wrong.sort for wrong in with_models(*lines).wrong] == [sort], lines
    assert hosts.judge([], judged(), 100, 1).wrong, "no memory was seen"
    # A request without a model may not be refused, and one with a model not with another code
    assert sorts(submit(), error) == sorts(submit(model="a"), error | {"code": "no_worker"}) == [checker.ERROR]


# --- leaks -------------------------------------------------------------------------------------------------


def test_a_log_that_contains_a_prompt_an_answer_or_a_key_is_found(tmp_path: Path) -> None:
    # Given a history, and a folder of keys
    folder = Folder(tmp_path / "keys")
    folder.begin("tcp://127.0.0.1:7330")
    key = folder.add(Identity("w0", "worker"), 0)
    ids = [fake_model.plain_token(1, b"tell", index) for index in range(10)]
    lines: list[Line] = [
        {"e": "submit", "id": "r", "prompt": "tell me a secret", "who": "c0", "t": 0},
        {"e": "chunk", "id": "r", "i": 0, "ids": ids, "who": "c0", "t": 1},
    ]
    (tmp_path / "good.log").write_text("worker w0 joined; request r ended after 10 tokens\n")
    assert leaks.judge(lines, tmp_path, fake=True) == []
    # When logs contain secrets, Then each is found
    secrets = {
        "a prompt": "got 'tell me a secret'", "an answer's tokens": str(ids), "a key": to_line(key),
        "an answer": b"".join(fake_model.pieces_of(ids)).decode(), "a secret": f"pair {key.pair.secret}",
    }  # fmt: skip
    for what, text in secrets.items():
        (tmp_path / "bad.log").write_text(f"INFO {text} and more\n")
        found = [wrong.text for wrong in leaks.judge(lines, tmp_path, fake=True)]
        assert any(text.startswith(f"bad.log tells {what}:") for text in found), (what, found)
