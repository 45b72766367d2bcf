"""The token planes: chunks and beats, one frame each."""

from __future__ import annotations

import json
import random

import msgpack
import pytest

from llambo.mesh.wire import limits, tokens
from tests.unit.samples import BEAT, CHUNK, CHUNK_WITH_LOGPROBS, DISPATCH, GOLDEN, ID, KEY, LOGPROBS, SESSION

HEAD = CHUNK[: tokens.HEAD_BYTES]


def chunk(first: int, *ids: int, flags: int = 0) -> bytes:
    return tokens.encode_chunk(KEY, first, ids, [b"%d " % id for id in ids], flags)


def test_the_bytes_are_those_of_the_golden_vectors() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert golden["chunk"]["frames"] == [CHUNK.hex()]
    assert golden["beat"]["frames"] == [BEAT.hex()]


def test_a_chunk_is_laid_out_as_the_protocol_says() -> None:
    assert CHUNK[:1] == b"T"
    assert CHUNK[1:17] == ID
    assert CHUNK[17:25] == DISPATCH
    assert int.from_bytes(CHUNK[25:29], "big") == 7
    assert int.from_bytes(CHUNK[29:31], "big") == 2
    assert CHUNK[31] == tokens.FINAL
    assert msgpack.unpackb(CHUNK[32:]) == [[11, 2**31], [b"Hi", b"\xc3"]]


def test_a_chunk_comes_back_as_it_was() -> None:
    found = tokens.decode_chunk(CHUNK)
    assert found is not None
    assert (found.id, found.dispatch, found.key) == (ID, DISPATCH, KEY)
    assert (found.first, found.flags) == (7, tokens.FINAL)
    assert (found.body.ids, found.body.pieces) == ([11, 2**31], [b"Hi", b"\xc3"])


def test_logprobs_are_a_third_element_and_a_fourth_is_ignored() -> None:
    for more in ([[[-0.5, []]]], [[[-0.5, []]], "from the future"]):
        found = tokens.decode_chunk(chunk(0, 1)[: tokens.HEAD_BYTES] + msgpack.packb([[1], [b"x"], *more]))
        assert found is not None
        assert found.body.logprobs == [tokens.Logprob(-0.5)]


def test_logprobs_come_back_as_they_were_and_cost_other_chunks_nothing() -> None:
    found = tokens.decode_chunk(CHUNK_WITH_LOGPROBS)
    assert found is not None and found.body.logprobs == LOGPROBS
    plain = tokens.decode_chunk(CHUNK)
    assert plain is not None and plain.body.logprobs is None
    assert msgpack.unpackb(CHUNK_WITH_LOGPROBS[32:])[2] == [[-0.5, [[11, b"Hi", -0.5], [12, b"Ho", -2.25]]], [-3.0, []]]


@pytest.mark.parametrize(
    "logprobs",
    [
        [[-0.5, []]],  # one for two tokens
        [[-0.5, []]] * 3,
        [],
        [[0.5, []]] * 2,  # nothing is likelier than certain
        [[float("nan"), []]] * 2,
        [[float("-inf"), []]] * 2,
        [-0.5, -0.5],
        ["-0.5", "-0.5"],
        [[-0.5, [[1, b"x", -1.0]] * (limits.TOP_LOGPROBS + 1)]] * 2,
        [[-0.5, [[1, bytes(limits.LOGPROB_PIECE_BYTES + 1), -1.0]]]] * 2,
        [[-0.5, [[-1, b"x", -1.0]]]] * 2,
        [[-0.5, [[1, "x", -1.0]]]] * 2,
    ],
)
def test_logprobs_that_are_none_make_no_chunk(logprobs: list[object]) -> None:
    assert tokens.decode_chunk(HEAD + msgpack.packb([[11, 12], [b"a", b"b"], logprobs])) is None


def test_trimming_trims_the_logprobs_as_well() -> None:
    trimmed = tokens.trim_chunk(CHUNK_WITH_LOGPROBS, 8)
    assert trimmed == tokens.encode_chunk(KEY, 8, [2**31], [b"!"], 0, LOGPROBS[1:])
    assert tokens.trim_chunk(CHUNK_WITH_LOGPROBS, 7) == CHUNK_WITH_LOGPROBS


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"T",
        HEAD,
        b"B" + CHUNK[1:],
        BEAT,
        CHUNK[:-1],
        CHUNK + b"\x00",
        HEAD + msgpack.packb([[11], [b"Hi"]]),  # the head says two
        HEAD + msgpack.packb([[11, 12], [b"Hi"]]),
        HEAD + msgpack.packb([[11, 12], ["Hi", "there"]]),  # pieces are bytes, not text
        HEAD + msgpack.packb([["11", "12"], [b"a", b"b"]]),
        HEAD + msgpack.packb({"ids": [11, 12]}),
        HEAD + b"\x91" * 100_000,
        chunk(0),  # no token at all
        chunk(0, *range(limits.CHUNK_TOKENS + 1)),
        tokens.encode_chunk(KEY, 0, [1], [bytes(limits.TOKEN_FRAME_BYTES)]),
    ],
)
def test_what_is_no_chunk_is_none(frame: bytes) -> None:
    assert tokens.decode_chunk(frame) is None
    assert tokens.trim_chunk(frame, 0) is None


def test_the_largest_chunk_is_one() -> None:
    assert tokens.decode_chunk(chunk(0, *range(limits.CHUNK_TOKENS))) is not None


def test_junk_never_raises() -> None:
    chance = random.Random(5)
    for _ in range(5_000):
        frame = bytearray(CHUNK)
        for _ in range(chance.randint(1, 4)):
            frame[chance.randrange(len(frame))] = chance.randrange(256)
        frame = frame[: chance.choice([len(frame), chance.randrange(len(frame))])]
        found = tokens.decode_chunk(bytes(frame))
        assert found is None or len(found.body.ids) == len(found.body.pieces) == 2
        tokens.decode_beat(bytes(frame))


def test_trimming_keeps_the_rest_and_its_flags() -> None:
    whole = chunk(5, 10, 11, 12, flags=tokens.FINAL)
    assert tokens.trim_chunk(whole, 5) == whole
    assert tokens.trim_chunk(whole, 7) == chunk(7, 12, flags=tokens.FINAL)


@pytest.mark.parametrize("first", [0, 4, 8, 9])
def test_trimming_to_what_a_chunk_does_not_hold_gives_none(first: int) -> None:
    assert tokens.trim_chunk(chunk(5, 10, 11, 12), first) is None


def test_the_ids_of_several_chunks_are_joined_in_order() -> None:
    assert tokens.ids_of([chunk(0, 5), chunk(1, 6, 7)]) == [5, 6, 7]
    assert tokens.ids_of([]) == []


def test_a_beat_comes_back_as_it_was() -> None:
    assert tokens.decode_beat(BEAT) == (2**33, SESSION)


@pytest.mark.parametrize("frame", [b"", BEAT[:-1], BEAT + b"x", b"T" + BEAT[1:], CHUNK])
def test_what_is_no_beat_is_none(frame: bytes) -> None:
    assert tokens.decode_beat(frame) is None


def test_a_chunk_described_for_people() -> None:
    assert tokens.describe(CHUNK) == {"first": 7, "ids": [11, 2**31], "flags": tokens.FINAL}
    assert tokens.describe(b"junk") == {}
