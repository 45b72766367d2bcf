"""What broker and worker have in common as services: a manager that hears how they are, and pauses after failures."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable

import click

from llambo.cli.exits import Exit
from llambo.cli.restarts import Restarts, boot_ms, now_ms, wait_out
from llambo.mesh.errors import LlamboError
from llambo.mesh.herald_core import Condition
from llambo.mesh.notify import Herald, manager


def serve(run: Callable[[Herald], int]) -> int:
    """The exit status of `run`. A manager that has started this process hears of it, and why it could not go on."""
    told = manager(os.environ, os.getpid())
    if told is not None:
        # A process that hangs is ended by SIGABRT: where it was is worth knowing. Names and lines only, no values.
        faulthandler.enable()
    herald, restarts = Herald(told), Restarts(os.environ)
    try:
        code = int(run(herald)) if wait_out(restarts.begin(boot_ms()), herald) else int(Exit.OK)
    except (click.ClickException, LlamboError) as error:
        herald.tell(Condition(str(error), leaving=True), now_ms())
        raise
    finally:
        herald.close()
    if code == Exit.OK:
        restarts.ended_well()
    return code
