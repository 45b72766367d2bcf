"""What two hosts say to each other about files of models. One frame each; a `Chunk` has its bytes in a second one.

A host asks, the other one answers. Each question shows the ticket that a broker has drawn for it. Nothing here is
trusted: sizes and names are checked, and each chunk against its sha256 before it is written.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from llambo.mesh.wire import limits
from llambo.mesh.wire.messages import Ref, Ticket, snake_case

#: Checksums in one answer: those of 128 GiB.
SUMS = 32_768
SUM_BYTES = 32
#: Files of one model.
FILES = 1_000
#: The answer of Ollama's registry about a model.
MANIFEST_BYTES = 1024 * 1024
#: A chunk is as long as in `store.part_file`.
FRAME_BYTES = 4 * 1024 * 1024 + 4_096

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Number = Annotated[int, Meta(ge=0, lt=2**40)]


class SharedFile(msgspec.Struct, frozen=True):
    path: Annotated[str, Meta(min_length=1, max_length=limits.REF_CHARS)]
    size: Annotated[int, Meta(ge=1, lt=2**50)]
    sha256: Sha256


class SharedModel(msgspec.Struct, frozen=True):
    """What has to be fetched for a model, and what gives it its name in a cache then."""

    ref: Ref
    files: Annotated[list[SharedFile], Meta(min_length=1, max_length=FILES)]
    #: Of a repository of Hugging Face.
    commit: Annotated[str, Meta(pattern=r"^([0-9a-f]{40})?\Z")] = ""
    #: Of Ollama.
    manifest: Annotated[bytes, Meta(max_length=MANIFEST_BYTES)] = b""


class FileMessage(msgspec.Struct, tag_field="type", tag=snake_case, frozen=True):
    """Base class of these messages. They are in no control bundle."""


class AskModel(FileMessage, frozen=True):
    ticket: Ticket


class AskSums(FileMessage, frozen=True):
    """The checksums of the chunks of a file, from this one on."""

    ticket: Ticket
    sha256: Sha256
    first: Number = 0


class AskChunk(FileMessage, frozen=True):
    ticket: Ticket
    sha256: Sha256
    number: Number


class ModelFiles(FileMessage, frozen=True):
    model: SharedModel


class Sums(FileMessage, frozen=True):
    """Those of the chunks that are there: more may follow later."""

    sha256: Sha256
    first: Number
    sums: Annotated[bytes, Meta(max_length=SUMS * SUM_BYTES)]


class Chunk(FileMessage, frozen=True):
    sha256: Sha256
    number: Number


class NotGiven(FileMessage, frozen=True):
    """It is not given: there is no such grant, or no such file any more."""

    text: Annotated[str, Meta(max_length=256)]


encode = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(AskModel | AskSums | AskChunk).decode
decode_answer = msgspec.msgpack.Decoder(ModelFiles | Sums | Chunk | NotGiven).decode
