"""The fetch core: which chunk is asked of which host, and what is never written."""

from __future__ import annotations

from hashlib import sha256

from llambo.mesh.wire.messages import FileGrant
from llambo.worker.share.fetch_core import (
    CREDITS,
    LOST_MS,
    STUCK_MS,
    SUMS_MS,
    USUAL_MS,
    WINDOW,
    AskForChunk,
    AskForSums,
    DropHost,
    FetchAction,
    FetchCore,
    WriteChunk,
)
from llambo.worker.share.grants import Grants

CHUNKS = 40
SUMS = [sha256(b"%d" % number).digest() for number in range(CHUNKS)]
WRONG = [sha256(b"wrong %d" % number).digest() for number in range(CHUNKS)]


def asked(actions: list[FetchAction], host: str) -> list[int]:
    return [each.number for each in actions if isinstance(each, AskForChunk) and each.host == host]


def written(actions: list[FetchAction]) -> list[int]:
    return [each.number for each in actions if isinstance(each, WriteChunk)]


def begun(*hosts: str, sums: list[bytes] = SUMS) -> tuple[FetchCore, list[FetchAction]]:
    core = FetchCore(CHUNKS, 0)
    actions = core.on_hosts(hosts, 0)
    assert actions == [AskForSums(host, 0) for host in hosts]
    made: list[FetchAction] = []
    for host in hosts:
        made += core.on_sums(host, 0, sums, 0)
    return core, made


def test_several_hosts_are_asked_for_different_chunks_within_their_credits() -> None:
    core, actions = begun("a", "b")
    numbers = asked(actions, "a") + asked(actions, "b")
    assert sorted(numbers) == list(range(2 * CREDITS))
    assert len(asked(actions, "a")) == len(asked(actions, "b")) == CREDITS
    kept, after = core.on_chunk("a", asked(actions, "a")[0], SUMS[asked(actions, "a")[0]], 5)
    assert kept and len(asked(after, "a")) == 1


def test_chunks_are_written_in_their_order() -> None:
    core, _ = begun("a")
    assert written(core.on_chunk("a", 2, SUMS[2], 1)[1]) == []
    assert written(core.on_chunk("a", 1, SUMS[1], 1)[1]) == []
    assert written(core.on_chunk("a", 0, SUMS[0], 1)[1]) == [0, 1, 2]
    assert core.written == 3


def test_wrong_bytes_are_not_kept_and_their_host_is_asked_for_nothing_more() -> None:
    core, actions = begun("liar", "b")
    kept, after = core.on_chunk("liar", asked(actions, "liar")[0], b"x" * 32, 1)
    assert not kept
    assert DropHost("liar", f"chunk {asked(actions, 'liar')[0]} is not what it has stated") in after
    assert not asked(core.on_hosts(["liar", "b"], 2) + core.on_time(SUMS_MS), "liar")
    assert not core.on_chunk("liar", 1, SUMS[1], 3)[0], "also what it sends later"


def test_a_file_is_stuck_when_no_host_has_had_more_for_a_while() -> None:
    core, _ = begun("a")
    core.on_hosts([], 100)
    assert not core.is_stuck(STUCK_MS - 1)
    assert core.is_stuck(STUCK_MS)
    core.on_hosts(["b"], STUCK_MS)
    core.on_sums("b", 0, SUMS, 200 + STUCK_MS)
    assert not core.is_stuck(300 + STUCK_MS)


def test_of_hosts_that_differ_the_first_one_counts() -> None:
    core = FetchCore(CHUNKS, 0)
    core.on_hosts(["first", "other"], 0)
    core.on_sums("other", 0, WRONG, 0)
    after = core.on_sums("first", 0, SUMS[:5], 0)
    assert asked(after, "first") == [0, 1, 2]
    assert not core.on_chunk("other", 0, WRONG[0], 1)[0]


def test_a_whole_file_that_is_wrong_is_begun_anew_without_those_who_vouched_for_it() -> None:
    core = FetchCore(2, 0)
    core.on_hosts(["liar", "honest"], 0)
    core.on_sums("liar", 0, WRONG[:2], 0)
    core.on_sums("honest", 0, SUMS[:2], 0)
    assert core.on_chunk("liar", 0, WRONG[0], 1)[0] and core.on_chunk("liar", 1, WRONG[1], 1)[0]
    assert core.done
    core.on_wrong_file()
    assert core.dropped == {"liar"} and core.written == 0
    actions = core.on_hosts(["liar", "honest"], 2)
    assert asked(actions, "honest") == [0, 1]


def test_what_a_slow_host_takes_long_for_is_asked_of_another_one_too() -> None:
    core, actions = begun("slow", "fast")
    held, now, queue = asked(actions, "slow"), 0, asked(actions, "fast")
    while queue:
        now += 10
        number = queue.pop(0)
        queue += asked(core.on_chunk("fast", number, SUMS[number], now)[1], "fast")
    assert core.done and now < USUAL_MS, f"the fast one was asked for {held} as well"


def test_the_rest_is_fetched_from_the_other_when_one_dies() -> None:
    core, actions = begun("a", "b")
    lost = asked(actions, "a")
    after = core.on_hosts(["b"], 10)
    kept, more = core.on_chunk("b", asked(actions, "b")[0], SUMS[asked(actions, "b")[0]], 20)
    assert kept and set(asked(after + more, "b")) & set(lost)


def test_an_answer_that_is_lost_is_not_waited_for() -> None:
    core, actions = begun("a")
    assert asked(actions, "a") == [0, 1, 2]
    assert asked(core.on_time(LOST_MS), "a") == [0, 1, 2]


def test_a_host_that_has_the_beginning_is_asked_again_for_more() -> None:
    core = FetchCore(CHUNKS, 0)
    core.on_hosts(["a"], 0)
    actions = core.on_sums("a", 0, SUMS[:1], 0)
    assert asked(actions, "a") == [0]
    assert AskForSums("a", 1) in core.on_time(SUMS_MS)
    assert not [each for each in core.on_time(SUMS_MS + 1) if isinstance(each, AskForSums)], "one question at a time"
    assert asked(core.on_sums("a", 1, SUMS[1:2], SUMS_MS + 2), "a") == [1]


def test_early_chunks_are_bounded() -> None:
    core, _ = begun("a")
    assert not core.on_chunk("a", WINDOW, SUMS[WINDOW], 1)[0]
    assert core.on_chunk("a", WINDOW - 1, SUMS[WINDOW - 1], 1)[0]
    assert len(core.early) <= WINDOW


def test_no_grant_no_byte() -> None:
    grants = Grants()
    ticket, other = bytes(16), b"o" * 16
    assert grants.ref_for(ticket, "") is None and not grants.admits("k")
    grants.replace((FileGrant(ticket, "hf:a/b", "k"),))
    assert grants.ref_for(ticket, "k") == "hf:a/b" and grants.admits("k")
    assert grants.ref_for(other, "k") is None
    assert grants.ref_for(ticket, "") is None and grants.ref_for(ticket, "x") is None, "a ticket is for one key"
    grants.replace(())
    assert grants.ref_for(ticket, "k") is None
