"""Reassembly: any order in, each token once and in order out."""

from __future__ import annotations

import asyncio
import random

import pytest

from llambo.mesh.client.answer_stream import Stream
from llambo.mesh.wire import limits, tokens
from llambo.mesh.wire.stream import Reassembly, Stash

KEY = b"r" * limits.REQUEST_ID_BYTES + b"d" * limits.DISPATCH_ID_BYTES


def chunk(first: int, count: int = 1, flags: int = 0) -> bytes:
    ids = list(range(first, first + count))
    return tokens.encode_chunk(KEY, first, ids, [b"<%d>" % id for id in ids], flags)


def test_frames_in_order_come_out_as_they_are() -> None:
    # Given an empty stream
    stream = Reassembly()
    # When frames arrive in order
    assert stream.add(chunk(0, 2))
    assert stream.add(chunk(2))
    # Then all of it can be taken, once
    assert stream.take() == ([0, 1, 2], [b"<0>", b"<1>", b"<2>"])
    assert stream.take() == ([], [])
    assert stream.next_index == 3
    assert stream.gap is None


def test_what_was_taken_does_not_change_later() -> None:
    stream = Reassembly()
    stream.add(chunk(0))
    ids, pieces = stream.take()
    stream.add(chunk(1))
    assert (ids, pieces) == ([0], [b"<0>"])


def test_an_older_frame_is_dropped() -> None:
    stream = Reassembly()
    stream.add(chunk(0, 3))
    assert not stream.add(chunk(0, 3))
    assert not stream.add(chunk(1))
    assert stream.take()[0] == [0, 1, 2]
    assert stream.old == 2


def test_an_overlap_is_trimmed() -> None:
    stream = Reassembly()
    stream.add(chunk(0, 3))
    assert stream.add(chunk(1, 4))
    assert stream.take()[0] == [0, 1, 2, 3, 4]
    assert stream.overlaps == 1


def test_a_gap_is_named_and_closed_by_what_was_missing() -> None:
    # Given a frame that came too early
    stream = Reassembly()
    stream.add(chunk(0))
    assert not stream.add(chunk(5, 2))
    assert stream.gap == (1, 5)
    assert stream.seen_index == 7
    # When the missing ones arrive
    assert stream.add(chunk(1, 4))
    # Then the early one follows
    assert stream.take()[0] == [0, 1, 2, 3, 4, 5, 6]
    assert stream.gap is None
    assert stream.stashed == 1


def test_a_replay_that_reaches_into_the_stash_makes_no_doubles() -> None:
    stream = Reassembly()
    stream.add(chunk(4, 4))
    stream.add(chunk(6, 6))
    stream.add(chunk(0, 5))
    assert stream.take()[0] == list(range(12))


def test_the_final_flag_gives_the_length_of_the_answer() -> None:
    stream = Reassembly()
    stream.add(chunk(1, 1, tokens.FINAL))
    assert stream.final_index is None
    stream.add(chunk(0))
    assert stream.final_index == 2


def test_a_stream_can_begin_in_the_middle() -> None:
    stream = Reassembly(10)
    stream.add(chunk(8, 4))
    assert stream.take()[0] == [10, 11]


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"T",
        chunk(0)[: tokens.HEAD_BYTES],
        chunk(0)[:-1],
        b"X" + chunk(0)[1:],
        chunk(0)[: tokens.KEY_END] + b"\0\0\0\0\0\2\0" + chunk(0)[tokens.HEAD_BYTES :],
        chunk(0)[: tokens.KEY_END] + b"\0\0\0\0\0\0\0" + chunk(0)[tokens.HEAD_BYTES :],
        chunk(0)[: tokens.KEY_END] + b"\0\0\0\7\xff\xff\0" + chunk(0)[tokens.HEAD_BYTES :],
        chunk(0)[: tokens.HEAD_BYTES] + b"\x92\x91\xa1\xff\x91\xc4\1a",
    ],
)
def test_malformed_frames_are_counted_and_harm_nothing(frame: bytes) -> None:
    stream = Reassembly()
    assert not stream.add(frame)
    assert stream.malformed == 1
    assert stream.add(chunk(0))
    assert stream.take()[0] == [0]


def test_a_malformed_frame_in_the_stash_leaves_its_gap_open() -> None:
    # Given an early frame whose body is broken, which is not looked at before its turn
    stream = Reassembly()
    stream.add(chunk(1)[:-1])
    # When its turn comes
    stream.add(chunk(0))
    # Then it is counted, and the stream goes on from there
    assert stream.malformed == 1
    assert stream.next_index == 1
    assert stream.add(chunk(1))


def test_any_order_with_doubles_and_cuts_gives_each_token_once() -> None:
    for seed in range(200):
        chance = random.Random(seed)
        frames = [chunk(first, chance.randint(1, 4)) for first in range(40)]
        shuffled = frames + [chance.choice(frames) for _ in range(20)]
        chance.shuffle(shuffled)
        stream = Reassembly()
        seen: list[int] = []
        for frame in shuffled:
            stream.add(frame)
            seen += stream.take()[0]
        assert seen == list(range(len(seen))), f"seed {seed}"
        assert len(seen) >= 40, f"seed {seed}"


class TestStash:
    def test_keeps_the_nearest_when_full(self) -> None:
        # Given a full stash
        stash = Stash(limit=2)
        assert stash.put(10, 1, b"ten")
        assert stash.put(20, 1, b"twenty")
        # When a nearer and a farther frame arrive
        assert stash.put(5, 1, b"five")
        assert not stash.put(30, 1, b"thirty")
        # Then the nearest two are there
        assert stash.refused == 2
        assert [stash.pop_next(5), stash.pop_next(10), stash.pop_next(20)] == [b"five", b"ten", None]

    def test_is_bounded(self) -> None:
        stash = Stash()
        for first in range(1, 10 * limits.STASH_CHUNKS):
            stash.put(first, 1, b"")
        assert len(stash) == limits.STASH_CHUNKS

    def test_does_not_keep_doubles(self) -> None:
        stash = Stash()
        assert stash.put(5, 5, b"a")
        assert not stash.put(5, 5, b"a")
        assert not stash.put(6, 2, b"part of it")
        assert stash.put(5, 6, b"longer")
        assert stash.end_index == 11

    def test_forgets_what_is_older_than_asked_for(self) -> None:
        stash = Stash()
        stash.put(1, 2, b"old")
        stash.put(2, 8, b"overlaps")
        stash.put(20, 1, b"later")
        assert stash.pop_next(5) == b"overlaps"
        assert stash.pop_next(10) is None
        assert stash.first_index == 20


def test_logprobs_stay_with_their_tokens_in_any_order() -> None:
    expected = {index: tokens.Logprob(-float(index)) for index in range(8)}
    frames = [
        tokens.encode_chunk(
            KEY, first, list(range(first, first + 3)), [b"x"] * 3, 0, [expected[i] for i in range(first, first + 3)]
        )
        for first in range(6)
    ]
    for seed in range(50):
        chance, stream = random.Random(seed), Reassembly()
        ids: list[int] = []
        logprobs: list[tokens.Logprob | None] = []
        for frame in chance.sample(frames, len(frames)) + frames:
            stream.add(frame)
            if chance.random() < 0.5:
                taken, _ = stream.take()
                ids += taken
                logprobs += stream.take_logprobs(len(taken))
        taken, _ = stream.take()
        ids += taken
        logprobs += stream.take_logprobs(len(taken))
        assert ids == list(range(8))
        assert logprobs == [expected[i] for i in range(8)]


def test_tokens_without_logprobs_among_others_shift_nothing() -> None:
    stream = Reassembly()
    stream.add(chunk(0, 2))
    stream.add(tokens.encode_chunk(KEY, 2, [2], [b"x"], 0, [tokens.Logprob(-2.0)]))
    stream.add(chunk(3))
    ids, _ = stream.take()
    assert stream.take_logprobs(len(ids)) == [None, None, tokens.Logprob(-2.0), None]
    assert not stream.logprobs


def test_a_chunk_whose_logprobs_do_not_add_up_is_malformed() -> None:
    stream = Reassembly()
    assert not stream.add(tokens.encode_chunk(KEY, 0, [1, 2], [b"x", b"y"], 0, [tokens.Logprob(-2.0)]))
    assert (stream.malformed, stream.next_index) == (1, 0)


def test_a_piece_has_the_bytes_of_each_token_also_where_a_character_is_cut() -> None:
    stream = Stream(bytes(16), lambda event: None, mine=False)

    async def read() -> list[tuple[str, list[int], list[bytes]]]:
        found = []
        for ids, pieces in [([1, 2, 3], [b"a", b"", b" \xf0"]), ([4, 5], [b"\x9f\x98", b"\x80!"])]:
            stream._deliver(ids, pieces, [])
            piece = await stream.next_piece()
            assert piece is not None
            found.append((piece.text, piece.ids, piece.pieces))
        return found

    assert asyncio.run(read()) == [
        ("a ", [1, 2, 3], [b"a", b"", b" \xf0"]),
        ("\N{GRINNING FACE}!", [4, 5], [b"\x9f\x98", b"\x80!"]),
    ]
