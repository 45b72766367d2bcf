"""The token planes. A message is one frame, so that a broker can forward 10^5 of them a second.

    chunk   "T", request id (16), dispatch id (8), first index (u32), count (u16), flags (u8), body
    beat    "B", number (u64), session id (8)

The body of a chunk is a msgpack array `[ids, pieces]`: token ids, and the bytes that each adds to the text. Chunks of a
request with logprobs have a third entry. To a client every frame is preceded by the topic of its session. All integers
are big-endian.
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
#: The chunk has the last token of its request.
FINAL = 1
#: With FINAL: the answer ended by itself. Without it: it ended at `max_tokens`.
STOPPED = 2

_HEAD = Struct(">IHB")
_BEAT = Struct(">cQ8s")
#: Where request id and dispatch id end and the index begins.
KEY_END = 1 + limits.REQUEST_ID_BYTES + limits.DISPATCH_ID_BYTES
HEAD_BYTES = KEY_END + _HEAD.size
BEAT_BYTES = _BEAT.size

#: (first index, count, flags) of a chunk: `head(frame, KEY_END)`.
head = _HEAD.unpack_from
#: (first byte, key, first index, count, flags) of a frame that is longer than HEAD_BYTES.
open_chunk = Struct(f">c{KEY_END - 1}sIHB").unpack_from


Token = Annotated[int, Meta(ge=0, lt=2**32)]


#: For a token that the model rules out. Logprobs are natural logarithms.
LOWEST_LOGPROB = -9999.0
LogNumber = Annotated[float, Meta(ge=LOWEST_LOGPROB, le=0.0)]


class TopToken(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A token that was likely at a place of an answer."""

    #: Its id.
    id: Token
    #: Its bytes.
    piece: Annotated[bytes, Meta(max_length=limits.LOGPROB_PIECE_BYTES)]
    #: Its log-probability.
    logprob: LogNumber


class Logprob(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How likely a token of an answer was."""

    #: The natural logarithm of the probability of the token.
    logprob: LogNumber
    #: The likeliest tokens at this place, the likeliest first.
    top: Annotated[list[TopToken], Meta(max_length=limits.TOP_LOGPROBS)] = []


class Body(msgspec.Struct, array_like=True, frozen=True, gc=False, omit_defaults=True):
    """The body of a chunk."""

    ids: list[Token]
    pieces: list[bytes]
    #: One for each token, or None.
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
#: What a decoder raises for invalid bytes.
UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def encode_chunk(
    key: bytes,
    first: int,
    ids: Sequence[int],
    pieces: Sequence[bytes],
    flags: int = 0,
    logprobs: Sequence[Logprob | msgspec.Raw] | None = None,
) -> bytes:
    """`key` is request id and dispatch id; logprobs may be encoded already."""
    body = _PlainBody(ids, pieces) if logprobs is None else _FullBody(ids, pieces, logprobs)
    return CHUNK + key + _HEAD.pack(first, len(ids), flags) + _encode(body)


#: One logprob, encoded for `encode_chunk`.
encode_logprob = _encode


#: A name of this module, because the token path needs it for each chunk.
_CHUNK_TOKENS = limits.CHUNK_TOKENS


def read_body(frame: bytes, count: int) -> Body | None:
    """The body of a chunk; None if it is malformed, or does not match a header with this count."""
    try:
        body = decode_body(frame[HEAD_BYTES:])
    except UNDECODABLE:
        return None
    return body if fits(body, count) else None


def fits(body: Body, count: int) -> bool:
    """Whether a body is what a header with this count promises."""
    if not 0 < count == len(body.ids) == len(body.pieces) <= _CHUNK_TOKENS:
        return False
    return body.logprobs is None or len(body.logprobs) == count


def decode_chunk(frame: bytes) -> TokenChunk | None:
    """None if the frame is not a well-formed chunk."""
    if not HEAD_BYTES < len(frame) <= limits.TOKEN_FRAME_BYTES or frame[:1] != CHUNK:
        return None
    first, count, flags = head(frame, KEY_END)
    body = read_body(frame, count)
    return None if body is None else TokenChunk(frame[1:KEY_END], first, flags, body)


def trim_chunk(frame: bytes, first: int) -> bytes | None:
    """The part of a chunk from token index `first` on; None if it is malformed, or has no such part."""
    chunk = decode_chunk(frame)
    if chunk is None:
        return None
    skip = first - chunk.first
    if not 0 <= skip < len(chunk.body.ids):
        return None
    ids, pieces, logprobs = chunk.body.ids, chunk.body.pieces, chunk.body.logprobs
    rest = None if logprobs is None else logprobs[skip:]
    return encode_chunk(chunk.key, first, ids[skip:], pieces[skip:], chunk.flags, rest)


def final_flags(reason: str | None) -> int:
    """The flags of the last chunk of an answer, in case the END is lost together with the worker."""
    return {"stop": FINAL | STOPPED, "length": FINAL}.get(reason or "", 0)


def encode_beat(number: int, session: bytes) -> bytes:
    return _BEAT.pack(BEAT, number, session)


def decode_beat(frame: bytes) -> tuple[int, bytes] | None:
    if len(frame) != BEAT_BYTES or frame[:1] != BEAT:
        return None
    _, number, session = _BEAT.unpack(frame)
    return (int(number), bytes(session)) if number <= limits.BEAT_NUMBER else None


def ids_of(frames: Sequence[bytes]) -> list[int]:
    """The token ids of chunks that were checked when they arrived."""
    ids: list[int] = []
    for frame in frames:
        ids += decode_body(frame[HEAD_BYTES:]).ids
    return ids


def describe(frame: bytes) -> dict[str, Any]:
    """A chunk for people and tests."""
    chunk = decode_chunk(frame)
    return {} if chunk is None else {"first": chunk.first, "ids": chunk.body.ids, "flags": chunk.flags}
