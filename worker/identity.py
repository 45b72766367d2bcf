"""Who this worker process is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Identity:
    #: Random bytes: the same name with other ones is a worker that has restarted.
    incarnation: bytes
    host: str = ""
    pid: int = 0
    software: str = ""
