"""How `llambo up` holds on to its children: they say when they are ready, and do not outlive it. Those of a fleet do.

These are hidden options of `llambo-broker` and `llambo-worker`. Readiness is a line on a pipe, so that nobody has to
guess it from a log or ask in a loop.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def child_options(function: F) -> F:
    parent = click.option("--parent", type=int, hidden=True, help="Die with the process of this id.")
    notify = click.option("--notify-fd", type=int, hidden=True, help="Write a line here when ready, and close it.")
    held = click.option("--hold", hidden=True, expose_value=False, callback=_hold, help="Keep this file locked.")
    return parent(notify(held(function)))


#: Open, and so locked, until this process is no more.
_HELD: list[int] = []


def _hold(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """Who began us may be gone. Whoever asks later sees by this lock that we live, and there are never two of us."""
    if path is None or context.resilient_parsing:
        return
    import fcntl

    from llambo.cli.kit.failure import Failure

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise Failure(f"{path} is held by another process: this one runs already") from error
    _HELD.append(descriptor)


def adopt(parent: int | None) -> None:
    if parent is not None:
        from llambo.mesh.service.host import end_with_parent

        end_with_parent(parent)


def without_cores() -> None:
    """A core dump would hold prompts, answers and keys."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def with_all_descriptors() -> None:
    """Each connection takes one, and the 1,024 that a process often has are a thousand idle connections of anybody."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def notify(descriptor: int | None, text: str) -> bool:
    """False: there is no parent to tell, so a person may want to know."""
    if descriptor is None:
        return False
    standard = descriptor <= 2  # one of these must not become a connection's, which libuv would never close
    # If nobody listens any more, there is nothing to tell.
    with contextlib.suppress(BrokenPipeError), os.fdopen(descriptor, "wb", closefd=not standard) as pipe:
        pipe.write(f"{text}\n".encode())
    if standard:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), descriptor)
    return True
