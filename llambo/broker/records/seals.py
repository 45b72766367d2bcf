"""What one broker can prove to another, or to itself after a restart, although nothing is stored.

After a restart a broker learns from workers and clients what it had accepted (requests/recovery.py). So that they can
claim no more than that, they get marks which they cannot make, and hand them back:

    proof     to a client, for a request: its owner was admitted with this prompt and these options
    seal      to a worker, for a dispatch: this run of that request was given to the worker of this name

Both are MACs. Their key is derived from the secret half of the brokers' key pair, which all brokers of a mesh share and
no other peer has. Without keys there are no marks: then each peer may submit anything in any case.

The deadline is in no proof: of that a client sends what is left, and it may choose any. A seal begins with the time
that the request had left then (0: no deadline). A worker hands back what is left of it, which cannot be more. A mark
has no age: no two machines compare their clocks.
"""

from __future__ import annotations

import hmac
from hashlib import blake2b

import msgspec

from llambo.broker.records.request import seed_of, streams
from llambo.mesh.wire import messages as m

_MAC_BYTES = 16
_TIME_BYTES = 8
_encode = msgspec.msgpack.Encoder().encode


def key_from(secret: str) -> bytes:
    """The key of the marks, from the secret key of the brokers."""
    return blake2b(secret.encode(), digest_size=32, person=b"llambo marks 1").digest()


def proof_of(key: bytes, asked: m.InferenceRequest, model: str, owner: str, prompt: bytes) -> bytes:
    """`model`: the one that is meant by the name in the request."""
    return _proof(
        key,
        (
            asked.id, owner, model, asked.max_tokens, seed_of(asked), streams(asked), asked.priority,
            asked.detached, asked.logprobs, asked.task, asked.sampling,
        ),
        prompt,
    )  # fmt: skip


def is_proved(key: bytes, asked: m.InferenceRequest, model: str, owner: str, prompt: bytes) -> bool:
    """Whether a broker of this mesh has admitted it before. Without keys its client's word is enough."""
    if not asked.resume:
        return False
    return not key or hmac.compare_digest(proof_of(key, asked, model, owner, prompt), asked.proof)


def seal_of(key: bytes, proof: bytes, dispatch: bytes, worker: str, deadline_ms: int) -> bytes:
    time = deadline_ms.to_bytes(_TIME_BYTES, "big")
    message = proof + dispatch + time + worker.encode()
    return time + blake2b(message, digest_size=_MAC_BYTES, key=key, person=b"seal").digest()


def is_sealed(key: bytes, work: m.Dispatch, prompt: bytes, worker: str) -> bool:
    """Whether a broker of this mesh has given this run to this worker."""
    given_ms = int.from_bytes(work.seal[:_TIME_BYTES], "big")
    if not (0 < work.deadline_ms <= given_ms if given_ms else work.deadline_ms == 0):
        return False
    proof = _proof(
        key,
        (
            work.id, work.owner, work.model, work.max_tokens, work.seed, work.stream, work.priority,
            work.detached, work.logprobs, work.task, work.sampling,
        ),
        prompt,
    )  # fmt: skip
    return hmac.compare_digest(seal_of(key, proof, work.dispatch, worker, given_ms), work.seal)


def _proof(key: bytes, fields: tuple[object, ...], prompt: bytes) -> bytes:
    mac = blake2b(_encode(fields), digest_size=_MAC_BYTES, key=key, person=b"proof")
    mac.update(prompt)
    return mac.digest()
