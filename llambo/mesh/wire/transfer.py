"""A prompt and the tokens that follow it, in one frame: how an answer is moved to another peer.

A worker that continues an answer gets it from its broker (`Dispatch`); a broker that was restarted gets it from workers
(`Orphan`) and from clients (`InferenceRequest` with `resume`). The first `prompt_bytes` of the frame are the prompt,
the rest is a msgpack array of chunks, in order from token 0. If `prompt_bytes` is 0, all of it is the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from llambo.mesh.wire import limits, tokens

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[bytes]).decode
#: Bytes of msgpack for one token: its id, and the header of its piece.
TOKEN_OVERHEAD_BYTES = 10


def pack(prompt: bytes, chunks: Sequence[bytes]) -> tuple[bytes, int]:
    """The frame and `prompt_bytes`. If the frame would be too long, the tokens are left out."""
    if not chunks:
        return prompt, 0
    blob = prompt + _encode(merge(chunks))
    return (blob, len(prompt)) if len(blob) <= limits.CONTROL_FRAME_BYTES else (prompt, 0)


def unpack(blob: bytes, prompt_bytes: int) -> tuple[bytes, list[bytes]]:
    """The prompt and the chunks, checked: well-formed, from token 0, without a gap. Raises ValueError."""
    if not prompt_bytes:
        return blob, []
    try:
        chunks = _decode(blob[prompt_bytes:])
    except tokens.UNDECODABLE as error:
        raise ValueError(f"the bytes after the prompt are not an array of chunks: {error}") from error
    return blob[:prompt_bytes], check(chunks)


def check(chunks: list[bytes]) -> list[bytes]:
    """The same chunks, if they are well-formed and without a gap from token 0 on. Raises ValueError."""
    index = 0
    for frame in chunks:
        chunk = tokens.decode_chunk(frame)
        if chunk is None or chunk.first != index:
            raise ValueError(f"the tokens from {index} on are malformed")
        index += len(chunk.body.ids)
    return chunks


def merge(chunks: Sequence[bytes]) -> list[bytes]:
    """The same tokens in fewer chunks. Most chunks have one token and a head of their own; those with logprobs stay."""
    merged: list[bytes] = []
    ids: list[int] = []
    pieces: list[bytes] = []
    size = first = flags = 0
    key = b""

    def close() -> None:
        nonlocal ids, pieces, size
        if ids:
            merged.append(tokens.encode_chunk(key, first, ids, pieces, flags))
            ids, pieces, size = [], [], 0

    for frame in chunks:
        body = tokens.decode_body(frame[tokens.HEAD_BYTES :])
        length = sum(map(len, body.pieces)) + TOKEN_OVERHEAD_BYTES * len(body.ids)
        plain = body.logprobs is None
        full = len(ids) + len(body.ids) > limits.CHUNK_TOKENS or size + length > limits.TOKEN_FRAME_BYTES // 2
        if not plain or full or (ids and frame[1 : tokens.KEY_END] != key):
            close()
        if not plain or length > limits.TOKEN_FRAME_BYTES // 2:
            merged.append(frame)
            continue
        index, _, flags = tokens.head(frame, tokens.KEY_END)
        if not ids:
            first, key = index, frame[1 : tokens.KEY_END]
        ids += body.ids
        pieces += body.pieces
        size += length
    close()
    return merged


def count(chunks: Sequence[bytes]) -> int:
    """The index after the last token of chunks without a gap."""
    if not chunks:
        return 0
    first, tokens_in_it, _ = tokens.head(chunks[-1], tokens.KEY_END)
    return int(first + tokens_in_it)
