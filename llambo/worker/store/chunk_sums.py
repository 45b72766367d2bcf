"""The sha256 of each chunk of a file, which hosts compare before they write what another one has sent.

While a file is downloaded they are in its journal (`part_file`). A host that gives files to others stores them beside
our downloads, by the sha256 of the file; those of a file that was there before are computed once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from llambo.worker.store import caches

CHUNK_BYTES = 4 * 1024 * 1024
_SUM_BYTES = 32


def journal(part: Path) -> Path:
    return part.with_name(f"{part.name}.sums")


def of_part(part: Path) -> list[bytes]:
    """Of the chunks that are written; none if there is no such file."""
    try:
        _, *lines = journal(part).read_bytes().splitlines(keepends=True) or [b""]
        return [bytes.fromhex(line.decode()) for line in lines if line.endswith(b"\n")]
    except (FileNotFoundError, ValueError):
        return []


def of_file(path: Path, sha256: str) -> list[bytes]:
    """Of a whole file; none if it is another one than its name says."""
    count = -(-path.stat().st_size // CHUNK_BYTES)
    with contextlib.suppress(OSError):
        stored = _path(sha256).read_bytes()
        if len(stored) == count * _SUM_BYTES:
            return [stored[at : at + _SUM_BYTES] for at in range(0, len(stored), _SUM_BYTES)]
    whole, sums = hashlib.sha256(), []
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            whole.update(chunk)
            sums.append(hashlib.sha256(chunk).digest())
    if whole.hexdigest() != sha256:
        return []
    keep(sha256, sums)
    return sums


def digest(path: Path) -> str:
    """The sha256 of a whole file, which nothing names."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep(sha256: str, sums: list[bytes]) -> None:
    """If they cannot be stored they are computed again."""
    path = _path(sha256)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(b"".join(sums))
        new.replace(path)


def forget(blob: Path) -> None:
    """A file that was removed, and whose name has its sha256."""
    with contextlib.suppress(OSError):
        _path(blob.name.removeprefix("sha256-")).unlink()


def _path(sha256: str) -> Path:
    return caches.own_folder() / ".sums" / sha256
