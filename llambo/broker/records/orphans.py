"""What a broker remembers for the time after a restart: runs without a broker, and requests that it cannot place yet.

It is `State.recovery`. The rules are in requests/recovery.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llambo.broker.records.registry import ClientEntry, WorkerEntry
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m


@dataclass(frozen=True, slots=True)
class OrphanRun:
    """One run as its worker announced it. It has grown since."""

    worker: WorkerEntry
    work: m.Dispatch
    prompt: bytes
    #: From token 0 on, checked.
    chunks: list[bytes]
    due: int

    @property
    def key(self) -> bytes:
        return self.work.id + self.work.dispatch

    @property
    def attempt(self) -> int:
        return int.from_bytes(self.work.dispatch[:4], "big")

    @property
    def size(self) -> int:
        return len(self.prompt) + sum(map(len, self.chunks))


class OrphanRuns:
    """By request, and then by run: several workers may have had the same request, one after the other.

    Two owners may have chosen the same id: then it stands for two requests.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.by_request: dict[bytes, dict[bytes, OrphanRun]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.by_request.values()))

    def __iter__(self) -> Iterator[OrphanRun]:
        for runs in self.by_request.values():
            yield from runs.values()

    def owners(self, id: bytes) -> set[str]:
        return {orphan.work.owner for orphan in self.by_request.get(id, {}).values()}

    def add(self, orphan: OrphanRun) -> None:
        self.remove(orphan.key)
        self.by_request.setdefault(orphan.work.id, {})[orphan.key] = orphan
        self.bytes += orphan.size

    def take(self, id: bytes, owner: str) -> list[OrphanRun]:
        """All of this request, the latest attempt first. Those of another owner are not of this request."""
        runs = [orphan for orphan in self.by_request.get(id, {}).values() if orphan.work.owner == owner]
        for orphan in runs:
            self.remove(orphan.key)
        return sorted(runs, key=lambda orphan: orphan.attempt, reverse=True)

    def remove(self, key: bytes) -> None:
        id = key[: limits.REQUEST_ID_BYTES]
        runs = self.by_request.get(id, {})
        if key in runs:
            self.bytes -= runs.pop(key).size
            if not runs:
                del self.by_request[id]

    def forget_worker(self, worker: WorkerEntry) -> None:
        for orphan in [orphan for orphan in self if orphan.worker is worker]:
            self.remove(orphan.key)

    def expire(self, now_ms: int) -> None:
        for orphan in [orphan for orphan in self if now_ms >= orphan.due]:
            self.remove(orphan.key)


@dataclass(frozen=True, slots=True)
class Deferred:
    """A client's message about something that this broker does not know yet."""

    client: ClientEntry
    message: m.InferenceRequest | m.Attach
    blob: bytes
    due: int


class Recovery:
    def __init__(self) -> None:
        self.orphans = OrphanRuns()
        #: By session and request id.
        self.deferred: dict[tuple[bytes, bytes], Deferred] = {}
