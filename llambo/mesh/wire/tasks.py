"""Tasks: what a worker does besides generating. Their inputs and results in messages.

A task is a request like any other: admitted, queued, dispatched, moved when its worker dies, cancelled, ended. Its
prompt frame has the input. Its result, one msgpack map, takes the place of the tokens of an answer: pieces of
RESULT_PIECE_BYTES, each with a token id of 0, stored in a transcript and delivered with the END. A result is complete
or useless.

    task         input (the prompt frame)         result
    tokenize     the text                         TokenizeResult
    detokenize   msgpack: array of token ids      DetokenizeResult
    embed        msgpack: array of texts          EmbedResult
    rerank       msgpack: RerankInput             RerankResult
    model_info   empty                            a map, for people and programs

Which of them a model can do follows from its kind (`TASKS_OF`).
"""

from __future__ import annotations

import math
import sys
from array import array
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llambo.mesh.wire import limits
from llambo.mesh.wire.messages import Kind, Task

Form = Literal["text", "user", "messages", "chat"]
Pooling = Literal["", "mean", "last"]

Id = Annotated[int, Meta(ge=0, le=2**31 - 1)]
#: More do not fit into a prompt frame.
Ids = Annotated[list[Id], Meta(max_length=limits.PROMPT_BYTES)]
Texts = Annotated[list[str], Meta(min_length=1, max_length=limits.EMBED_INPUTS)]
Documents = Annotated[list[str], Meta(min_length=1, max_length=limits.RERANK_DOCUMENTS)]

_WITH_TEXT: frozenset[Task] = frozenset({"tokenize", "detokenize", "model_info"})
#: A model that generates has vectors of its tokens as well, so it can embed.
TASKS_OF: dict[Kind, frozenset[Task]] = {
    "generate": _WITH_TEXT | {"generate", "embed"},
    "embed": _WITH_TEXT | {"embed"},
    "rerank": _WITH_TEXT | {"rerank"},
}


class TaskOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """The `sampling` of a task."""

    #: tokenize: as in `Sampling`, to count the tokens of a prompt.
    form: Form = "text"
    system: Annotated[str, Meta(max_length=limits.SYSTEM_CHARS)] = ""
    #: Names of control tokens are read as those tokens (tokenize), or appear in the text (detokenize).
    special: bool = False
    #: embed: how the vectors of the tokens are combined; empty: as the model was trained for, or the mean.
    pooling: Pooling = ""
    #: embed: vectors have the length 1.
    normalized: bool = True
    #: rerank: scores as the model gives them, and not from 0 to 1.
    raw: bool = False


class TokenizeResult(msgspec.Struct, frozen=True):
    """Token ids, and the text of each; control tokens by their names."""

    ids: list[int]
    pieces: list[bytes]


class DetokenizeResult(msgspec.Struct, frozen=True):
    text: bytes


class EmbedResult(msgspec.Struct, frozen=True):
    """`data`: the vectors one after the other, `size` floats of 4 bytes each, little-endian."""

    size: int
    pooling: str
    normalized: bool
    #: The number of tokens of each input.
    tokens: list[int]
    data: bytes


class RerankInput(msgspec.Struct, frozen=True):
    query: Annotated[str, Meta(min_length=1)]
    documents: Documents


class RerankResult(msgspec.Struct, frozen=True):
    """One score for each document, in the same order: the higher, the better it fits the query."""

    scores: list[float]
    #: The number of tokens of each document, with the query and what the model wants around them.
    tokens: list[int]


def pieces_of(result: bytes) -> list[bytes]:
    """The pieces of a result."""
    size = limits.RESULT_PIECE_BYTES
    return [result[at : at + size] for at in range(0, len(result), size)]


def data_of(numbers: array[float]) -> bytes:
    """Floats of 4 bytes each, as in `EmbedResult.data`."""
    if sys.byteorder == "big":
        numbers = array("f", numbers)
        numbers.byteswap()
    return numbers.tobytes()


def vectors_of(found: EmbedResult) -> list[list[float]]:
    """Raises ValueError if the sizes do not match."""
    numbers = array("f")
    numbers.frombytes(found.data)
    if sys.byteorder == "big":
        numbers.byteswap()
    if len(numbers) != found.size * len(found.tokens):
        raise ValueError(f"{len(numbers)} numbers for {len(found.tokens)} vectors of {found.size}")
    return [numbers[at : at + found.size].tolist() for at in range(0, len(numbers), found.size)]


def shortened(vector: list[float], dimensions: int, *, normalized: bool) -> list[float]:
    """Its first numbers; if it had the length 1, it has it again."""
    first = vector[:dimensions]
    length = math.hypot(*first) if normalized else 1.0
    return [value / length for value in first] if length else first


def most_pieces(task: Task, inputs: int, input_bytes: int) -> int:
    """How many pieces to reserve memory for: enough for any model of today, within the limit."""
    each, some = limits.RESULT_PIECE_BYTES * 16, 1
    match task:
        case "tokenize":
            each, some = 16, input_bytes
        case "detokenize":
            each, some = 1024, inputs
        case "embed":
            each, some = 32 * 1024, inputs
        case "rerank":
            each, some = 16, inputs
    return min(limits.RESULT_PIECES, 2 + each * some // limits.RESULT_PIECE_BYTES)
