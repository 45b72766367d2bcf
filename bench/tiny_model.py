"""A llama of half a megabyte with random weights, and a thousand ways in which its file can be wrong.

It answers nonsense, as fast as can be, and llama.cpp loads it like any other model. `whole` is the file; `mutant`
is the same with something wrong in its header, its metadata, its tensor table or its weights, or with a part of it
missing: what it is follows from a seed.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from functools import cache
from typing import Any

VOCABULARY, WIDTH, LAYERS, HEADS, HEADS_KV, INNER = 300, 64, 2, 4, 2, 128
CONTEXT = 512
ALIGNMENT = 32
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
#: Value kinds of the format, as far as they are written here.
U32, I32, F32, STRING, ARRAY, U64 = 4, 5, 6, 8, 9, 10
_FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
#: What a number may be wrongly.
EXTREMES = (0, 1, 2, 3, 7, 63, 255, 65_536, 2**31 - 1, 2**31, 2**32 - 1)


@dataclass(slots=True)
class Entry:
    """One key of the metadata. For an array `kind` is that of its values."""

    key: bytes
    kind: int
    value: Any

    def encode(self) -> bytes:
        head = _text(self.key)
        if isinstance(self.value, list):
            values = b"".join(_scalar(self.kind, value) for value in self.value)
            return head + struct.pack("<IIQ", ARRAY, self.kind, len(self.value)) + values
        return head + struct.pack("<I", self.kind) + _scalar(self.kind, self.value)


@dataclass(slots=True)
class Tensor:
    name: bytes
    dims: list[int]
    kind: int
    offset: int

    def encode(self) -> bytes:
        head = _text(self.name) + struct.pack("<I", len(self.dims))
        return head + struct.pack(f"<{len(self.dims)}QIQ", *self.dims, self.kind, self.offset)


@dataclass(slots=True)
class File:
    entries: list[Entry]
    tensors: list[Tensor]
    data: bytearray
    magic: bytes = b"GGUF"
    version: int = 3
    #: Counts in the header that are not true.
    claimed: dict[str, int] = field(default_factory=dict)

    def encode(self) -> bytes:
        counts = self.claimed.get("tensors", len(self.tensors)), self.claimed.get("entries", len(self.entries))
        head = self.magic + struct.pack("<IQQ", self.version, *counts)
        head += b"".join(entry.encode() for entry in self.entries) + b"".join(each.encode() for each in self.tensors)
        return head + bytes(-len(head) % ALIGNMENT) + bytes(self.data)

    def entry(self, key: str) -> Entry:
        return next(entry for entry in self.entries if entry.key == key.encode())


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _scalar(kind: int, value: Any) -> bytes:
    return _text(value) if kind == STRING else struct.pack(_FORMS[kind], value)


def build(template: str = TEMPLATE) -> File:
    pieces = [b"<unk>", b"<s>", b"</s>", *[b"<0x%02X>" % byte for byte in range(256)]]
    pieces += [b"\xe2\x96\x81w%d" % number for number in range(VOCABULARY - len(pieces))]
    kinds = [2, 3, 3, *[6] * 256]
    numbers = {
        "context_length": CONTEXT, "embedding_length": WIDTH, "block_count": LAYERS, "feed_forward_length": INNER,
        "rope.dimension_count": WIDTH // HEADS, "attention.head_count": HEADS, "attention.head_count_kv": HEADS_KV,
    }  # fmt: skip
    entries = [
        Entry(b"general.architecture", STRING, b"llama"),
        Entry(b"general.file_type", U32, 0),
        *[Entry(f"llama.{key}".encode(), U32, value) for key, value in numbers.items()],
        Entry(b"llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        Entry(b"tokenizer.ggml.model", STRING, b"llama"),
        Entry(b"tokenizer.ggml.tokens", STRING, pieces),
        Entry(b"tokenizer.ggml.scores", F32, [-float(number) for number in range(VOCABULARY)]),
        Entry(b"tokenizer.ggml.token_type", I32, kinds + [1] * (VOCABULARY - len(kinds))),
        Entry(b"tokenizer.ggml.bos_token_id", U32, 1),
        Entry(b"tokenizer.ggml.eos_token_id", U32, 2),
        Entry(b"tokenizer.ggml.unknown_token_id", U32, 0),
        Entry(b"tokenizer.chat_template", STRING, template.encode()),
    ]
    tensors, at = [], 0
    for name, dims in _shapes().items():
        tensors.append(Tensor(name.encode(), dims, 0, at))
        at += -(-4 * _count(dims) // ALIGNMENT) * ALIGNMENT
    return File(entries, tensors, bytearray(_data()))


@cache
def _data() -> bytes:
    chance, data = random.Random(1), bytearray()
    for name, dims in _shapes().items():
        norm, count = "norm" in name, _count(dims)
        data += struct.pack(f"<{count}f", *[1.0 if norm else chance.gauss(0, 0.2) for _ in range(count)])
        data += bytes(-len(data) % ALIGNMENT)
    return bytes(data)


def _count(dims: list[int]) -> int:
    return dims[0] * (dims[1] if len(dims) > 1 else 1)


def _shapes() -> dict[str, list[int]]:
    key_value = WIDTH // HEADS * HEADS_KV
    layer = {
        "attn_norm": [WIDTH], "attn_q": [WIDTH, WIDTH], "attn_k": [WIDTH, key_value], "attn_v": [WIDTH, key_value],
        "attn_output": [WIDTH, WIDTH], "ffn_norm": [WIDTH], "ffn_gate": [WIDTH, INNER], "ffn_down": [INNER, WIDTH],
        "ffn_up": [WIDTH, INNER],
    }  # fmt: skip
    layers = {f"blk.{number}.{name}.weight": dims for number in range(LAYERS) for name, dims in layer.items()}
    ends = {"output_norm.weight": [WIDTH], "output.weight": [WIDTH, VOCABULARY]}
    return {"token_embd.weight": [WIDTH, VOCABULARY], **layers, **ends}


def whole(template: str = TEMPLATE) -> bytes:
    return build(template).encode()


# --- damage -------------------------------------------------------------------------------------------------


def mutant(seed: int) -> tuple[str, bytes]:
    """What was done to it, and the file."""
    chance, file = random.Random(seed), build()
    places = (_header, _metadata, _metadata, _tensor, _weights)
    what = places[seed % 6](file, chance) if seed % 6 < len(places) else ""
    content = file.encode()
    return (what, content) if what else _bytes(content, len(content) - len(file.data), chance)


def _header(file: File, chance: random.Random) -> str:
    kind = chance.choice(("magic", "version", "tensors", "entries"))
    match kind:
        case "magic":
            file.magic = chance.choice((b"GGML", b"FUGG", b"\0\0\0\0", b"gguf"))
            return f"magic {file.magic!r}"
        case "version":
            file.version = chance.choice((0, 1, 2, 4, 99, 2**31, 3 << 24))
            return f"version {file.version}"
        case _:
            true = len(file.tensors if kind == "tensors" else file.entries)
            file.claimed[kind] = chance.choice((0, 1, true - 1, true + 1, 65_535, 2**31, 2**62, 2**64 - 1))
            return f"{file.claimed[kind]} {kind} claimed, {true} present"


def _metadata(file: File, chance: random.Random) -> str:
    entry = chance.choice(file.entries)
    name = entry.key.decode()
    match chance.choice(("value", "value", "value", "gone", "twice", "renamed", "kind")):
        case "gone":
            file.entries.remove(entry)
            return f"no {name}"
        case "twice":
            file.entries.append(Entry(entry.key, U32, 7))
            return f"{name} twice"
        case "renamed":
            entry.key = chance.choice((b"", b"\xff\xfe", b"a" * 70_000, entry.key + b"\0", entry.key[:-1]))
            return f"{name} is called {entry.key[:20]!r}"
        case "kind":
            entry.kind, entry.value = chance.choice(
                ((U64, 2**63), (I32, -1), (F32, float("nan")), (STRING, b"\xff" * 9), (U32, [1] * 100), (STRING, []))
            )
            return f"{name} is of kind {entry.kind}: {str(entry.value)[:20]}"
        case _:
            return f"{name} is {_worse(entry, chance)}"


def _worse(entry: Entry, chance: random.Random) -> str:
    """Another value of the same kind."""
    if isinstance(entry.value, list):
        match chance.choice(("shorter", "longer", "shuffled", "same", "odd")):
            case "shorter":
                entry.value = entry.value[: chance.randrange(len(entry.value))]
            case "longer":
                entry.value = entry.value * chance.choice((2, 50))
            case "shuffled":
                chance.shuffle(entry.value)
            case "same":
                entry.value = [entry.value[-1]] * len(entry.value)
            case _:
                odd: dict[int, Any] = {STRING: b"\xff\0" * 9, F32: float("inf")}
                entry.value[chance.randrange(len(entry.value))] = odd.get(entry.kind, 2**31 - 1)
        return f"{len(entry.value)} values, changed"
    match entry.kind:
        case 8:
            entry.value = chance.choice((b"", b"\xff" * 64, b"bert", b"gpt2", b"x" * 100_000, b"{% for %}", b"mamba"))
        case 6:
            entry.value = chance.choice((0.0, -1.0, float("nan"), float("inf"), 1e38))
        case _:
            entry.value = chance.choice(EXTREMES)
    return str(entry.value)[:30]


def _tensor(file: File, chance: random.Random) -> str:
    tensor = chance.choice(file.tensors)
    name = tensor.name.decode()
    match chance.choice(("dims", "dims", "many dims", "kind", "offset", "offset", "gone", "twice", "name")):
        case "dims":
            tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice((*EXTREMES, 2**40, 2**63, 2**64 - 1))
        case "many dims":
            tensor.dims = [chance.choice((1, 64, 2**32))] * chance.choice((0, 3, 4, 5, 9, 1000))
        case "kind":
            tensor.kind = chance.choice((*range(1, 40), 255, 2**31, 2**32 - 1))
        case "offset":
            tensor.offset = chance.choice((1, 16, 32, len(file.data) - 32, len(file.data), 2**40, 2**63, 2**64 - 32))
        case "gone":
            file.tensors.remove(tensor)
            return f"no tensor {name}"
        case "twice":
            file.tensors.append(tensor)
            return f"tensor {name} twice"
        case _:
            tensor.name = chance.choice((b"", b"x" * 64, b"y" * 5000, b"\xff\xff", file.tensors[0].name))
            return f"tensor {name} is called {tensor.name[:20]!r}"
    return f"tensor {name}: {tensor.dims[:4]}, kind {tensor.kind}, at {tensor.offset}"


def _weights(file: File, chance: random.Random) -> str:
    tensor = chance.choice(file.tensors)
    value = chance.choice((float("nan"), float("inf"), -float("inf"), 0.0, 3e38))
    count = _count(tensor.dims)
    struct.pack_into(f"<{count}f", file.data, tensor.offset, *[value] * count)
    return f"tensor {tensor.name.decode()} is all {value}"


def _bytes(content: bytes, head: int, chance: random.Random) -> tuple[str, bytes]:
    """Damage that knows nothing of the format."""
    changed = bytearray(content)
    match chance.choice(("cut", "cut", "flipped", "flipped", "overwritten", "appended")):
        case "cut":
            size = chance.choice((chance.randrange(head), chance.randrange(len(content)), len(content) - 1))
            return f"cut after {size} bytes", content[:size]
        case "flipped":
            places = [chance.randrange(4, head) for _ in range(chance.choice((1, 3, 20)))]
            for at in places:
                changed[at] ^= 1 << chance.randrange(8)
            return f"bits flipped at {places[:3]}", bytes(changed)
        case "overwritten":
            at, size = chance.randrange(head), chance.choice((1, 8, 200))
            changed[at : at + size] = chance.randbytes(size)
            return f"{size} bytes overwritten at {at}", bytes(changed)
        case _:
            return "junk at its end", content + chance.randbytes(4096)
