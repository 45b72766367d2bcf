"""A file that is being downloaded: `NAME.part` beside its place, and `NAME.part.sums`, a journal of its chunks.

Each chunk of 4 MiB is hashed when it is written, and a line with its sha256 is appended to the journal. A process that
was killed, or a machine that lost power, leaves chunks without a line, or with other bytes than the line says; these
are downloaded again. The file gets its name when it is whole and its sha256 is right, and not before.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llambo.worker.store.chunk_sums import CHUNK_BYTES, journal
from llambo.worker.store.refs import StoreError
from llambo.worker.store.web import Web, persevere

MIB = 1024 * 1024
#: What stays free on a disk.
SPARE_BYTES = 64 * MIB
GGUF = b"GGUF"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Watcher(Protocol):
    """Sees what a download does."""

    def note(self, text: str) -> None: ...
    def moved(self, size: int) -> None:
        """So many bytes more are here."""

    def verified(self, path: Path, sha256: str) -> None:
        """A file is whole, and has this checksum."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A file to download, and where it will be."""

    #: For people.
    name: str
    url: str
    size: int
    path: Path
    lock: Path
    #: Empty: unknown.
    sha256: str = ""
    #: What identifies this state of the file, where there is no checksum.
    version: str = ""
    #: Whether it has to be a model.
    is_model: bool = True

    @property
    def part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    def is_here(self) -> bool:
        return os.path.isfile(self.path) and self.path.stat().st_size == self.size

    @property
    def missing(self) -> int:
        """Bytes that are to be downloaded, if what is there is right."""
        return 0 if self.is_here() else max(0, self.size - _size(self.part))


def check_room(blobs: list[Blob], folder: Path) -> None:
    """Raises StoreError if the disk cannot hold what is missing."""
    missing = sum(each.missing for each in blobs)
    place = next(each for each in (folder, *folder.parents) if each.is_dir())
    free = shutil.disk_usage(place).free
    if missing and missing + SPARE_BYTES > free:
        text = (
            f"the disk is too small: {missing // MIB:,} MiB are to be downloaded to {folder}, and {free // MIB:,} MiB"
        )
        raise StoreError(f"{text} are free", f"`llambo rm NAME` removes a model; {_ELSEWHERE}")


_ELSEWHERE = "HF_HUB_CACHE, OLLAMA_MODELS or XDG_CACHE_HOME name another folder for models"


class WrongBytes(StoreError):
    """The whole file has not the sha256 that it should have. It was discarded."""


def fetch(blob: Blob, bring: Callable[[PartFile], None], watcher: Watcher) -> None:
    """Get it, unless it is here. Another process that does so is waited for; if it ends, this one goes on.

    `bring` writes what is missing of the part.
    """
    if _is_done(blob, watcher):  # its folder may be one that cannot be written
        return
    try:
        with locked(blob.lock, lambda: watcher.note(f"another process downloads {blob.name}; waiting for it")):
            if _is_done(blob, watcher):
                return
            blob.path.parent.mkdir(parents=True, exist_ok=True)
            with PartFile(blob.part, blob.size, blob.sha256 or f"{blob.url} {blob.version}") as part:
                if _size(blob.part) > CHUNK_BYTES:
                    watcher.note(f"checking the {_size(blob.part) // MIB:,} MiB that are here")
                part.resume()
                watcher.moved(part.size)
                bring(part)
                watcher.verified(blob.path, part.finish(blob))
    except OSError as error:
        raise cannot_write(error, blob.path) from error


def _is_done(blob: Blob, watcher: Watcher) -> bool:
    if not blob.is_here():
        return False
    with contextlib.suppress(OSError):
        journal(blob.part).unlink()  # of a process that was killed in its last step
    watcher.moved(blob.size)
    return True


def download(part: PartFile, blob: Blob, web: Web, watcher: Watcher) -> None:
    """What is missing of it, from its source."""

    def transfer() -> None:
        for data in web.body(blob.url, part.size, blob.size, blob.version):
            part.write(data)
            check_begin(part, blob, web.page)
            watcher.moved(len(data))

    if part.size < blob.size:
        persevere(transfer, lambda: part.size, watcher.note)


def check_begin(part: PartFile, blob: Blob, page: str) -> None:
    """Raises StoreError if a model is none."""
    if blob.is_model and part.begin != GGUF[: len(part.begin)]:
        part.discard()
        raise StoreError(f"{blob.name} is not a GGUF file: it begins with {part.begin!r}", f"see {page}")


class PartFile:
    def __init__(self, path: Path, full_size: int, identity: str) -> None:
        """`identity`: of the file to be. A part of another one is discarded."""
        self.path = path
        self.size = 0
        #: The first four bytes.
        self.begin = b""
        self._full_size = full_size
        self._head = f"llambo-part 1 {full_size} {hashlib.sha256(identity.encode()).hexdigest()}\n".encode()
        self._whole, self._chunk = hashlib.sha256(), hashlib.sha256()
        # Without buffers: what was written is in the file also if this process is killed.
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
        self._journal = journal(path).open("a+b", buffering=0)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._journal.close()

    def resume(self) -> None:
        """Go on after the chunks that are as the journal says."""
        self._journal.seek(0)
        head, *lines = self._journal.read().splitlines(keepends=True) or [b""]
        good = 0
        if head == self._head:
            for line in lines:
                data = self._file.read(min(CHUNK_BYTES, self._full_size - self.size))
                if not data or _line(hashlib.sha256(data)) != line:
                    break
                self._took(data)
                good += 1
        self._file.truncate(self.size)
        self._file.seek(self.size)
        self._journal.truncate(len(self._head) + sum(map(len, lines[:good])) if head == self._head else 0)
        if head != self._head:
            self._journal.write(self._head)

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            written = self._file.write(rest[: CHUNK_BYTES - self.size % CHUNK_BYTES])
            self._chunk.update(rest[:written])
            self._took(rest[:written])
            if self.size % CHUNK_BYTES == 0 or self.size == self._full_size:
                self._journal.write(_line(self._chunk))
                self._chunk = hashlib.sha256()
            rest = rest[written:]

    def _took(self, data: bytes | memoryview) -> None:
        self.begin += bytes(data[: 4 - len(self.begin)])
        self._whole.update(data)
        self.size += len(data)

    def finish(self, blob: Blob) -> str:
        """Give it its name. Returns its sha256; if it is not that of the source, discards it and raises StoreError."""
        found = self._whole.hexdigest()
        if blob.sha256 and found != blob.sha256:
            self.discard()
            text = f"{blob.name}: the server sent wrong bytes: the sha256 is {found}, and should be {blob.sha256}"
            raise WrongBytes(
                f"{text}; they were discarded", "run the same command again; a proxy or mirror may be broken"
            )
        os.fsync(self._file.fileno())
        self.path.replace(blob.path)
        journal(self.path).unlink()
        sync_folder(blob.path.parent)
        return found

    def discard(self) -> None:
        self.path.unlink()
        journal(self.path).unlink()


def _line(chunk: hashlib._Hash) -> bytes:
    return f"{chunk.hexdigest()}\n".encode()


def _size(path: Path) -> int:
    return path.stat().st_size if os.path.isfile(path) else 0


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One process at a time. huggingface_hub locks files of its cache in the same way, and may remove the lock file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                is_current = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                continue
            if is_current:
                yield
                return


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(error: OSError, path: Path) -> StoreError:
    """What is here stays."""
    if error.errno in _NO_ROOM:
        hint = f"free some space and run the same command again: it goes on from here; {_ELSEWHERE}"
        return StoreError(f"the disk is full: cannot write {path}: {os.strerror(error.errno or 0)}", hint)
    what = error.filename or path
    return StoreError(f"cannot write {what}: {os.strerror(error.errno or 0)}", _ELSEWHERE)
