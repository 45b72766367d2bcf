"""The token planes: one frame a message, so that a broker can forward 10^5 of them a second.

    chunk   "T", request id (16), dispatch id (8), first index (u32), count (u16), flags (u8), body
    beat    "B", number (u64), session id (8)

The body of a chunk is a msgpack array `[ids, pieces]`: token ids, and the bytes each adds to the text. A request
with logprobs has them as a third entry; the others do not pay for them. Towards a client every frame is preceded by its
session's topic.
All integers are big-endian.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from llambo.mesh.wire import limits

CHUNK = b"T"
BEAT = b"B"
#: The chunk carries the last token of its request.
FINAL = 1
#: ... and the answer came to its own end; without it, it ran to `max_tokens`.
STOPPED = 2

_HEAD = Struct(">IHB")
_BEAT = Struct(">cQ8s")
#: Where the request id + dispatch id end and the index begins.
KEY_END = 1 + limits.REQUEST_ID_BYTES + limits.DISPATCH_ID_BYTES
HEAD_BYTES = KEY_END + _HEAD.size
BEAT_BYTES = _BEAT.size

#: (first index, count, flags) of a chunk: `head(frame, KEY_END)`.
head = _HEAD.unpack_from


Token = Annotated[int, Meta(ge=0, lt=2**32)]


#: The natural logarithm of a probability. What the model rules out altogether is told as the lowest.
LOWEST_LOGPROB = -9999.0
LogNumber = Annotated[float, Meta(ge=LOWEST_LOGPROB, le=0.0)]


class TopToken(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A token that might have stood there."""

    id: Token
    piece: Annotated[bytes, Meta(max_length=limits.LOGPROB_PIECE_BYTES)]
    logprob: LogNumber


class Logprob(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How likely the model held a token of the answer, and what else it held likely, the likeliest first."""

    logprob: LogNumber
    top: Annotated[list[TopToken], Meta(max_length=limits.TOP_LOGPROBS)] = []


class Body(msgspec.Struct, array_like=True, frozen=True, gc=False, omit_defaults=True):
    """What a chunk carries."""

    ids: list[Token]
    pieces: list[bytes]
    #: One for each token, or none at all.
    logprobs: list[Logprob] | None = None


class TokenChunk(msgspec.Struct, frozen=True):
    """A chunk, decoded."""

    key: bytes
    first: int
    flags: int
    body: Body

    @property
    def id(self) -> bytes:
        return self.key[: limits.REQUEST_ID_BYTES]

    @property
    def dispatch(self) -> bytes:
        return self.key[limits.REQUEST_ID_BYTES :]


class _PlainBody(msgspec.Struct, array_like=True, frozen=True, gc=False):
    ids: Sequence[int]
    pieces: Sequence[bytes]


class _FullBody(msgspec.Struct, array_like=True, frozen=True, gc=False):
    ids: Sequence[int]
    pieces: Sequence[bytes]
    logprobs: Sequence[Logprob | msgspec.Raw]


_encode = msgspec.msgpack.Encoder().encode
#: The body of a chunk, `frame[HEAD_BYTES:]`; raises one of UNDECODABLE.
decode_body = msgspec.msgpack.Decoder(Body).decode
#: What a decoder raises for bytes that are not what they should be.
UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def encode_chunk(
    key: bytes,
    first: int,
    ids: Sequence[int],
    pieces: Sequence[bytes],
    flags: int = 0,
    logprobs: Sequence[Logprob | msgspec.Raw] | None = None,
) -> bytes:
    """`key` is request id + dispatch id; logprobs may be encoded already."""
    body = _PlainBody(ids, pieces) if logprobs is None else _FullBody(ids, pieces, logprobs)
    return CHUNK + key + _HEAD.pack(first, len(ids), flags) + _encode(body)


#: One logprob, as `encode_chunk` takes it and as it is kept.
encode_logprob = _encode


#: Looked up once: the token path asks for it with each chunk.
_CHUNK_TOKENS = limits.CHUNK_TOKENS


def read_body(frame: bytes, count: int) -> Body | None:
    """The body of a chunk; None if it is malformed, or not what a header with this count promises."""
    try:
        body = decode_body(frame[HEAD_BYTES:])
    except UNDECODABLE:
        return None
    logprobs = body.logprobs
    if (
        len(body.ids) != count
        or len(body.pieces) != count
        or not 0 < count <= _CHUNK_TOKENS
        or (logprobs is not None and len(logprobs) != count)
    ):
        return None
    return body


def decode_chunk(frame: bytes) -> TokenChunk | None:
    """None for anything that is not a well-formed chunk."""
    if not HEAD_BYTES < len(frame) <= limits.TOKEN_FRAME_BYTES or frame[:1] != CHUNK:
        return None
    first, count, flags = head(frame, KEY_END)
    body = read_body(frame, count)
    return None if body is None else TokenChunk(frame[1:KEY_END], first, flags, body)


def trim_chunk(frame: bytes, first: int) -> bytes | None:
    """The part of a chunk from token index `first` on; None if it is malformed or has no such part."""
    chunk = decode_chunk(frame)
    if chunk is None:
        return None
    skip = first - chunk.first
    if not 0 <= skip < len(chunk.body.ids):
        return None
    ids, pieces, logprobs = chunk.body.ids, chunk.body.pieces, chunk.body.logprobs
    kept = None if logprobs is None else logprobs[skip:]
    return encode_chunk(chunk.key, first, ids[skip:], pieces[skip:], chunk.flags, kept)


def final_flags(reason: str | None) -> int:
    """What the last chunk of an answer says about it, should the END be lost together with its worker."""
    return {"stop": FINAL | STOPPED, "length": FINAL}.get(reason or "", 0)


def encode_beat(number: int, session: bytes) -> bytes:
    return _BEAT.pack(BEAT, number, session)


def decode_beat(frame: bytes) -> tuple[int, bytes] | None:
    if len(frame) != BEAT_BYTES or frame[:1] != BEAT:
        return None
    _, number, session = _BEAT.unpack(frame)
    return (int(number), bytes(session)) if number <= limits.BEAT_NUMBER else None


def ids_of(frames: Sequence[bytes]) -> list[int]:
    """The token ids of chunks that were checked when they came in."""
    ids: list[int] = []
    for frame in frames:
        ids += decode_body(frame[HEAD_BYTES:]).ids
    return ids


def describe(frame: bytes) -> dict[str, Any]:
    """A chunk for people and tests."""
    chunk = decode_chunk(frame)
    return {} if chunk is None else {"first": chunk.first, "ids": chunk.body.ids, "flags": chunk.flags}
