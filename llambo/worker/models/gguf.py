"""The header of a GGUF file: enough to know what it is, what it needs, and whether it is complete, before loading it.

llama.cpp does not check such files thoroughly, so plain errors are found here first: another kind of file, a truncated
file, impossible counts and lengths. No number is accepted that the size of the file rules out.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from struct import error as struct_error
from typing import BinaryIO, NamedTuple

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: More than any real model has. A file with more is damaged.
MAX_ENTRIES = 65_536
MAX_TENSORS = 262_144
MAX_KEY_BYTES = 65_535
#: Only this many values of an array are read: the vocabulary is not needed here.
ARRAY_VALUES = 64

_U32, _U64 = Struct("<I"), Struct("<Q")
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRUCTS = {kind: Struct(form) for kind, form in _SCALARS.items()}
F32, STRING, _ARRAY = 6, 8, 9
#: Values in a block and bytes of a block, by tensor type. Unknown types are not checked.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 30: (1, 2),
}  # fmt: skip


def is_number(kind: int) -> bool:
    """A type of tensors that a matrix can have, quantised or not."""
    return kind in _BLOCKS


#: What the header has under a key.
MetaValue = bool | int | float | str | list["MetaValue"]


class BadModelFile(Exception):
    """The file is not a model, or is incomplete; the text gives the reason."""


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    kind: int


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The contents of the header."""

    path: str
    size_bytes: int
    meta: dict[str, MetaValue]
    tensors: int
    #: The name of each tensor in this file, and the bytes until the next one.
    tensor_sizes: tuple[tuple[str, int], ...] = ()
    #: Tokens of the vocabulary, by the shape of their embeddings; 0: this file has none.
    vocabulary: int = 0
    shapes: dict[str, Tensor] = field(default_factory=dict)
    #: The kind of each value of the metadata, as a number of the format.
    kinds: dict[str, int] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.meta.get("general.architecture", "unknown"))

    @property
    def is_adapter(self) -> bool:
        return self.meta.get("general.type") == "adapter"

    def number(self, key: str, default: int = 0) -> int:
        """The number of a key of the architecture. Of a list (one for each layer) the largest."""
        value = self.meta.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list):
            value = max((each for each in value if isinstance(each, int)), default=default)
        return value if isinstance(value, int) else default

    @property
    def trained_context(self) -> int:
        return self.number("context_length")

    @property
    def template(self) -> str:
        return str(self.meta.get("tokenizer.chat_template", ""))

    def cell_bytes(self, value_bytes: float) -> float:
        """Bytes of the keys and values of one token in all layers."""
        heads = self.number("attention.head_count", 1)
        size = self.number("embedding_length") // max(heads, 1)
        per_head = self.number("attention.key_length", size) + self.number("attention.value_length", size)
        return self.number("block_count") * self.number("attention.head_count_kv", heads) * per_head * value_bytes


def read(path: str) -> ModelFile:
    """Raises BadModelFile and OSError."""
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        try:
            return _Reader(file, path, size).model()
        except (struct_error, UnicodeDecodeError, EOFError) as error:
            raise BadModelFile(f"{path} is damaged or incomplete: {error}") from error


class _Reader:
    def __init__(self, file: BinaryIO, path: str, size: int) -> None:
        self._file = file
        self._path = path
        self._size = size
        self._vocabulary = 0
        self._shapes: dict[str, Tensor] = {}

    def model(self) -> ModelFile:
        if self._file.read(4) != MAGIC:
            raise BadModelFile(f"{self._path} is not a GGUF file")
        version = self._u32()
        if version not in VERSIONS:
            raise BadModelFile(f"{self._path} is GGUF version {version}; {VERSIONS[0]} and {VERSIONS[1]} are known")
        tensors, entries = self._u64(), self._u64()
        if tensors > MAX_TENSORS or entries > MAX_ENTRIES:
            raise BadModelFile(f"{self._path} is damaged: {tensors} tensors, {entries} entries")
        meta: dict[str, MetaValue] = {}
        kinds: dict[str, int] = {}
        for _ in range(entries):
            key = self._string(MAX_KEY_BYTES)
            kinds[key] = self._u32()
            meta[key] = self._value(kinds[key], 0)
        sizes = self._tensors(tensors, meta)
        return ModelFile(self._path, self._size, meta, tensors, sizes, self._vocabulary, self._shapes, kinds)

    def _tensors(self, count: int, meta: dict[str, MetaValue]) -> tuple[tuple[str, int], ...]:
        """The name and the size of each."""
        end = 0
        places: list[tuple[int, str]] = []
        for _ in range(count):
            name = self._string(MAX_KEY_BYTES)
            dimensions = self._u32()
            if dimensions > 8:
                raise BadModelFile(f"{self._path} is damaged: a tensor of {dimensions} dimensions")
            shape = tuple(self._u64() for _ in range(dimensions))
            values = math.prod(shape)
            if name == "token_embd.weight" and dimensions:
                self._vocabulary = shape[-1]
            kind, offset = self._u32(), self._u64()
            self._shapes[name] = Tensor(shape, kind)
            block, size = _BLOCKS.get(kind, (1, 0))
            end = max(end, offset + values // block * size)
            places.append((offset, name))
        alignment = meta.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise BadModelFile(f"{self._path} is damaged: alignment {alignment!r}")
        start = -(-self._file.tell() // alignment) * alignment
        if count and start + end > self._size:
            raise BadModelFile(f"{self._path} is cut off: {self._size} bytes of at least {start + end}")
        places.sort()
        ends = [*(offset for offset, _ in places[1:]), max(self._size - start, 0)]
        # Without tensors there is one end and no place.
        return tuple((name, after - offset) for (offset, name), after in zip(places, ends, strict=False))

    def _value(self, kind: int, depth: int) -> MetaValue:
        if kind in _STRUCTS:
            return self._unpack(_STRUCTS[kind])
        if kind == STRING:
            return self._string(self._size)
        if kind != _ARRAY or depth > 2:
            raise BadModelFile(f"{self._path} is damaged: a value of kind {kind}")
        inner, count = self._u32(), self._u64()
        self._in_file(count)
        if inner in _STRUCTS and count > ARRAY_VALUES:
            self._skip(count * _STRUCTS[inner].size)
            return []
        if inner == STRING and count > ARRAY_VALUES:
            return self._first_strings(count)
        values = []
        for number in range(count):
            value = self._value(inner, depth + 1)
            if number < ARRAY_VALUES:
                values.append(value)
        return values

    def _string(self, limit: int) -> str:
        length = self._u64()
        if length > limit:
            raise BadModelFile(f"{self._path} is damaged: a text of {length} bytes")
        self._in_file(length)
        return self._bytes(length).decode(errors="replace")

    def _first_strings(self, count: int) -> list[MetaValue]:
        """Those that are read of a vocabulary. It has 100,000 strings or more: each costs start-up time."""
        values: list[MetaValue] = [self._string(self._size) for _ in range(ARRAY_VALUES)]
        left = self._size - self._file.tell()
        read, unpack, head = self._file.read, _U64.unpack, _U64.size
        for _ in range(count - ARRAY_VALUES):
            (length,) = unpack(read(head))
            left -= head + length
            if left < 0:
                raise BadModelFile(f"{self._path} is damaged: something of length {length} does not fit into the file")
            read(length)
        return values

    def _in_file(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise BadModelFile(f"{self._path} is damaged: something of length {count} does not fit into the file")

    def _skip(self, count: int) -> None:
        self._in_file(count)
        self._file.seek(count, os.SEEK_CUR)

    def _bytes(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError("unexpected end of file")
        return data

    def _unpack(self, form: Struct) -> bool | int | float:
        value: bool | int | float = form.unpack(self._bytes(form.size))[0]
        return value

    def _u32(self) -> int:
        return int(self._unpack(_U32))

    def _u64(self) -> int:
        return int(self._unpack(_U64))
