"""The token planes: one frame a message, so that a broker can forward 10^5 of them a second.

    chunk   "T", request id (16), dispatch id (8), first index (u32), count (u16), flags (u8), body
    beat    "B", number (u64), session id (8)

The body of a chunk is a msgpack array `[ids, pieces]` (and `logprobs` third, when asked for): token ids,
and the bytes each adds to the text. Towards a client every frame is preceded by its session's topic.
All integers are big-endian.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from llambo.mesh import limits

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


class Body(msgspec.Struct, array_like=True, frozen=True, gc=False, omit_defaults=True):
    """What a chunk carries."""

    ids: list[Token]
    pieces: list[bytes]
    logprobs: msgspec.Raw = msgspec.Raw(b"\xc0")


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


_encode = msgspec.msgpack.Encoder().encode
#: The body of a chunk, `frame[HEAD_BYTES:]`; raises one of UNDECODABLE.
decode_body = msgspec.msgpack.Decoder(Body).decode
#: What a decoder raises for bytes that are not what they should be.
UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def encode_chunk(key: bytes, first: int, ids: Sequence[int], pieces: Sequence[bytes], flags: int = 0) -> bytes:
    """`key` is request id + dispatch id."""
    return CHUNK + key + _HEAD.pack(first, len(ids), flags) + _encode(_PlainBody(ids, pieces))


def decode_chunk(frame: bytes) -> TokenChunk | None:
    """None for anything that is not a well-formed chunk."""
    if not HEAD_BYTES < len(frame) <= limits.TOKEN_FRAME_BYTES or frame[:1] != CHUNK:
        return None
    first, count, flags = head(frame, KEY_END)
    try:
        body = decode_body(frame[HEAD_BYTES:])
    except UNDECODABLE:
        return None
    if not 0 < count <= limits.CHUNK_TOKENS or len(body.ids) != count or len(body.pieces) != count:
        return None
    return TokenChunk(frame[1:KEY_END], first, flags, body)


def trim_chunk(frame: bytes, first: int) -> bytes | None:
    """The part of a chunk from token index `first` on; None if it is malformed or has no such part."""
    chunk = decode_chunk(frame)
    if chunk is None:
        return None
    skip = first - chunk.first
    if not 0 <= skip < len(chunk.body.ids):
        return None
    return encode_chunk(chunk.key, first, chunk.body.ids[skip:], chunk.body.pieces[skip:], chunk.flags)


def has_logprobs(body: Body) -> bool:
    return bytes(body.logprobs) != b"\xc0"


def final_flags(reason: str | None) -> int:
    """What the last chunk of an answer says about it, should the END be lost together with its worker."""
    return {"stop": FINAL | STOPPED, "length": FINAL}.get(reason or "", 0)


def encode_beat(number: int, session: bytes) -> bytes:
    return _BEAT.pack(BEAT, number, session)


def decode_beat(frame: bytes) -> tuple[int, bytes] | None:
    if len(frame) != BEAT_BYTES or frame[:1] != BEAT:
        return None
    _, number, session = _BEAT.unpack(frame)
    return int(number), bytes(session)


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
