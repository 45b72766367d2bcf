"""Messages that are almost right: made from good ones, with knowledge of their structure.

    values    a good msgpack value, with some of its parts exchanged for others, left out, doubled or renamed
    bytes     a good frame with some of its bytes changed, added, left out or repeated
    frames    a good message with a frame too few, too many, twice, or another one's

Everything follows from the seed of the `random.Random` it is given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

#: Where lengths, signs and limits change, and what is no number at all.
NUMBERS: list[Any] = [
    0, 1, 2, 127, 128, 255, 256, 4095, 4096, 4097, 65_535, 65_536, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32, 2**53,
    2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -128, -(2**31), -(2**63), 0.0, -0.0, 0.5, 1e308, 5e-324,
    float("inf"), float("-inf"), float("nan"),
]  # fmt: skip
#: Lone surrogates become bad UTF-8 on the wire.
TEXTS: list[Any] = [
    "", "x", "type", "\0", "é", "\ud800", "a\udfffb", "\U0010ffff", "x" * 31, "x" * 32, "x" * 128, "x" * 129, "x" * 256,
    "x" * 257, "x" * 65_536, "\n\x1b[2J", "../../etc/passwd", "%s%n", "{0}", "sha256:1", "fake", "generate", "embed",
]  # fmt: skip
BYTES: list[Any] = [b"", b"\0", bytes(7), bytes(8), bytes(9), bytes(15), bytes(16), bytes(17), bytes(24), bytes(25)]
OTHERS: list[Any] = [
    None, True, False, [], {}, [[]], [None] * 300, {"type": "goodbye"}, {0: 0}, {b"x": [1]}, {"": ""}, list(range(300)),
    msgpack.ExtType(5, b"12345"), msgpack.Timestamp(2**33, 7), [[[[[[[[1]]]]]]]],
]  # fmt: skip
KEYS: list[Any] = [*TEXTS, *BYTES, 0, 1, 2**64 - 1, -1, 0.5, None, True]
#: msgpack's headers of maps, arrays, text, bytes, nil and the byte that means nothing.
HEADERS = b"\x80\x8f\x90\x9f\xa0\xbf\xc0\xc1\xc2\xc4\xc5\xc6\xc7\xca\xcb\xcf\xd3\xd6\xd9\xda\xdb\xdc\xdd\xde\xdf\xff"
#: How deep a value is nested to exhaust a stack.
TOWER = 2_000
#: At most so many bytes are inserted or repeated at once.
SPLICE_BYTES = 64


def pack(value: Any) -> bytes:
    """What no message may hold is packed as well as it can be."""
    return bytes(msgpack.packb(value, use_bin_type=True, unicode_errors="surrogatepass"))


def unpack(data: bytes) -> Any:
    """A good message as a value that can be changed."""
    return msgpack.unpackb(data, strict_map_key=False)


class Mutator:
    """`pool`: values that the receiver knows, such as live ids."""

    def __init__(self, chance: random.Random, pool: Sequence[Any] = ()) -> None:
        self.chance = chance
        self.pool: list[Any] = list(pool)

    # --- values ----------------------------------------------------------------------------------------

    def value(self, original: Any, changes: int | None = None) -> Any:
        """A copy with one to three parts that are otherwise."""
        for _ in range(changes or 1 + self.chance.randrange(3)):
            original = self._changed(original)
        return original

    def _changed(self, value: Any) -> Any:
        """Mostly something inside, now and then the whole."""
        chance = self.chance
        if isinstance(value, dict) and value and chance.random() < 0.95:
            return self._changed_map(dict(value))
        if isinstance(value, list) and value and chance.random() < 0.9:
            return self._changed_list(list(value))
        return self._other(value)

    def _changed_map(self, changed: dict[Any, Any]) -> dict[Any, Any]:
        keys = list(changed)
        key = keys[self.chance.randrange(len(keys))]
        what = self.chance.random()
        if what < 0.75:
            changed[key] = self._changed(changed[key])
        elif what < 0.85:
            del changed[key]
        elif what < 0.92:
            changed[keys[self.chance.randrange(len(keys))]] = changed[key]
        else:
            changed[self.chance.choice(KEYS)] = changed.pop(key)
        return changed

    def _changed_list(self, changed: list[Any]) -> list[Any]:
        at = self.chance.randrange(len(changed))
        what = self.chance.random()
        if what < 0.75:
            changed[at] = self._changed(changed[at])
        elif what < 0.85:
            del changed[at]
        elif what < 0.95:
            changed.insert(at, changed[at])
        else:
            changed[at:at] = [changed[at]] * self.chance.choice((2, 16, 300))
        return changed

    def _other(self, value: Any) -> Any:
        """Something else: half of the time of the same kind, where only a limit makes it bad."""
        chance = self.chance
        if chance.random() < 0.5:
            return self.any_value()
        match value:
            case bool():
                return not value
            case int():
                near = chance.choice((value + 1, value - 1, -value, value * 2))
                return near if -(2**63) <= near < 2**64 else chance.choice(NUMBERS)
            case float():
                return chance.choice((-value, value * 1e300, chance.choice(NUMBERS)))
            case str():
                return chance.choice((value + value, value[:-1], value + "\ud800", chance.choice(TEXTS)))
            case bytes():
                return chance.choice((value + b"\0", value[:-1], self.mangled(value), chance.choice(BYTES)))
        return self.any_value()

    def any_value(self) -> Any:
        chance = self.chance
        what = chance.random()
        if self.pool and what < 0.35:
            return chance.choice(self.pool)
        if what < 0.6:
            return chance.choice(NUMBERS)
        if what < 0.75:
            return chance.choice(TEXTS)
        if what < 0.85:
            return chance.choice(BYTES)
        return chance.choice(OTHERS)

    # --- bytes -----------------------------------------------------------------------------------------

    def mangled(self, frame: bytes) -> bytes:
        """One to four small changes."""
        chance = self.chance
        changed = bytearray(frame)
        for _ in range(1 + chance.randrange(4)):
            self._change(changed, chance.randrange(len(changed) + 1), chance.randrange(12))
        return bytes(changed)

    def _change(self, changed: bytearray, at: int, what: int) -> None:
        chance = self.chance
        if what < 3:
            changed[at : at + 1] = chance.randbytes(1)
        elif what < 6:
            changed[at : at + 1] = bytes([chance.choice(HEADERS)])
        elif what == 6:
            if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
        elif what == 7:
            changed[at:at] = chance.randbytes(1 + chance.randrange(9))
        elif what == 8:
            del changed[at : at + 1 + chance.randrange(9)]
        elif what == 9:
            changed[at:at] = changed[at : at + chance.randrange(SPLICE_BYTES)]
        elif what == 10:
            end = at + chance.randrange(SPLICE_BYTES)
            other = chance.randrange(len(changed) + 1)
            changed[at:end] = changed[other : other + end - at]
        else:
            del changed[at:]

    # --- frames ----------------------------------------------------------------------------------------

    def frames(self, original: Sequence[bytes], body: Callable[[], bytes], others: Sequence[bytes]) -> list[bytes]:
        """Mostly the body (frame 1) is changed, where the schema is; now and then the rest. `others`: other frames."""
        chance = self.chance
        frames = list(original)
        what = chance.randrange(40)
        if what < 24:
            frames[1] = body()
        elif what < 34:
            frames[1] = self.mangled(frames[1])
        elif what == 34:
            at = chance.randrange(len(frames))
            frames[at] = self.mangled(frames[at])
        elif what == 35:
            del frames[chance.randrange(len(frames))]
        elif what == 36:
            frames.insert(chance.randrange(len(frames) + 1), chance.choice(frames))
        elif what == 37:
            frames[chance.randrange(len(frames))] = chance.choice(others)
        elif what == 38:
            frames[-1] = chance.choice(others)
        else:
            frames[1] = self.tower()
        return frames

    def tower(self) -> bytes:
        """Nested as deep as it gets, or lengths that promise what does not come."""
        header = self.chance.choice(
            (b"\x91", b"\x81\xa1x", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff")
        )
        return b"\x91" * self.chance.randrange(3) + header * (1 + self.chance.randrange(TOWER))
