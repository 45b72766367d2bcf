"""BERT for tests: files of it, also with random weights, and what it computes, in numpy.

    small = bert.random_weights(1)
    path.write_bytes(bert.file_of(small, bert.TINY, pooling=1))     # 1: mean, 2: cls, 4: rank
    bert.pooled(bert.forward(small, bert.TINY, ids), "mean")

Weights have the names of llama.cpp. `forward` is the original model, with the exact GELU; it is checked against vectors
of sentence-transformers by `tests/models/minilm.py`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.tiny_model import ALIGNMENT, F32, I32, STRING, U32, Entry, File, Tensor

Array = NDArray[np.float32]
Weights = dict[str, Array]
BOOL = 7
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)
#: The prefix of a token that begins a word.
BEGINS = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclass(frozen=True)
class Shape:
    width: int
    layers: int
    heads: int
    inner: int
    context: int
    vocabulary: tuple[str, ...]
    epsilon: float = 1e-12
    #: Ids of PAD, UNK, CLS, SEP and MASK.
    special: tuple[int, ...] = (PAD, UNK, CLS, SEP, MASK)


_CHARS = string.ascii_lowercase + string.digits + ".,?!'-"
TINY = Shape(64, 2, 4, 128, 128, (*SPECIAL, *(BEGINS + char for char in _CHARS), *_CHARS))


def random_weights(seed: int, shape: Shape = TINY, classes: int = 0) -> Weights:
    """`classes`: with a classifier of so many."""
    chance = np.random.default_rng(seed)
    found: Weights = {}
    for name, size in _shapes(shape, classes).items():
        if name.endswith("norm.weight"):
            found[name] = np.ones(size, np.float32)
        else:
            found[name] = chance.normal(0, 0.25, size).astype(np.float32)
    return found


def _shapes(shape: Shape, classes: int) -> dict[str, tuple[int, ...]]:
    width, inner = shape.width, shape.inner
    sizes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(shape.vocabulary), width), "position_embd.weight": (shape.context, width),
        "token_types.weight": (2, width), "token_embd_norm.weight": (width,), "token_embd_norm.bias": (width,),
    }  # fmt: skip
    linear = {"attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width),
              "attn_output": (width, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}  # fmt: skip
    for layer in range(shape.layers):
        for name, size in linear.items():
            sizes |= {f"blk.{layer}.{name}.weight": size, f"blk.{layer}.{name}.bias": size[:1]}
        for name in ("attn_output_norm", "layer_output_norm"):
            sizes |= {f"blk.{layer}.{name}.weight": (width,), f"blk.{layer}.{name}.bias": (width,)}
    if classes:
        sizes |= {"cls.weight": (width, width), "cls.bias": (width,),
                  "cls.output.weight": (classes, width), "cls.output.bias": (classes,)}  # fmt: skip
    return sizes


def file_of(
    weights: Weights,
    shape: Shape = TINY,
    *,
    pooling: int,
    labels: Sequence[str] = (),
    more: Mapping[str, str] | None = None,
) -> bytes:
    """A GGUF file. `more`: further entries of the metadata."""
    numbers = {
        "context_length": shape.context, "embedding_length": shape.width, "block_count": shape.layers,
        "feed_forward_length": shape.inner, "attention.head_count": shape.heads, "pooling_type": pooling,
    }  # fmt: skip
    kinds = [3 if token.startswith("[") and token.endswith("]") else 1 for token in shape.vocabulary]
    pad, unk, cls, sep, mask = shape.special
    kinds[unk] = 2
    ids = {"padding": pad, "unknown": unk, "bos": cls, "cls": cls, "seperator": sep, "mask": mask}
    entries = [
        Entry(b"general.architecture", STRING, b"bert"),
        Entry(b"general.file_type", U32, 0),
        *[Entry(f"bert.{key}".encode(), U32, value) for key, value in numbers.items()],
        Entry(b"bert.attention.layer_norm_epsilon", F32, shape.epsilon),
        Entry(b"bert.attention.causal", BOOL, 0),
        Entry(b"tokenizer.ggml.model", STRING, b"bert"),
        Entry(b"tokenizer.ggml.tokens", STRING, [token.encode() for token in shape.vocabulary]),
        Entry(b"tokenizer.ggml.token_type", I32, kinds),
        Entry(b"tokenizer.ggml.token_type_count", U32, 2),
        *[Entry(f"tokenizer.ggml.{name}_token_id".encode(), U32, id) for name, id in ids.items()],
        *[Entry(key.encode(), STRING, value.encode()) for key, value in (more or {}).items()],
    ]
    if labels:
        entries.append(Entry(b"bert.classifier.output_labels", STRING, [label.encode() for label in labels]))
    tensors, data = [], bytearray()
    for name, array in weights.items():
        tensors.append(Tensor(name.encode(), list(reversed(array.shape)), 0, len(data)))
        data += np.ascontiguousarray(array, "<f4").tobytes()
        data += bytes(-len(data) % ALIGNMENT)
    return File(entries, tensors, data).encode()


# --- what it computes -------------------------------------------------------------------------------------


def forward(weights: Weights, shape: Shape, ids: Sequence[int]) -> NDArray[np.float64]:
    """The output of the last layer, a row for each token. All tokens are of the first type, as in llama.cpp."""

    def linear(rows: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return rows @ weights[f"{name}.weight"].T.astype(np.float64) + weights[f"{name}.bias"]

    def norm(rows: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        rows = rows - rows.mean(axis=-1, keepdims=True)
        rows = rows / np.sqrt((rows**2).mean(axis=-1, keepdims=True) + shape.epsilon)
        return rows * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    count, size = len(ids), shape.width // shape.heads
    start = weights["token_embd.weight"][list(ids)].astype(np.float64)
    rows = norm(start + weights["position_embd.weight"][:count] + weights["token_types.weight"][0], "token_embd_norm")
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        query, key, value = (
            linear(rows, f"{block}attn_{name}").reshape(count, shape.heads, size).transpose(1, 0, 2) for name in "qkv"
        )
        seen = query @ key.transpose(0, 2, 1) / math.sqrt(size)
        seen = np.exp(seen - seen.max(axis=-1, keepdims=True))
        seen /= seen.sum(axis=-1, keepdims=True)
        mixed = (seen @ value).transpose(1, 0, 2).reshape(count, shape.width)
        rows = norm(rows + linear(mixed, f"{block}attn_output"), f"{block}attn_output_norm")
        rows = norm(
            rows + linear(_gelu(linear(rows, f"{block}ffn_up")), f"{block}ffn_down"), f"{block}layer_output_norm"
        )
    return rows


def pooled(rows: NDArray[np.float64], pooling: str) -> NDArray[np.float64]:
    """Of the length 1."""
    vector: NDArray[np.float64] = {"mean": rows.mean(axis=0), "cls": rows[0], "last": rows[-1]}[pooling]
    return vector / np.sqrt(vector @ vector)


def classified(weights: Weights, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    hidden = np.tanh(rows[0] @ weights["cls.weight"].T + weights["cls.bias"])
    found: NDArray[np.float64] = hidden @ weights["cls.output.weight"].T + weights["cls.output.bias"]
    return found


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _gelu(values: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = values * 0.5 * (1 + _erf(values / math.sqrt(2)))
    return found


def ids_of(text: str, shape: Shape = TINY) -> list[int]:
    """Of lower-case words and punctuation, as WordPiece reads them; without CLS and SEP."""
    place = {token: id for id, token in enumerate(shape.vocabulary)}
    found: list[int] = []
    for word in _words(text):
        rest, pieces = BEGINS + word, []
        while rest:
            longest = next((rest[:end] for end in range(len(rest), 0, -1) if rest[:end] in place), "")
            if not longest:
                pieces = [shape.special[1]]
                break
            pieces.append(place[longest])
            rest = rest[len(longest) :]
        found += pieces
    return found


def _words(text: str) -> list[str]:
    spaced = "".join(f" {char} " if char in string.punctuation else char for char in text.lower())
    return spaced.split()


def framed(*texts: Sequence[int], shape: Shape = TINY) -> list[int]:
    """CLS text SEP text SEP."""
    _, _, cls, sep, _ = shape.special
    return [cls, *[id for text in texts for id in (*text, sep)]]
