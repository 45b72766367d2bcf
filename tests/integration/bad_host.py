"""`llambo-worker` as a host that gives wrong bytes to others, or gives them slowly: for tests of the other ones."""

from __future__ import annotations

import os
import time

from llambo.cli.services import worker
from llambo.worker.share.share_server import ShareServer
from llambo.worker.store.part_file import Blob

#: `corrupt`, or the seconds that each chunk takes.
FAULT = "LLAMBO_TEST_BAD_HOST"

_right = ShareServer.chunk


def _wrong(blob: Blob, number: int) -> bytes:
    data = _right(blob, number)
    if os.environ[FAULT] == "corrupt":
        return bytes([data[0] ^ 1]) + data[1:] if data else b""
    time.sleep(float(os.environ[FAULT]))
    return data


if __name__ == "__main__":
    ShareServer.chunk = staticmethod(_wrong)  # type: ignore[method-assign]
    worker.main(prog_name="llambo-worker")
