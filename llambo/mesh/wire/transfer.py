"""A prompt and the tokens that follow it, in one frame: how an answer travels when those who keep it change.

A worker that continues gets them from its broker (`Dispatch`), a broker that was restarted gets them back from its
workers (`Orphan`) and from its clients (`InferenceRequest` with `resume`). The frame is the prompt, and after
`prompt_bytes` of it a msgpack array of chunks, in order from token 0. Zero `prompt_bytes`: all of it is prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from llambo.mesh.wire import limits, tokens

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[bytes]).decode
#: Msgpack's share of one token: its id, and the header of its piece.
TOKEN_OVERHEAD_BYTES = 10


def pack(prompt: bytes, chunks: Sequence[bytes]) -> tuple[bytes, int]:
    """The frame and `prompt_bytes`. What would be too long for a frame goes without its tokens."""
    if not chunks:
        return prompt, 0
    blob = prompt + _encode(merge(chunks))
    return (blob, len(prompt)) if len(blob) <= limits.CONTROL_FRAME_BYTES else (prompt, 0)


def unpack(blob: bytes, prompt_bytes: int) -> tuple[bytes, list[bytes]]:
    """Prompt and chunks, checked: well-formed, without a hole, from token 0. `ValueError` says what is wrong."""
    if not prompt_bytes:
        return blob, []
    try:
        chunks = _decode(blob[prompt_bytes:])
    except tokens.UNDECODABLE as error:
        raise ValueError(f"what follows the prompt is no array of chunks: {error}") from error
    return blob[:prompt_bytes], check(chunks)


def check(chunks: list[bytes]) -> list[bytes]:
    """The same chunks, if they are well-formed and without a hole from token 0 on."""
    index = 0
    for frame in chunks:
        chunk = tokens.decode_chunk(frame)
        if chunk is None or chunk.first != index:
            raise ValueError(f"the tokens from {index} on are malformed")
        index += len(chunk.body.ids)
    return chunks


def merge(chunks: Sequence[bytes]) -> list[bytes]:
    """The same tokens in few chunks: most came one by one, each with a head. Those with logprobs stay as they are."""
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
    """The index after the last token of chunks without a hole."""
    if not chunks:
        return 0
    first, tokens_in_it, _ = tokens.head(chunks[-1], tokens.KEY_END)
    return int(first + tokens_in_it)
