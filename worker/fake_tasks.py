"""The fake engine's results. Like its tokens they can be computed again by whoever judges a run, byte for byte.

Texts are bytes to it: a token for each. An embedding is a hash of its text; with `wander` also of the dispatch, so that
a result put together from two dispatches would be seen.
"""

from __future__ import annotations

import math
from array import array
from typing import Any

import msgspec

from llambo.mesh import limits, tasks
from llambo.mesh.errors import Code, ErrorInfo
from llambo.worker import fake_tokens
from llambo.worker.engine_proto import Start
from llambo.worker.knobs import FakeKnobs

_encode = msgspec.msgpack.Encoder().encode
_ids = msgspec.msgpack.Decoder(tasks.Ids).decode
_texts = msgspec.msgpack.Decoder(tasks.Texts).decode
#: A byte of a hash as a number from -1 to 1.
_NUMBERS = [(byte - 127.5) / 127.5 for byte in range(256)]
BYTE_TOKENS = 256


class BadTask(Exception):
    """It cannot be done, here or elsewhere."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.info = ErrorInfo(code, text)


def result_of(start: Start, knobs: FakeKnobs, model: str) -> list[bytes]:
    """The pieces of the result. Raises BadTask."""
    try:
        result = _encode(_result(start, knobs, model))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadTask(Code.BAD_REQUEST, f"the input of {start.task} makes no sense: {error}") from error
    most = start.max_tokens * limits.RESULT_PIECE_BYTES
    if len(result) > most:
        raise BadTask(Code.TOO_LONG, f"a result of {len(result)} bytes, {most} are allowed")
    return tasks.pieces_of(result)


def _result(start: Start, knobs: FakeKnobs, model: str) -> Any:
    match start.task:
        case "tokenize":
            return tasks.Tokens(list(start.prompt), [start.prompt[at : at + 1] for at in range(len(start.prompt))])
        case "detokenize":
            return tasks.Text(b"".join(map(_piece, _ids(start.prompt))))
        case "embed":
            return embeddings(start.key[-limits.DISPATCH_ID_BYTES :], start, knobs)
        case _:
            return {"model": model, "engine": "fake", "style": knobs.style, "context_tokens": knobs.context_tokens}


def _piece(id: int) -> bytes:
    return bytes([id]) if id < BYTE_TOKENS else fake_tokens.piece_of(id)


def embeddings(dispatch: bytes, start: Start, knobs: FakeKnobs) -> tasks.Vectors:
    base = fake_tokens.base_of(dispatch, b"embed") if knobs.style == "wander" else 0
    numbers, counts = array("f"), []
    for number, text in enumerate(_texts(start.prompt)):
        tokens = len(text.encode())
        if knobs.context_tokens and tokens > knobs.context_tokens:
            told = f"input {number} has {tokens} tokens, the context has {knobs.context_tokens}"
            raise BadTask(Code.TOO_LONG, told)
        counts.append(tokens)
        vector = [_NUMBERS[byte] for byte in fake_tokens.bits(base, text.encode(), knobs.embedding_size)]
        length = math.hypot(*vector) if start.options.normalized else 1.0
        numbers.extend([value / length for value in vector])
    return tasks.Vectors(
        knobs.embedding_size, start.options.pooling or "mean", start.options.normalized, counts, tasks.data_of(numbers)
    )
