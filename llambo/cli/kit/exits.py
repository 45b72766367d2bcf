"""Exit codes, by name: what a script can tell apart without reading a message."""

from __future__ import annotations

from enum import IntEnum

from llambo.mesh.wire.errors import Code


class Exit(IntEnum):
    OK = 0
    ERROR = 1
    USAGE = 2
    NO_BROKER = 3
    REFUSED = 4
    BUSY = 5
    TIMEOUT = 6
    ENGINE = 7
    UNKNOWN_ID = 8
    DENIED = 9
    INTERRUPTED = 130


MEANING: dict[Exit, str] = {
    Exit.OK: "done",
    Exit.ERROR: "something else went wrong; the message says what",
    Exit.USAGE: "wrong usage or a wrong setting",
    Exit.NO_BROKER: "no broker answers",
    Exit.REFUSED: "the request is wrong: a bad option, too long, an unknown model",
    Exit.BUSY: "the mesh is full or has no worker now; trying again can help",
    Exit.TIMEOUT: "a deadline, a timeout or the longest wait has passed",
    Exit.ENGINE: "the engine failed",
    Exit.UNKNOWN_ID: "unknown or expired request id, or unknown worker",
    Exit.DENIED: "the key is not valid, or may not do that",
    Exit.INTERRUPTED: "interrupted by Ctrl-C",
}

_OF: dict[Code, Exit] = {
    Code.BAD_MESSAGE: Exit.ERROR,
    Code.BAD_VERSION: Exit.ERROR,
    Code.UNKNOWN_TYPE: Exit.ERROR,
    Code.UNKNOWN_SESSION: Exit.ERROR,
    Code.NAME_TAKEN: Exit.ERROR,
    Code.INTERNAL: Exit.ERROR,
    Code.CANCELLED: Exit.ERROR,
    Code.BAD_SETTING: Exit.USAGE,
    Code.NO_BROKER: Exit.NO_BROKER,
    Code.BAD_REQUEST: Exit.REFUSED,
    Code.TOO_LONG: Exit.REFUSED,
    Code.UNKNOWN_MODEL: Exit.REFUSED,
    Code.MODEL_REQUIRED: Exit.REFUSED,
    Code.UNAUTHORIZED: Exit.DENIED,
    Code.FORBIDDEN: Exit.DENIED,
    Code.OVER_LIMIT: Exit.BUSY,
    Code.BUSY: Exit.BUSY,
    Code.NO_WORKER: Exit.BUSY,
    Code.DEADLINE: Exit.TIMEOUT,
    Code.TIMEOUT: Exit.TIMEOUT,
    Code.QUEUE_TIMEOUT: Exit.TIMEOUT,
    Code.ENGINE_FAILED: Exit.ENGINE,
    Code.UNKNOWN_REQUEST: Exit.UNKNOWN_ID,
    Code.EXPIRED: Exit.UNKNOWN_ID,
    Code.UNKNOWN_WORKER: Exit.UNKNOWN_ID,
}


def exit_of(code: Code) -> Exit:
    # A code that is newer than this table is still an error.
    return _OF.get(code, Exit.ERROR)
