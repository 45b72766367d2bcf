"""The fake engine's model: tokens, their text, log probabilities and results of tasks. Pure functions.

    plain    token i = hash(seed, prompt, i): a disturbed answer can be compared with the only right one
    wander   token i = hash(dispatch, prompt, token i-1): a token of a stale dispatch, or a continuation that ignored
             the tokens before it, does not follow from its predecessor and is detected

A token id is 29 bits of hash and 2 bits of role. Role 0 is a word. Roles 1, 2, 3 follow each other and split one
character of four bytes: its first byte, the two in the middle, the last one. Every last byte is legal after
every beginning, so the text is valid UTF-8 exactly when no token is missing, doubled or out of place. Only an
answer that ends at `max_tokens` may stop inside a character, as with a real model.

Results of tasks can be computed again by a test, byte for byte. The tokenizer has one token for each byte. An embedding
is a hash of its text; with `wander` also of the dispatch, so that a result put together from two dispatches is
detected. The score of a document is the share of the query's words in it, and a little of a hash.
"""

from __future__ import annotations

import math
from array import array
from hashlib import blake2b, shake_128

from llambo.mesh.wire import limits, tasks
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.tokens import UNDECODABLE, Logprob, TopToken
from llambo.worker.config import FakeOptions
from llambo.worker.engine.protocol import (
    GOLDEN,
    MASK_64,
    Start,
    TaskRefused,
    TaskResult,
    decode_ids,
    decode_rerank,
    decode_texts,
    mix,
    result_pieces,
    unreadable,
)

#: The "previous token" of the first token.
START = -1
#: Roles of a token: a word, or a part of a split character.
WORD, OPENS, MIDDLE, CLOSES = 0, 1, 2, 3
#: Roles by position when `plain` splits characters.
_PLAIN_ROLES = (WORD, WORD, OPENS, MIDDLE, CLOSES, WORD, WORD, WORD)
#: `wander` knows only the previous token: it starts a split character after one word in this many.
_WANDER_OPENS = 5


def _mix(value: int) -> int:
    """splitmix64."""
    return mix((value + GOLDEN) & MASK_64)


def base_of(key: bytes, prompt: bytes) -> int:
    """What the hashes of one sequence have in common, so that a long prompt is hashed once."""
    return int.from_bytes(blake2b(prompt, digest_size=8, key=key).digest(), "big")


def plain_base(seed: int, prompt: bytes) -> int:
    return base_of(seed.to_bytes(8, "big"), prompt)


def adapter_digest(path: str) -> str:
    """Of an adapter that is not read. As long as a sha256 in hexadecimal."""
    return blake2b(path.encode(), digest_size=32).hexdigest()


def adapted(prompt: bytes, path: str) -> bytes:
    """An adapter changes the words as another prompt would."""
    return prompt + adapter_digest(path).encode()


def plain_next(base: int, index: int, utf8_split: bool = False) -> int:
    return _mix(base + index) >> 35 << 2 | (_PLAIN_ROLES[index & 7] if utf8_split else WORD)


def wander_next(base: int, previous: int, utf8_split: bool = False) -> int:
    value = _mix(base ^ ((previous + 2) * 0xD1342543DE82EF95 & MASK_64))
    role = WORD
    if utf8_split and previous != START:
        before = previous & 3
        role = (before + 1) & 3 if before else (OPENS if value % _WANDER_OPENS == 0 else WORD)
    return value >> 35 << 2 | role


def plain_token(seed: int, prompt: bytes, index: int, utf8_split: bool = False) -> int:
    """Token `index` of the only right answer to this prompt with this seed."""
    return plain_next(plain_base(seed, prompt), index, utf8_split)


def wander_token(dispatch: bytes, prompt: bytes, previous: int, utf8_split: bool = False) -> int:
    """The token of this dispatch after `previous` (START: at the beginning)."""
    return wander_next(base_of(dispatch, prompt), previous, utf8_split)


def decide(base: int, index: int, choices: int) -> int:
    """A number below `choices` for a purpose other than a token: chunk sizes, jitter, length."""
    return _mix(~(base + index) & MASK_64) % choices


def bits(base: int, text: bytes, count: int) -> bytes:
    """`count` bytes that depend on both."""
    return shake_128(text + base.to_bytes(8, "big")).digest(count)


def answer_length(seed: int, prompt: bytes, mean: int) -> int:
    """Tokens until an answer ends by itself: 1 to 2 * mean - 1."""
    return 1 + decide(plain_base(seed, prompt), 0, 2 * mean - 1)


def logprob_of(token_id: int, index: int, count: int) -> Logprob:
    """Depends on the token and its index alone, not on the engine."""
    likeliest = [_mix(~token_id ^ (index << 8) ^ rank) >> 35 << 2 for rank in range(count)]
    top = [TopToken(other, piece_of(other), -(rank + decide(other, index, 1000) / 1000)) for rank, other in
           enumerate(likeliest)]  # fmt: skip
    return Logprob(-decide(token_id, index, 9_000_001) / 1_000_000, top)


def _pieces() -> list[bytes]:
    syllables = [a + b for a in "bdfghklmnprstvwz" for b in "aeio"]
    table: list[bytes] = []
    for number in range(4096):
        word = f" {syllables[number >> 6]}{syllables[number & 63]}".encode()
        table += (word, b" \xf0", b"\x9f\x98", bytes([0x80 + (number & 63)]))
    return table


_PIECES = _pieces()


def piece_of(token_id: int) -> bytes:
    """The bytes a token adds to the text."""
    return _PIECES[token_id & 0x3FFF]


def pieces_of(ids: list[int]) -> list[bytes]:
    table = _PIECES
    return [table[token_id & 0x3FFF] for token_id in ids]


#: The bytes of a hash as numbers from -1 to 1.
_NUMBERS = [(byte - 127.5) / 127.5 for byte in range(256)]
BYTE_TOKENS = 256


def result_of(start: Start, options: FakeOptions, model: str) -> list[bytes]:
    """The pieces of the result. Raises TaskRefused."""
    try:
        return result_pieces(start, _result(start, options, model))
    except UNDECODABLE as error:
        raise unreadable(start, error) from error


def _result(start: Start, options: FakeOptions, model: str) -> TaskResult:
    match start.task:
        case "tokenize":
            return tasks.TokenizeResult(
                list(start.prompt), [start.prompt[at : at + 1] for at in range(len(start.prompt))]
            )
        case "detokenize":
            return tasks.DetokenizeResult(b"".join(map(_piece, decode_ids(start.prompt))))
        case "embed":
            return embeddings(start.key[-limits.DISPATCH_ID_BYTES :], start, options)
        case "rerank":
            return ranking(start.key[-limits.DISPATCH_ID_BYTES :], start, options)
        case _:
            return {
                "model": model, "kind": options.kind, "engine": "fake", "style": options.style,
                "context_tokens": options.context_tokens,
            }  # fmt: skip


def _piece(id: int) -> bytes:
    return bytes([id]) if id < BYTE_TOKENS else piece_of(id)


def _count(what: str, text: str, options: FakeOptions) -> int:
    tokens, limit = len(text.encode()), options.context_tokens
    if limit and tokens > limit:
        raise TaskRefused(Code.TOO_LONG, f"{what} has {tokens} tokens, the context has {limit}")
    return tokens


def ranking(dispatch: bytes, start: Start, options: FakeOptions) -> tasks.RerankResult:
    base = base_of(dispatch, b"rerank") if options.style == "wander" else 0
    given = decode_rerank(start.prompt)
    words = set(given.query.lower().split())
    scores, counts = [], []
    for number, document in enumerate(given.documents):
        counts.append(_count(f"document {number} with the query", given.query + document, options))
        share = len(words & set(document.lower().split())) / max(len(words), 1)
        (byte,) = bits(base, document.encode(), 1)
        score = 0.05 + 0.85 * share + 0.05 * byte / 255
        scores.append(math.log(score / (1 - score)) if start.options.raw else score)
    return tasks.RerankResult(scores, counts)


def embeddings(dispatch: bytes, start: Start, options: FakeOptions) -> tasks.EmbedResult:
    base = base_of(dispatch, b"embed") if options.style == "wander" else 0
    numbers, counts = array("f"), []
    for number, text in enumerate(decode_texts(start.prompt)):
        counts.append(_count(f"input {number}", text, options))
        vector = [_NUMBERS[byte] for byte in bits(base, text.encode(), options.embedding_size)]
        length = math.hypot(*vector) if start.options.normalized else 1.0
        numbers.extend([value / length for value in vector])
    return tasks.EmbedResult(
        options.embedding_size,
        start.options.pooling or "mean",
        start.options.normalized,
        counts,
        tasks.data_of(numbers),
    )
