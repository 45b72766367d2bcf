"""What went wrong and what to do about it: the one form in which a command fails."""

from __future__ import annotations

import json
from typing import IO, Any

import click

from llambo.cli.exits import Exit, exit_of
from llambo.mesh.errors import LlamboError


class Failure(click.ClickException):
    """Two lines on stderr. With `as_json` also an object on stdout, for programs."""

    def __init__(self, what: str, hint: str = "", code: int = Exit.ERROR, *, as_json: dict[str, Any] | None = None):
        super().__init__(what)
        self.hint = hint
        self.exit_code = int(code)  # type: ignore[misc]  # the way click means it, whatever it declares
        self.as_json = as_json

    @classmethod
    def of(cls, error: LlamboError, *, as_json: bool = False) -> Failure:
        hint, code = error.hint, exit_of(error.code)
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
