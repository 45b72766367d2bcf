"""Messages that a hostile peer with the ids of live requests could send.

The samples show every field once; what they name is not there. These name what is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from llambo.mesh.wire import codec, tokens, transfer
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from tests.fuzz.mutator import Mutator, pack, unpack
from tests.unit import samples

Said = tuple[m.Message, bytes | None]
#: Priorities, the worst for others first.
PRIORITIES: tuple[m.Priority, ...] = ("interactive", "normal", "batch")
FAILED = ErrorInfo(Code.INTERNAL, "so it seems", 5)


def chunks(key: bytes, count: int, flags: int = 0) -> list[bytes]:
    """Tokens from 0 on, the last of them with these flags."""
    made = [tokens.encode_chunk(key, n, [n], [b"x"]) for n in range(max(0, count - 1))]
    return [*made, tokens.encode_chunk(key, count - 1, [count - 1], [b"x"], flags)] if count else made


def from_client(chance: random.Random, ids: Sequence[bytes], model: str = "tiny") -> Said:
    """`ids`: live requests. There may be none."""
    id = chance.choice(ids) if ids and chance.random() < 0.8 else chance.randbytes(16)
    held = chunks(id + samples.DISPATCH, chance.choice((0, 1, 3)), chance.choice((0, 1, 3)))
    prompt, prompt_bytes = transfer.pack(b"hello", held)
    new = m.InferenceRequest(
        chance.randbytes(16),
        model,
        chance.choice((1, 2, 5, 50)),
        chance.random() < 0.8,
        chance.choice(PRIORITIES),
        chance.choice((0, 0, 1, 1_000)),
        chance.random() < 0.2,
        task=chance.choice(("generate", "generate", "generate", "tokenize", "embed", "rerank")),
        logprobs=chance.choice((None, None, 2)),
    )
    resumed = m.InferenceRequest(id, model, 50, have=len(held), resume=True, prompt_bytes=prompt_bytes)
    made: list[Said] = [
        (new, b"hello"),
        (new, b"hello"),
        (resumed, prompt),
        (m.Attach(id, chance.randrange(4), held, chance.random() < 0.5), None),
        (m.Detach(id), None),
        (m.Cancel(id), None),
        (m.Replay(id, chance.randrange(4), chance.randrange(6)), None),
        (m.EndAck([id]), None),
        (m.Query(chance.randrange(2**53), chance.choice(("status", "workers", "models", "requests", "events"))), None),
        (m.Query(7, "why", id.hex()), None),
        (m.DrainWorker(8, "w-x", chance.random() < 0.5, chance.random() < 0.5), None),
        (
            m.Lease(
                9,
                chance.choice(("fleet", "x")),
                chance.choice((bytes(8), b"another")),
                chance.choice((0, 50, 5_000)),
                chance.random() < 0.5,
                ["tiny"],
                ["event"],
            ),
            None,
        ),
        (m.ClientHeartbeat(chance.randrange(9)), None),
    ]
    return chance.choice(made)


def from_worker(chance: random.Random, keys: Sequence[bytes], model: str = "tiny") -> Said:
    """`keys`: request id + dispatch id, of live runs."""
    key = chance.choice(keys) if keys and chance.random() < 0.9 else chance.randbytes(24)
    id, dispatch = key[:16], key[16:]
    count = chance.choice((0, 1, 2, 5))
    orphan = m.Dispatch(id, dispatch, 1, model, 50, 1, prompt_bytes=transfer.pack(b"hello", chunks(key, count))[1])
    made: list[Said] = [
        (m.Accept(id, dispatch), None),
        (m.Accept(id, dispatch), None),
        (m.Reject(id, dispatch, FAILED, chance.random() < 0.3), None),
        (m.End(id, count, chance.choice(("stop", "length", "error", "cancelled", "deadline")), dispatch), None),
        (m.Page(id, 0, count, chance.choice((count, 9)), chunks(key, count, chance.choice((0, 1))), dispatch), None),
        (m.EngineLost([*keys[:3], key], "boom", [1], chance.random() < 0.5), None),
        (m.Orphan(orphan, chance.random() < 0.5), transfer.pack(b"hello", chunks(key, count))[0]),
        (m.WorkerHeartbeat(seq=chance.choice((0, 5, 2**53)), beat=chance.randrange(9), claims={key: count}), None),
        (m.WorkerHeartbeat(seq=0, beat=1, claims=dict.fromkeys(keys, 0)), None),
        (
            m.WorkerHeartbeat(beat=1, state=chance.choice(("ready", "draining", "starting")), busy=chance.randrange(4)),
            None,
        ),
        (
            m.WorkerHeartbeat(
                beat=1, models=[m.ModelInfo(model, "f"), m.ModelInfo("other")], slots=chance.randrange(1, 5)
            ),
            None,
        ),
    ]
    return chance.choice(made)


def to_client(chance: random.Random, ids: Sequence[bytes], queries: Sequence[int]) -> Said:
    id = chance.choice(ids) if ids and chance.random() < 0.95 else chance.randbytes(16)
    query = chance.choice(queries) if queries else 1
    count = chance.choice((0, 1, 2, 5, 50))
    made: list[m.Message] = [
        m.Accepted(id, chance.randrange(3), "tiny", chance.choice(("", "f", "g"))),
        m.End(id, count, chance.choice(("stop", "length", "error", "cancelled")), error=chance.choice((None, FAILED))),
        m.Page(id, 0, count, chance.choice((count, 9)), chunks(id + samples.DISPATCH, count, chance.choice((0, 1)))),
        m.Page(id, 3, 2, 1, chunks(id + samples.DISPATCH, 2)),
        m.Problem(FAILED, id),
        m.Problem(
            ErrorInfo(chance.choice(list(Code)), "it seems"), chance.choice((id, b"")), chance.choice((0, query))
        ),
        m.Result(query, chance.randrange(2), chance.choice((0, 1, 2, 2**31)), b"\x80"),
        m.BrokerHeartbeat(chance.randrange(9), progress={id: count}, waiting={id: 3}),
        m.BrokerHeartbeat(chance.choice((1, 2**53)), progress=dict.fromkeys(ids[:9], 2**31)),
    ]
    return chance.choice(made), None


def to_worker(chance: random.Random, keys: Sequence[bytes], seq: int, model: str = "tiny") -> Said:
    key = chance.choice(keys) if keys and chance.random() < 0.9 else chance.randbytes(24)
    id, dispatch = key[:16], key[16:]
    prefix = list(range(chance.choice((0, 0, 2))))
    made: list[Said] = [
        (
            m.Dispatch(
                chance.randbytes(16),
                dispatch,
                seq,
                model,
                chance.choice((1, 3, 50)),
                7,
                prefix,
                suspect=chance.random() < 0.1,
            ),
            b"hi",
        ),
        (m.Dispatch(id, chance.randbytes(8), seq, model, 9, 7, deadline_ms=chance.choice((0, 1))), b"hi"),
        (m.Adopt(id, dispatch, seq), None),
        (m.Cancel(id, dispatch), None),
        (m.Replay(id, chance.randrange(3), chance.randrange(4), dispatch), None),
        (m.EndAck([key, *keys[:2]]), None),
        (m.BrokerHeartbeat(chance.randrange(9), chance.randrange(9), seq=seq), None),
        (m.Problem(ErrorInfo(chance.choice(list(Code)), "it seems"), id), None),
    ]
    return chance.choice(made)


def frames(mutator: Mutator, session: bytes, messages: Sequence[Said]) -> list[bytes]:
    """These messages in one bundle; half of the time with one thing in it changed."""
    made = codec.encode(session, messages)
    if mutator.chance.random() < 0.5:
        made[1] = pack(mutator.value(unpack(made[1]), 1))
    return made


def check_sayable(reader: codec.Codec[Any], session: bytes, message: m.Message, blob: bytes | None) -> None:
    """Whatever is answered to nonsense makes sense itself."""
    for frames in codec.encode_all(session, [(message, blob)]):
        problems = reader.decode(frames).problems
        assert not problems, f"{type(message).__name__} cannot be read: {problems[0].error.text}"
