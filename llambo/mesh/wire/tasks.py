"""What a worker does beside generating: inputs and results, as they travel.

A task is a request like any other: admitted, queued, dispatched, moved when its worker dies, cancelled, ended. Its
prompt frame holds the input, and its result, one msgpack map, comes where an answer has its tokens: in pieces of
RESULT_PIECE_BYTES, each with a token id of 0, kept in a transcript and delivered with the END. It is whole or nothing.

    task         input (the prompt frame)         result
    tokenize     the text                         TokenizeResult
    detokenize   msgpack: array of token ids      DetokenizeResult
    embed        msgpack: array of texts          EmbedResult
    model_info   empty                            a map, for people and programs
"""

from __future__ import annotations

import sys
from array import array
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llambo.mesh.wire import limits
from llambo.mesh.wire.messages import Task

Form = Literal["text", "user", "messages", "chat"]
Pooling = Literal["", "mean", "last"]

Id = Annotated[int, Meta(ge=0, le=2**31 - 1)]
#: More would not fit into a prompt frame anyway.
Ids = Annotated[list[Id], Meta(max_length=limits.PROMPT_BYTES)]
Texts = Annotated[list[str], Meta(min_length=1, max_length=limits.EMBED_INPUTS)]


class TaskOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """What stands in `sampling` when the request is no answer."""

    #: tokenize: as in `Sampling`, to count what a prompt would be.
    form: Form = "text"
    system: Annotated[str, Meta(max_length=limits.SYSTEM_CHARS)] = ""
    #: Names of control tokens mean those tokens (tokenize), and are shown (detokenize).
    special: bool = False
    #: embed: how a text becomes one vector; empty: as the model was made for, or the mean.
    pooling: Pooling = ""
    #: embed: of length 1.
    normalized: bool = True


class TokenizeResult(msgspec.Struct, frozen=True):
    """Token ids, and what each stands for; control tokens by their names."""

    ids: list[int]
    pieces: list[bytes]


class DetokenizeResult(msgspec.Struct, frozen=True):
    text: bytes


class EmbedResult(msgspec.Struct, frozen=True):
    """`data`: the vectors one after the other, `size` floats of 4 bytes each, little-endian."""

    size: int
    pooling: str
    normalized: bool
    #: Of each input.
    tokens: list[int]
    data: bytes


def pieces_of(result: bytes) -> list[bytes]:
    """A result as it travels."""
    size = limits.RESULT_PIECE_BYTES
    return [result[at : at + size] for at in range(0, len(result), size)]


def data_of(numbers: array[float]) -> bytes:
    """Floats of 4 bytes each, as they travel."""
    if sys.byteorder == "big":
        numbers = array("f", numbers)
        numbers.byteswap()
    return numbers.tobytes()


def vectors_of(found: EmbedResult) -> list[list[float]]:
    """Raises ValueError if they do not add up."""
    numbers = array("f")
    numbers.frombytes(found.data)
    if sys.byteorder == "big":
        numbers.byteswap()
    if len(numbers) != found.size * len(found.tokens):
        raise ValueError(f"{len(numbers)} numbers for {len(found.tokens)} vectors of {found.size}")
    return [numbers[at : at + found.size].tolist() for at in range(0, len(numbers), found.size)]


def most_pieces(task: Task, inputs: int, input_bytes: int) -> int:
    """How many pieces to have room for: enough for any model of today, and no more than there may be."""
    each, some = {"tokenize": (16, input_bytes), "detokenize": (1024, inputs), "embed": (32 * 1024, inputs)}.get(
        task, (limits.RESULT_PIECE_BYTES * 16, 1)
    )
    return min(limits.RESULT_PIECES, 2 + each * some // limits.RESULT_PIECE_BYTES)
