"""Inputs that cover something of a target which no other one does: a file for each target, a line for each input.

An input is frames in a row: how many, the length of each but the last, and then all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "inputs"
#: More frames than any message has.
MOST_FRAMES = 16


def join(frames: list[bytes]) -> bytes:
    frames = frames[:MOST_FRAMES]
    lengths = b"".join(struct.pack(">H", len(frame) & 0xFFFF) for frame in frames[:-1])
    return bytes([len(frames)]) + lengths + b"".join(frames)


def split(data: bytes) -> list[bytes]:
    """Any bytes at all are some frames."""
    if not data:
        return []
    count = data[0] % (MOST_FRAMES + 1)
    at = 1 + 2 * max(0, count - 1)
    if not count or at > len(data):
        return [data[1:]]
    frames = []
    for (length,) in struct.iter_unpack(">H", data[1:at]):
        frames.append(data[at : at + length])
        at += length
    return [*frames, data[at:]]


def file_of(name: str) -> Path:
    return FOLDER / f"{name}.txt"


def read(name: str) -> list[list[bytes]]:
    file = file_of(name)
    return [split(bytes.fromhex(line)) for line in file.read_text(encoding="ascii").split()] if file.exists() else []


def write(name: str, inputs: Iterable[list[bytes]]) -> None:
    FOLDER.mkdir(exist_ok=True)
    lines = sorted({join(frames).hex() for frames in inputs if frames}, key=lambda line: (len(line), line))
    file_of(name).write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
