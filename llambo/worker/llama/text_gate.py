"""Holds back the text of an answer where needed: never half a character, never a part of a stop string is sent.

Tokens and characters do not end at the same places, and a stop string may begin in the middle of one token and end
in the middle of another. So a token may have to wait, with its id, until it is clear that its text belongs to the
answer. Ids and pieces are released together: a character whose bytes came with several tokens is in the piece of the
last of them.

A continued answer begins with tokens that were sent already. `replay` passes them through again, so that what was held
back when they were sent is held back here too.
"""

from __future__ import annotations

from collections.abc import Iterable

#: First bytes of UTF-8 characters: mask, value, and the number of bytes of the character.
_LEADS = ((0b1110_0000, 0b1100_0000, 2), (0b1111_0000, 0b1110_0000, 3), (0b1111_1000, 0b1111_0000, 4))


def incomplete_bytes(text: bytes) -> int:
    """Bytes at the end that begin an incomplete character. Invalid UTF-8 counts as complete."""
    for back in range(1, min(3, len(text)) + 1):
        byte = text[-back]
        if byte & 0b1100_0000 == 0b1000_0000:  # inside a character: look for its first byte
            continue
        for mask, lead, length in _LEADS:
            if byte & mask == lead:
                return back if back < length else 0
        return 0
    return 0


def stop_string_bytes(text: bytes, stops: list[bytes]) -> int:
    """Bytes at the end that may begin a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest


class TextGate:
    """Takes tokens and returns those that may be sent."""

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = [stop.encode() for stop in stops]
        #: The stop string that ended the answer.
        self.stop_string = ""
        #: Bytes of an incomplete character.
        self._rest = b""
        self._ids: list[int] = []
        self._pieces: list[bytes] = []

    def push(self, token: int, piece: bytes) -> tuple[list[int], list[bytes], bool]:
        """Ids and pieces that may be sent now, and whether a stop string is complete, which ends the answer."""
        text = self._rest + piece
        cut = len(text) - incomplete_bytes(text)
        self._rest = text[cut:]
        self._ids.append(token)
        self._pieces.append(text[:cut])
        if not self._stops:
            return *self.flush(), False
        held = b"".join(self._pieces)
        found = [(at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            # Of two that begin at the same place the first in the list: min() preserves the order.
            at, stop = min(found, key=lambda each: each[0])
            self.stop_string = stop.decode()
            return *self._until(at, whole=False), True
        return *self._until(len(held) - stop_string_bytes(held, self._stops), whole=True), False

    def flush(self) -> tuple[list[int], list[bytes]]:
        """All that is held back, when the answer ends or there are no stop strings. Half a character is dropped."""
        ids, pieces = self._ids, self._pieces
        self._ids, self._pieces = [], []
        return ids, pieces

    def replay(self, tokens: Iterable[tuple[int, bytes]]) -> None:
        """These tokens were sent already."""
        for token, piece in tokens:
            self.push(token, piece)
        self.flush()

    def _until(self, end: int, *, whole: bool) -> tuple[list[int], list[bytes]]:
        """The tokens before this byte. One that crosses it stays here if `whole`, otherwise its first part is sent."""
        at = count = 0
        for piece in self._pieces:
            if at + len(piece) > end:
                break
            at += len(piece)
            count += 1
        ids, pieces = self._ids[:count], self._pieces[:count]
        if not whole and at < end:
            ids.append(self._ids[count])
            pieces.append(self._pieces[count][: end - at])
        del self._ids[:count], self._pieces[:count]
        return ids, pieces
