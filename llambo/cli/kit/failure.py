"""How a command fails: exit codes, which scripts can tell apart, and one form of message with a hint."""

from __future__ import annotations

from enum import IntEnum
from typing import IO, Any

import click

from llambo.cli.kit.std_streams import json_text
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError


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
    PROBLEM = 10
    INTERRUPTED = 130


MEANING: dict[Exit, str] = {
    Exit.OK: "done",
    Exit.ERROR: "another error; the message names it",
    Exit.USAGE: "wrong usage, a wrong setting, or a part of llambo that is not installed",
    Exit.NO_BROKER: "no broker answers",
    Exit.REFUSED: "the request is wrong: a bad option, too long, an unknown model",
    Exit.BUSY: "the mesh is full or has no worker now; retrying can help",
    Exit.TIMEOUT: "a deadline, a timeout or the longest wait has passed",
    Exit.ENGINE: "the engine failed",
    Exit.UNKNOWN_ID: "unknown or expired request id, or unknown worker",
    Exit.DENIED: "the key is not valid, or may not do that",
    Exit.PROBLEM: "`llambo doctor` has found a problem",
    Exit.INTERRUPTED: "interrupted by Ctrl-C",
}

_EXIT_OF: dict[Code, Exit] = {
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
    return _EXIT_OF.get(code, Exit.ERROR)


class Failure(click.ClickException):
    """Two lines on stderr. With `as_json` also an object on stdout, for programs."""

    def __init__(self, what: str, hint: str = "", code: int = Exit.ERROR, *, as_json: dict[str, object] | None = None):
        super().__init__(what)
        self.hint = hint
        self.exit_code = int(code)  # type: ignore[misc]  # click declares a class variable, and reads the attribute
        self.as_json = as_json

    @classmethod
    def of(cls, error: LlamboError, *, as_json: bool = False) -> Failure:
        hint, code = error.hint, exit_of(error.code)
        # Some texts end in the hint.
        text = error.text.removesuffix(f"; {hint}")
        if error.retry_after_ms and error.code is not Code.NO_WORKER:  # the hint is what helps a person there
            text = f"{text}; try again in {error.retry_after_ms / 1000:g} s"
        fields: dict[str, object] = {"type": "error", "code": error.code.value, "text": text, "hint": hint}
        if error.retry_after_ms:
            fields["retry_after_ms"] = error.retry_after_ms
        fields |= {"retryable": error.retryable, "exit": int(code)}
        return cls(text, hint, code, as_json=fields if as_json else None)

    def show(self, file: IO[Any] | None = None) -> None:
        if self.as_json is not None:
            click.echo(json_text(self.as_json))
        click.echo(f"llambo: {self.message}", err=True)
        if self.hint:
            click.echo(f"  {self.hint}", err=True)


def missing(what: str, extra: str, more: str = "") -> Failure:
    """A part of llambo that is not installed. A service does not start again by itself: that would not help."""
    from llambo.mesh.service.extras import extra_command

    return Failure(f"{what} is not installed", f"{extra_command(extra)}{more}", Exit.USAGE)


def check_name(name: str, flag: str) -> str:
    """Names are shown in the lists and logs of all users, so control characters are refused."""
    if not name.isprintable() or len(name) > limits.NAME_CHARS:
        raise Failure(
            f"{flag} {name!r} is not a valid name",
            f"at most {limits.NAME_CHARS} characters, no control characters",
            Exit.USAGE,
        )
    return name
