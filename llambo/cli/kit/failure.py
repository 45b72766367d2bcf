"""What went wrong and what to do about it: the one form in which a command fails."""

from __future__ import annotations

import json
from typing import IO, Any

import click

from llambo.cli.kit.exits import Exit, exit_of
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError


class Failure(click.ClickException):
    """Two lines on stderr. With `as_json` also an object on stdout, for programs."""

    def __init__(self, what: str, hint: str = "", code: int = Exit.ERROR, *, as_json: dict[str, Any] | None = None):
        super().__init__(what)
        self.hint = hint
        self.exit_code = int(code)  # type: ignore[misc]  # the way click means it, whatever it declares
        self.as_json = as_json

    @classmethod
    def of(cls, error: LlamboError, *, as_json: bool = False) -> Failure:
        hint, code = hint_of(error), exit_of(error.code)
        # Some texts say already what to do; once is enough.
        text = error.text.removesuffix(f"; {hint}")
        if error.retry_after_ms:
            text = f"{text}; try again in {error.retry_after_ms / 1000:g} s"
        told: dict[str, Any] = {"type": "error", "code": error.code.value, "text": text, "hint": hint}
        if error.retry_after_ms:
            told["retry_after_ms"] = error.retry_after_ms
        told |= {"retryable": error.retryable, "exit": int(code)}
        return cls(text, hint, code, as_json=told if as_json else None)

    def show(self, file: IO[Any] | None = None) -> None:
        if self.as_json is not None:
            click.echo(json.dumps(self.as_json, ensure_ascii=False))
        click.echo(f"llambo: {self.message}", err=True)
        if self.hint:
            click.echo(f"  {self.hint}", err=True)


def hint_of(error: LlamboError) -> str:
    """That of its code, unless more can be said."""
    if error.code is Code.UNKNOWN_TYPE and "client_hello" in error.text:
        return "that is a broker's port for workers; clients take the first of its ports, the one it says at its start"
    if error.code is Code.BAD_REQUEST and "prompt is empty" in error.text:
        return "give a prompt, as an argument or on stdin"
    return error.hint


def check_name(name: str, flag: str) -> str:
    """Names are shown in everybody's lists and logs: what moves the cursor does not belong there."""
    if not name.isprintable() or len(name) > limits.NAME_CHARS:
        raise Failure(
            f"{flag} {name!r} is no name", f"at most {limits.NAME_CHARS} characters, none of control", Exit.USAGE
        )
    return name
