"""`llambo-worker` as a host with a fault: it gives wrong bytes to others, or gives them slowly, or cannot give any."""

from __future__ import annotations

import os
import time

from llambo.cli.services import worker
from llambo.mesh.wire.messages import FileGrant
from llambo.worker.share.grants import Grants
from llambo.worker.share.share_server import ShareServer
from llambo.worker.store.part_file import Blob

#: `corrupt`, or `fails` (the thread that gives files), or the seconds that each chunk takes.
FAULT = "LLAMBO_TEST_BAD_HOST"

_right = ShareServer.chunk


def _wrong(blob: Blob, number: int) -> bytes:
    data = _right(blob, number)
    if os.environ[FAULT] == "corrupt":
        return bytes([data[0] ^ 1]) + data[1:] if data else b""
    time.sleep(float(os.environ[FAULT]))
    return data


def _fail(grants: Grants, granted: tuple[FileGrant, ...]) -> None:
    raise RuntimeError("the fault of this test")


if __name__ == "__main__":
    if os.environ[FAULT] == "fails":
        Grants.replace = _fail  # type: ignore[assignment, method-assign]
    else:
        ShareServer.chunk = staticmethod(_wrong)  # type: ignore[method-assign]
    worker.main(prog_name="llambo-worker")
