"""Messages to bytes and back: golden vectors, an independent reader, and what a broken peer may send."""

from __future__ import annotations

import json
import random
from typing import Any, get_args

import msgpack
import pytest

from llambo.mesh.wire import codec, limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code
from tests.unit.samples import ALL, CODECS, GOLDEN, ID, SESSION, allowed, frames_of, vectors

VECTORS: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))


def name_of(sample: object) -> str:
    return type(sample).__name__


def codes(bundle: codec.Bundle[Any]) -> list[Code]:
    return [problem.error.code for problem in bundle.problems]


def raw_frames(body: object, *blobs: bytes) -> list[bytes]:
    return [codec.MAGIC + SESSION, msgpack.packb(body), *blobs]


# --- the samples are complete ------------------------------------------------------------------------


def test_every_message_has_a_sample() -> None:
    spoken = {kind for _, union in CODECS.values() for kind in get_args(union)}
    assert {type(sample) for sample in ALL} == spoken == set(m.Message.__subclasses__())


@pytest.mark.parametrize("sample", ALL, ids=name_of)
def test_no_field_of_a_sample_is_left_at_its_default(sample: m.Message) -> None:
    (body,) = msgpack.unpackb(frames_of(sample)[1], strict_map_key=False)
    assert set(body) == {*sample.__struct_fields__, "type"}


# --- golden vectors ----------------------------------------------------------------------------------


def test_the_golden_vectors_are_those_of_this_release() -> None:
    assert vectors() == VECTORS, "the bytes on the wire have changed; see tests/unit/samples.py"


@pytest.mark.parametrize(
    ("direction", "sample"),
    [(direction, sample) for direction in CODECS for sample in allowed(direction)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_golden_vector_decodes_to_its_sample(direction: str, sample: m.Message) -> None:
    frames = [bytes.fromhex(frame) for frame in VECTORS[name_of(sample)]["frames"]]
    bundle = CODECS[direction][0].decode(frames)
    assert bundle.session == SESSION
    assert not bundle.problems
    assert bundle.messages == [(sample, frames[2] if len(frames) > 2 else b"")]


@pytest.mark.parametrize("sample", ALL, ids=name_of)
def test_a_type_is_named_in_snake_case(sample: m.Message) -> None:
    (body,) = msgpack.unpackb(frames_of(sample)[1], strict_map_key=False)
    assert body["type"].replace("_", "") == name_of(sample).lower()


# --- growing without a new version -------------------------------------------------------------------


@pytest.mark.parametrize("direction", CODECS)
def test_an_unknown_field_is_ignored(direction: str) -> None:
    for sample in allowed(direction):
        frames = frames_of(sample)
        (body,) = msgpack.unpackb(frames[1], strict_map_key=False)
        frames[1] = msgpack.packb([{**body, "from_the_future": [1, {"x": b"y"}]}])
        bundle = CODECS[direction][0].decode(frames)
        assert [message for message, _ in bundle.messages] == [sample]


def test_a_missing_field_takes_its_default() -> None:
    bundle = codec.from_client.decode(raw_frames([{"type": "inference_request", "id": ID}], b"hello"))
    assert bundle.messages == [(m.InferenceRequest(ID), b"hello")]


# --- bundles -----------------------------------------------------------------------------------------


def test_each_message_gets_its_own_extra_frame() -> None:
    messages: list[tuple[m.Message, bytes | None]] = [
        (m.InferenceRequest(ID), b"one"),
        (m.Cancel(ID), None),
        (m.InferenceRequest(ID), b""),
    ]
    bundle = codec.from_client.decode(codec.encode(SESSION, messages))
    assert [(message, blob or None) for message, blob in bundle.messages] == [
        (message, blob or None) for message, blob in messages
    ]


def test_one_bad_message_costs_its_neighbours_nothing() -> None:
    good = {"type": "inference_request", "id": ID}
    bad = {"type": "cancel", "id": b"short"}
    bundle = codec.from_client.decode(raw_frames([good, bad, {"type": "client_heartbeat"}], b"prompt"))
    assert bundle.messages == [(m.InferenceRequest(ID), b"prompt"), (m.ClientHeartbeat(), b"")]
    assert codes(bundle) == [Code.BAD_MESSAGE]
    assert bundle.problems[0].id == b"short"


def test_text_that_is_not_utf8_costs_its_neighbours_nothing() -> None:
    # msgspec reports this with UnicodeDecodeError instead of its own error.
    bad = msgpack.packb({"type": "goodbye", "reason": "??"}).replace(b"??", b"\xff\xff")
    body = b"\x92" + bad + msgpack.packb({"type": "client_heartbeat", "echo": 3})
    bundle = codec.from_client.decode([codec.MAGIC + SESSION, body])
    assert bundle.messages == [(m.ClientHeartbeat(3), b"")]
    assert codes(bundle) == [Code.BAD_MESSAGE]


def test_an_unknown_type_is_named_as_such_and_answered_to_its_request() -> None:
    bundle = codec.from_client.decode(raw_frames([{"type": "summon", "id": ID, "query": 9}]))
    assert codes(bundle) == [Code.UNKNOWN_TYPE]
    assert (bundle.problems[0].id, bundle.problems[0].query) == (ID, 9)


def test_a_type_that_is_missing_malformed_or_nested_is_not_an_unknown_one() -> None:
    malformed = [{"reason": "no type"}, {"type": 5}, {"type": None}, 7]
    assert codes(codec.from_client.decode(raw_frames(malformed))) == [Code.BAD_MESSAGE] * 4
    nested = {"type": "orphan", "work": {"type": "summon", "id": ID}}
    assert codes(codec.from_worker.decode(raw_frames([nested]))) == [Code.BAD_MESSAGE]


def test_what_only_the_other_role_may_say_is_unknown() -> None:
    assert codes(codec.from_client.decode(frames_of(m.Drain()))) == [Code.UNKNOWN_TYPE]


def test_extra_frames_that_do_not_add_up_refuse_only_what_needs_one() -> None:
    frames = codec.encode(SESSION, [(m.InferenceRequest(ID), None), (m.Cancel(ID), None)])
    bundle = codec.from_client.decode(frames)
    assert bundle.messages == [(m.Cancel(ID), b"")]
    assert codes(bundle) == [Code.BAD_MESSAGE]


def test_a_bad_request_with_its_prompt_is_one_problem_not_two() -> None:
    bundle = codec.from_client.decode(raw_frames([{"type": "inference_request", "id": ID, "max_tokens": 0}], b"prompt"))
    assert codes(bundle) == [Code.BAD_MESSAGE]
    assert bundle.problems[0].id == ID
    assert "max_tokens" in bundle.problems[0].error.text


def test_a_bundle_has_a_limit() -> None:
    beats = [{"type": "client_heartbeat"}] * limits.BUNDLE_MESSAGES
    assert len(codec.from_client.decode(raw_frames(beats)).messages) == limits.BUNDLE_MESSAGES
    assert codes(codec.from_client.decode(raw_frames([*beats, beats[0]]))) == [Code.BAD_MESSAGE]


# --- frames ------------------------------------------------------------------------------------------

BODY = msgpack.packb([{"type": "client_heartbeat"}])


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([], Code.BAD_MESSAGE),
        ([codec.MAGIC + SESSION], Code.BAD_MESSAGE),
        ([codec.MAGIC + SESSION[:-1], BODY], Code.BAD_MESSAGE),
        ([codec.MAGIC + SESSION + b"x", BODY], Code.BAD_MESSAGE),
        ([b"HTTP" + SESSION, BODY], Code.BAD_MESSAGE),
        ([b"llb\x02" + SESSION, BODY], Code.BAD_VERSION),
        ([codec.MAGIC + SESSION, b""], Code.BAD_MESSAGE),
        ([codec.MAGIC + SESSION, b"\xc1"], Code.BAD_MESSAGE),
        ([codec.MAGIC + SESSION, msgpack.packb({"type": "client_heartbeat"})], Code.BAD_MESSAGE),
        ([codec.MAGIC + SESSION, BODY, b"extra"], Code.BAD_MESSAGE),
        ([codec.MAGIC + SESSION, BODY + b"\x00"], Code.BAD_MESSAGE),
        ([codec.MAGIC + SESSION, bytes(limits.CONTROL_BODY_BYTES + 1)], Code.BAD_MESSAGE),
        # Depth: a million nested arrays, as the body and inside an unknown field.
        ([codec.MAGIC + SESSION, b"\x91" * 1_000_000], Code.BAD_MESSAGE),
        ([codec.MAGIC + SESSION, b"\x91\x81\xa1x" + b"\x91" * 1_000_000], Code.BAD_MESSAGE),
    ],
)
def test_wrong_frames_are_one_problem(frames: list[bytes], code: Code) -> None:
    bundle = codec.from_client.decode(frames)
    assert codes(bundle) == [code]


# --- junk --------------------------------------------------------------------------------------------


#: msgpack's headers of maps, arrays, text, bytes, nil and the byte that means nothing.
HEADERS = b"\x80\x8f\x90\x9f\xa0\xc0\xc1\xc4\xc6\xd9\xdb\xdc\xdd\xdf\xff"


def mutate(chance: random.Random, frame: bytes) -> bytes:
    """One to four small changes."""
    changed = bytearray(frame)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(10):
            case 0 | 1 | 2:
                changed[at : at + 1] = chance.randbytes(1)
            case 3 | 4 | 5:
                changed[at : at + 1] = bytes([chance.choice(HEADERS)])
            case 6 | 7:
                changed[at:at] = chance.randbytes(chance.randint(1, 9))
            case 8:
                del changed[at : at + chance.randint(1, 9)]
            case 9:
                del changed[at:]
    return bytes(changed)


def mangle(chance: random.Random, frames: list[bytes]) -> list[bytes]:
    """Mostly the body is hit, where the schema is; now and then the header, or the number of frames."""
    frames = list(frames)
    match chance.randrange(20):
        case 0:
            frames[0] = mutate(chance, frames[0])
        case 1:
            del frames[chance.randrange(len(frames))]
        case 2:
            frames.insert(chance.randrange(len(frames)), chance.choice(frames))
        case _:
            frames[1] = mutate(chance, frames[1])
    return frames


@pytest.mark.parametrize("direction", CODECS)
def test_junk_never_raises_and_is_never_silent(direction: str) -> None:
    decoder, union = CODECS[direction]
    chance = random.Random(f"junk {direction}")
    refused = 0
    for sample in allowed(direction):
        original = frames_of(sample)
        for _ in range(2_000):
            frames = mangle(chance, original)
            bundle = decoder.decode(frames)
            assert all(isinstance(message, union) for message, _ in bundle.messages)
            assert bundle.messages or bundle.problems or frames[1][:1] in (b"\x90", b"\xdc", b"\xdd"), frames
            # The answer to junk must itself be valid.
            answer = codec.encode(SESSION, [(problem, None) for problem in bundle.problems])
            assert not codec.to_client.decode(answer).problems
            refused += bool(bundle.problems)
    assert refused > 100


@pytest.mark.parametrize("direction", CODECS)
def test_random_bytes_never_raise(direction: str) -> None:
    chance = random.Random(f"bytes {direction}")
    for _ in range(2_000):
        frames = [codec.MAGIC + SESSION, *(chance.randbytes(chance.randrange(40)) for _ in range(chance.randint(1, 3)))]
        CODECS[direction][0].decode(frames)
