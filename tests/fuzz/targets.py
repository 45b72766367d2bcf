"""Everything that reads input of others, and the worst that may come of it.

A target is given frames and either takes them, or refuses them in the one way that its callers expect. Anything else
is a finding: another exception, something that does not satisfy its schema, an answer that cannot be encoded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import msgpack
import msgspec

from llambo.broker.ports import SubscriptionGrants
from llambo.broker.records.transcript import Transcript
from llambo.mesh.wire import codec, limits, tasks, tokens, transfer
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.stream import Reassembly
from llambo.worker.engine import protocol as proto
from tests.fuzz import files
from tests.fuzz.mutator import Mutator, pack
from tests.fuzz.target import Frames, Target
from tests.unit import samples

#: A check that costs more than the decoding itself is done for one message in so many.
SELDOM = 16


# --- control planes ------------------------------------------------------------------------------------------


class Bodies:
    """Good control messages as values, to be changed as such."""

    def __init__(self, direction: str, session: bytes = samples.SESSION) -> None:
        blob = b"What is AI?"
        sent = [(sample, blob if type(sample) in m.WITH_BLOB else None) for sample in samples.allowed(direction)]
        self.seeds = [codec.encode(session, [one]) for one in sent]
        #: A bundle of all of them.
        self.seeds.append(codec.encode(session, sent))
        self.others = [frame for frames in self.seeds for frame in frames]
        self._values: dict[bytes, Any] = {
            frames[1]: msgpack.unpackb(frames[1], strict_map_key=False) for frames in self.seeds
        }

    def mutate(self, mutator: Mutator, frames: Frames) -> Frames:
        value = self._values[frames[1]]
        return mutator.frames(frames, lambda: pack(mutator.value(value)), self.others)


def _codec(direction: str) -> Target:
    decoder, union = samples.CODECS[direction]
    bodies = Bodies(direction)
    turn = 0

    def run(frames: Frames) -> None:
        nonlocal turn
        turn += 1
        bundle = decoder.decode(frames)
        for message, blob in bundle.messages:
            assert isinstance(message, union), f"{message!r} may not be sent here"
            assert isinstance(blob, bytes), "an extra frame that is none"
        silent = not bundle.messages and not bundle.problems
        assert not silent or frames[1][:1] in (b"\x90", b"\xdc", b"\xdd"), "neither understood nor refused"
        if turn % SELDOM == 0:
            answer = codec.encode(samples.SESSION, [(problem, None) for problem in bundle.problems[:100]])
            assert not codec.to_client.decode(answer).problems, "the answer to it cannot be encoded"
            again = codec.encode(samples.SESSION, [(message, None) for message, _ in bundle.messages[:100]])
            assert len(again) == 2, "what was decoded cannot be encoded"

    return Target(f"codec-{direction}", bodies.seeds, run, bodies.mutate)


# --- token planes --------------------------------------------------------------------------------------------


def _chunks(count: int, logprobs: bool = False) -> Frames:
    entries = samples.LOGPROBS[:1] if logprobs else None
    return [tokens.encode_chunk(samples.KEY, n, [n], [b"<%d>" % n], 0, entries) for n in range(count)]


def _token_frames() -> Target:
    def run(frames: Frames) -> None:
        for frame in frames:
            chunk = tokens.decode_chunk(frame)
            if chunk is not None:
                assert (
                    tokens.read_body(frame, len(chunk.body.ids)) is not None
                    and len(chunk.id) == limits.REQUEST_ID_BYTES
                )
                part = tokens.trim_chunk(frame, chunk.first)
                assert part is not None and tokens.decode_chunk(part) == chunk, "trimmed by nothing, and yet otherwise"
            tokens.decode_beat(frame)
            tokens.describe(frame)

    return Target("token-frames", [[samples.CHUNK], [samples.CHUNK_WITH_LOGPROBS], [samples.BEAT]], run, chunk_mutant)


def chunk_mutant(mutator: Mutator, frames: Frames) -> Frames:
    """Half of them in the body, which has a schema."""
    frame = frames[0]
    if mutator.chance.random() < 0.5 or len(frame) <= tokens.HEAD_BYTES:
        return [mutator.mangled(frame)]
    try:
        body = msgpack.unpackb(frame[tokens.HEAD_BYTES :], strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException):  # it was changed before
        return [mutator.mangled(frame)]
    return [frame[: tokens.HEAD_BYTES] + pack(mutator.value(body))]


def _stream() -> Target:
    def run(frames: Frames) -> None:
        stream, before = Reassembly(), 0
        for frame in frames:
            stream.add(frame)
            assert stream.next_index >= before, "a stream that runs backwards"
            ids, pieces = stream.take()
            assert len(ids) == len(pieces) == stream.next_index - before, "tokens were lost or doubled"
            assert len(stream.take_logprobs(len(ids))) == len(ids)
            before = stream.next_index
        assert transfer.count(transfer.merge(stream.chunks)) == stream.next_index
        assert transfer.check(list(stream.chunks)) == stream.chunks, "what was stored could not be sent"

    def mutate(mutator: Mutator, frames: Frames) -> Frames:
        changed = list(frames)
        for _ in range(1 + mutator.chance.randrange(3)):
            at = mutator.chance.randrange(len(changed))
            what = mutator.chance.randrange(4)
            if what == 0:
                changed[at] = chunk_mutant(mutator, [changed[at]])[0]
            elif what == 1:
                first, count = mutator.chance.choice((0, 1, 3, 7, 2**32 - 1)), mutator.chance.choice((0, 1, 2, 5, 4096))
                changed[at] = tokens.encode_chunk(samples.KEY, first, list(range(count)), [b"x"] * count, 1)
            else:
                changed[at], changed[0] = changed[0], changed[at]
        return changed

    last = tokens.encode_chunk(samples.KEY, 3, [3, 4], [b"x", b"y"], tokens.FINAL)
    return Target("stream", [_chunks(6), [*_chunks(3), last], _chunks(4, logprobs=True)], run, mutate)


def _transfer() -> Target:
    packed, prompt_bytes = transfer.pack(b"What is AI?", _chunks(5))
    many, _ = transfer.pack(b"What is AI?", _chunks(3, logprobs=True))

    def run(frames: Frames) -> None:
        try:
            prompt, chunks = transfer.unpack(frames[0], prompt_bytes)
        except ValueError:
            return
        assert prompt == frames[0][:prompt_bytes]
        merged = transfer.merge(chunks)
        assert transfer.count(merged) == transfer.count(chunks), "merging has lost tokens"
        transcript = Transcript(100)
        transcript.restore(chunks)
        assert transcript.next_index == len(transcript.ids()) == transfer.count(chunks)
        page, after = transcript.page(0, 0)
        assert after == transfer.count(page)

    def mutate(mutator: Mutator, frames: Frames) -> Frames:
        rest = frames[0][prompt_bytes:]
        if mutator.chance.random() < 0.5:
            return [frames[0][:prompt_bytes] + mutator.mangled(rest)]
        chunks = msgpack.unpackb(rest)
        at = mutator.chance.randrange(len(chunks))
        chunks[at] = chunk_mutant(mutator, [chunks[at]])[0]
        return [frames[0][:prompt_bytes] + pack(chunks if mutator.chance.random() < 0.7 else mutator.value(chunks))]

    return Target("transfer", [[packed], [many]], run, mutate)


def _gate() -> Target:
    owner: Any = SimpleNamespace(link=SimpleNamespace(user="its key"))

    def run(frames: Frames) -> None:
        gate = SubscriptionGrants({samples.TOPIC: owner})
        junk = False
        for frame in frames:
            topic = gate.admit(frame, "its key")
            assert gate.admit(frame, "another's key") is None
            junk = junk or frame[:1] not in (b"\0", b"\1")
            assert topic is None or (topic == samples.TOPIC and not junk), "granted what may not be"

    good = b"\1" + samples.TOPIC
    return Target("subscriptions", [[good], [good, b"\0" + samples.TOPIC, good], [b"\2junk", good]], run,
                  lambda mutator, frames: [mutator.mangled(frame) for frame in frames])  # fmt: skip


# --- the engine's pipe -----------------------------------------------------------------------------------------


def _pipe(
    name: str, sent: Sequence[proto.EngineMessage], unpacker: Callable[[], proto.Unpacker[Any]], union: Any
) -> Target:
    """Several messages, fed in two pieces that are cut anywhere."""
    whole = [proto.pack(message) for message in sent]
    values = [msgpack.unpackb(frame[4:], strict_map_key=False) for frame in whole]

    def run(frames: Frames) -> None:
        reader = unpacker()
        data = b"".join(frames)
        cut = len(data) * 7 // 11
        try:
            read = reader.feed(data[:cut]) + reader.feed(data[cut:])
        except proto.BadFrame:
            return
        assert all(isinstance(message, union) for message in read)

    def mutate(mutator: Mutator, frames: Frames) -> Frames:
        if mutator.chance.random() < 0.4:
            return [mutator.mangled(frames[0])]
        body = pack(mutator.value(mutator.chance.choice(values)))
        return [len(body).to_bytes(4, "big") + body, mutator.chance.choice(whole)]

    return Target(name, [[frame] for frame in whole], run, mutate)


def _engine_pipes() -> list[Target]:
    start = proto.start_of(samples.DISPATCHED, b"hello") if samples.DISPATCHED.task == "generate" else None
    sampling = m.Sampling(stop=["x"], grammar='root ::= "a"', logit_bias={1: 2.0})
    orders = [
        proto.Configure("llama", "a.gguf", safe=True),
        start or proto.Start(samples.KEY, b"hello", 9, 1, [1, 2], sampling, 5, "tiny", 3, ["stop"], "generate"),
        proto.Stop(samples.KEY),
        proto.Shutdown(),
    ]
    output = proto.Output(
        samples.KEY, [1], [b"x"], "stop", m.Usage(1, 2, 3.0, 4.0), samples.ERROR, samples.LOGPROBS[:1]
    )
    reports = [
        proto.Progress("loading", "", 50),
        proto.Ready([m.ModelInfo("tiny", "f00d", 2048)], 4, "note"),
        proto.Step([output, output]),
        proto.Refused(samples.KEY, samples.ERROR, True),
    ]
    return [
        _pipe("engine-orders", orders, proto.from_agent, proto.ToEngine),
        _pipe("engine-reports", reports, proto.from_engine, proto.ToAgent),
    ]


def _starts() -> Target:
    """A dispatch whose open part is anything: only the worker decodes it."""
    good = [
        msgspec.msgpack.encode({"temperature": 0.5, "stop": ["\n"], "logit_bias": {3: 1.5}, "form": "messages"}),
        msgspec.msgpack.encode(msgspec.to_builtins(tasks.TaskOptions(pooling="mean", special=True))),
    ]
    values = {frame: msgpack.unpackb(frame, strict_map_key=False) for frame in good}

    def run(frames: Frames) -> None:
        for task in ("generate", "embed"):
            dispatch = msgspec.structs.replace(samples.DISPATCHED, sampling=msgspec.Raw(frames[0]), task=task)
            try:
                start = proto.start_of(dispatch, b"hello")
            except tokens.UNDECODABLE:
                continue
            proto.from_agent().feed(proto.pack(start))

    def mutate(mutator: Mutator, frames: Frames) -> Frames:
        if mutator.chance.random() < 0.3:
            return [mutator.mangled(frames[0])]
        return [pack(mutator.value(values[frames[0]]))]

    return Target("options", [[frame] for frame in good], run, mutate)


def every() -> list[Target]:
    """All of them, those on the wire first."""
    return [
        *map(_codec, samples.CODECS),
        _token_frames(),
        _stream(),
        _transfer(),
        _gate(),
        _starts(),
        *_engine_pipes(),
        *files.every(),
    ]


def named(name: str) -> Target:
    return next(target for target in every() if target.name == name)


def mutants(target: Target, seed: str, count: int) -> tuple[int, Exception | None, Frames]:
    """Run so many; the number of those that were run, and what came of the last one."""
    mutator = Mutator(random.Random(seed))
    choice, seeds, mutate, run = mutator.chance.choice, list(target.seeds), target.mutate, target.run
    frames: Frames = []
    for number in range(count):
        frames = mutate(mutator, choice(seeds))
        try:
            run(frames)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the finding
            return number, error, frames
    return count, None, frames
