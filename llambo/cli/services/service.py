"""What broker and worker have in common as services: a manager that hears how they are, and pauses after failures."""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import click

from llambo.cli.kit.exits import Exit
from llambo.mesh.service.host import stop_signals_wake
from llambo.mesh.service.notify import Herald, manager
from llambo.mesh.service.notify_core import Condition
from llambo.mesh.wire.errors import LlamboError

# --- A service that fails again and again waits longer each time before it tries. ---
#
# The manager starts it again at once, which is right for one that was killed, and wrong for one whose port is taken or
# whose disk is not there. systemd can wait longer each time only since version 254. So the waiting is done here, at the
# beginning of the next life: how often it has failed in a row is in a file of its runtime directory, which the manager
# keeps as long as the service is not stopped.

log = logging.getLogger(__name__)

#: A life of so long was no failure, however it ended.
LASTED_MS = 60_000
#: The wait after the second failure in a row; it doubles until the last. After the first there is none.
PAUSE_MS = (1_000, 60_000)
FILE_NAME = "failures"


class Life(NamedTuple):
    """`failures` in a row before it, and when it began, in milliseconds since the machine was started."""

    failures: int
    began_ms: int


def next_life(last: Life | None, now_ms: int) -> Life:
    """`last`: the one that did not end well; None: there was none."""
    if last is None or not 0 <= now_ms - last.began_ms < LASTED_MS + pause_ms(last.failures):
        return Life(0, now_ms)
    return Life(last.failures + 1, now_ms)


def pause_ms(failures: int) -> int:
    return 0 if failures < 2 else min(PAUSE_MS[0] << min(failures - 2, 16), PAUSE_MS[1])


class Restarts:
    def __init__(self, environ: Mapping[str, str]) -> None:
        folder = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        #: None: nobody restarts us, or nobody who tells.
        self._file = Path(folder, FILE_NAME) if folder else None

    def begin(self, now_ms: int) -> int:
        """How long to wait. Until `ended_well` this life counts as a failure."""
        if self._file is None:
            return 0
        life = next_life(self._last(), now_ms)
        try:
            self._file.write_text(f"{life.failures} {life.began_ms}\n", encoding="ascii")
        except OSError as error:
            log.warning("%s: %s; if this service fails it will be started again without a pause", self._file, error)
        return pause_ms(life.failures)

    def ended_well(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _last(self) -> Life | None:
        assert self._file is not None
        try:
            failures, began_ms = map(int, self._file.read_text(encoding="ascii").split())
        except (OSError, ValueError):
            return None
        return Life(failures, began_ms)


def wait_out(pause: int, herald: Herald) -> bool:
    """False: it was told to stop meanwhile."""
    until = now_ms() + pause
    how = Condition(f"it has failed again and again; it waits {pause // 1000} s before it tries")
    reading, writing = socket.socketpair()
    with reading, writing:
        writing.setblocking(False)
        with stop_signals_wake(writing.fileno()):
            while (left := until - now_ms()) > 0:
                herald.tell(how, now_ms())
                wait_ms = min(left, max(herald.due_ms - now_ms(), 0))
                if select.select([reading], [], [], wait_ms / 1000)[0]:
                    return False
    return True


def now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def boot_ms() -> int:
    """Counts a machine's sleep, too, which `now_ms` does not."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


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
