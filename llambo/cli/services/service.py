"""What the commands that run (broker, worker, gateway) have in common as processes.

- Hidden options for a parent: `llambo up` and a fleet start them with these. Readiness is a line on a pipe, so the
  parent need not guess it from a log, or poll. Children of `llambo up` end with it (`--parent`); nodes of a fleet
  outlive the process that started them and hold a lock instead (`--hold`).
- Limits of the process: no core dumps, as many descriptors as are allowed.
- Keys: a broker or a gateway that other hosts can reach does not start without them.
- `serve`: the service manager is informed, and a service that fails again and again pauses before each start.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from llambo.cli.kit.failure import Exit, Failure
from llambo.mesh.service import clock
from llambo.mesh.service.host import end_with_parent, stop_signals_wake
from llambo.mesh.service.notify_core import Condition
from llambo.mesh.service.service_manager import Notifier, manager
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.timers import backoff_ms

if TYPE_CHECKING:
    from llambo.mesh.security.keyring import Folder
    from llambo.mesh.settings.settings import Settings
    from llambo.mesh.wire.identity import PeerKey

log = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])

# --- Started by a parent: `llambo up`, or a fleet. ---


def child_options(function: F) -> F:
    parent = click.option("--parent", type=int, hidden=True, help="Die with the process of this id.")
    notify = click.option("--notify-fd", type=int, hidden=True, help="Write a line here when ready, and close it.")
    held = click.option("--hold", hidden=True, expose_value=False, callback=_hold, help="Keep this file locked.")
    return parent(notify(held(function)))


#: Descriptors of lock files: open, and so locked, until this process ends.
_HELD: list[int] = []


def _hold(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """Lock the file for the life of this process.

    The process that started us may be gone. The lock shows to a later one that we live, and there are never two
    processes with the same lock.
    """
    if path is None or context.resilient_parsing:
        return
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise Failure(f"{path} is locked by another process: this node is already running") from error
    _HELD.append(descriptor)


def report_ready(descriptor: int | None, text: str) -> bool:
    """Write the readiness line for the parent. False: there is no parent, so print it for a person."""
    if descriptor is None:
        return False
    standard = descriptor <= 2  # must stay open: libuv would never close a connection with such a number
    # The parent may have stopped reading.
    with contextlib.suppress(BrokenPipeError), os.fdopen(descriptor, "wb", closefd=not standard) as pipe:
        pipe.write(f"{text}\n".encode())
    if standard:
        with Path(os.devnull).open("wb") as null:
            os.dup2(null.fileno(), descriptor)
    return True


# --- Limits of the process. ---

#: With fewer, a service for connections does not start.
LEAST_DESCRIPTORS = 128


def prepare_process(parent: int | None, *, connections: bool = False) -> None:
    """`parent`: end with it. `connections`: one that serves many connections."""
    if parent is not None:
        end_with_parent(parent)
    disable_core_dumps()
    if connections:
        raise_descriptor_limit()


def disable_core_dumps() -> None:
    """A core dump would hold prompts, answers and keys."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def raise_descriptor_limit() -> None:
    """Each connection takes a descriptor. The usual limit of 1,024 would be used up by a thousand idle connections."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < LEAST_DESCRIPTORS:
        needed = f"{LEAST_DESCRIPTORS} are needed, and two for each peer"
        text = f"only {hard} descriptors are allowed (ulimit -Hn); {needed}"
        raise Failure(text, hint="raise LimitNOFILE= of its unit, or --ulimit nofile= of its container")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# --- A service that fails again and again waits longer each time before it starts. ---
#
# The service manager restarts it at once. That is right for a service that was killed, and wrong for one whose port is
# taken or whose disk is missing. systemd supports growing pauses only since version 254. So the pause is made here, at
# the start of the next life: the number of failures in a row is in a file in the service's runtime directory, which the
# manager keeps until the service is stopped.

#: A service that ran for so long did not fail at its start, however it ended.
LASTED_MS = 60_000
#: The pause after the second failure in a row, and the longest. After the first one there is none.
PAUSE_MS = (1_000, 60_000)
FILE_NAME = "failures"


class Life(NamedTuple):
    """One run of the service: the failures in a row before it, and its start in milliseconds since the host's boot."""

    failures: int
    began_ms: int


def next_life(last: Life | None, now_ms: int) -> Life:
    """`last`: the previous life, which did not end well; None: there was none."""
    if last is None or not 0 <= now_ms - last.began_ms < LASTED_MS + pause_ms(last.failures):
        return Life(0, now_ms)
    return Life(last.failures + 1, now_ms)


def pause_ms(failures: int) -> int:
    return backoff_ms(failures, *PAUSE_MS)


class Restarts:
    def __init__(self, environ: Mapping[str, str]) -> None:
        folder = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        #: None: no service manager restarts us, or it gives us no runtime directory.
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


def wait_before_start(wait_ms: int, notifier: Notifier) -> bool:
    """False: a signal asked it to stop during the wait."""
    until = clock.now_ms() + wait_ms
    condition = Condition(f"it has failed several times in a row; it waits {wait_ms // 1000} s before it starts")
    reading, writing = socket.socketpair()
    with reading, writing:
        writing.setblocking(False)
        with stop_signals_wake(writing.fileno()):
            while (left := until - clock.now_ms()) > 0:
                notifier.update(condition, clock.now_ms())
                poll_ms = min(left, max(notifier.next_wakeup_ms() - clock.now_ms(), 0))
                if select.select([reading], [], [], poll_ms / 1000)[0]:
                    return False
    return True


def boot_ms() -> int:
    """Unlike `now_ms` this counts the time for which the host was suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def serve(run: Callable[[Notifier], int]) -> int:
    """The exit status of `run`. The service manager, if there is one, is informed, also of why it could not start."""
    notified = manager(os.environ, os.getpid())
    if notified is not None:
        # The manager ends a process that hangs with SIGABRT. The stack shows where it was: names and lines, no values.
        faulthandler.enable()
    notifier, restarts = Notifier(notified), Restarts(os.environ)
    try:
        code = int(run(notifier)) if wait_before_start(restarts.begin(boot_ms()), notifier) else int(Exit.OK)
    except (click.ClickException, LlamboError) as error:
        notifier.update(Condition(str(error), leaving=True), clock.now_ms())
        raise
    finally:
        notifier.close()
    if code == Exit.OK:
        restarts.ended_well()
    return code


# --- The keys of what listens: a broker or a gateway that other hosts can reach does not start without them. ---

#: The name of the key of workers that `llambo up` starts; the workers are named after it.
WORKERS = "worker"
#: The name of the gateway's own key.
GATEWAY = "gateway"


def folder_of(settings: Settings, host: str, program: str = "llambo-broker") -> Folder | None:
    """The broker's keys. Without keys it may only listen on loopback. `program`: the command for the hint."""
    from llambo.mesh.link.sockets import is_loopback
    from llambo.mesh.security.keyring import default_folder

    if path := settings.text("keys"):
        return _existing_folder(path)
    if is_loopback(host):
        return None
    there = default_folder(os.environ)
    raise Failure(
        f"without keys a broker listens on loopback only, and {host} is not a loopback address",
        f"{_begin(there)}{program} --bind {host} --keys {there}",
        Exit.USAGE,
    )


def gateway_folder(settings: Settings) -> Folder | None:
    """Keys and API tokens. A gateway that listens beyond loopback needs them, and TLS."""
    from llambo.mesh.link.sockets import is_loopback
    from llambo.mesh.security.keyring import default_folder

    host, path = settings.text("http_bind"), settings.text("http_keys")
    if not is_loopback(host):
        if not path:
            there = default_folder(os.environ)
            command = f"llambo gateway --http-bind {host} --http-keys {there}{_tls_words(settings)}"
            text = f"without keys a gateway listens on loopback only, and {host} is not a loopback address"
            raise Failure(text, f"{_begin(there)}{command}", Exit.USAGE)
        if tls := _tls_words(settings):
            text = f"on {host} API tokens and answers would be sent unencrypted"
            hint = f"{tls.strip()}   (`llambo help gateway` shows how to make them)"
            raise Failure(text, f"{hint}\n  --http-plain yes   if a proxy in front of it has TLS", Exit.USAGE)
    return _existing_folder(path) if path else None


def _begin(folder: Path) -> str:
    """The line of a hint that makes the folder of keys, if there is none."""
    from llambo.mesh.security.keyring import Folder

    address = f"tcp://{socket.gethostname()}:7330"
    return "" if Folder(folder).exists else f"llambo keys init --address {address}   as others reach this machine\n  "


def _tls_words(settings: Settings) -> str:
    """The options that the gateway still needs beyond loopback."""
    given = settings.text("tls_cert") or settings.switch("http_plain")
    return "" if given else " --tls-cert box.pem --tls-key box-key.pem"


def _existing_folder(path: str) -> Folder:
    from llambo.mesh.security.keyring import Folder

    folder = Folder(Path(path).expanduser())
    if not folder.exists:
        raise Failure(f"there are no keys in {folder.path}", f"llambo keys init --keys {folder.path}", Exit.USAGE)
    return folder


def gateway_key(folder: Folder) -> PeerKey:
    """The gateway's own key, for requests of its own. Created at the first call."""
    from llambo.mesh.wire.identity import Identity

    if not folder.ring().named(GATEWAY):
        try:
            folder.add(Identity(GATEWAY, "client"), int(time.time()))
        except OSError as error:  # a service may only read it
            command = f"llambo keys add {GATEWAY} --role client --keys {folder.path}"
            text = f"the gateway has no key in {folder.path}, and cannot make one there: {error.strerror}"
            raise Failure(text, f"{command}   (as root)", Exit.USAGE) from error
    return folder.export(GATEWAY)


def worker_key(folder: Folder) -> Path:
    """The key file of the workers worker-1, worker-2 and so on. Created at the first call."""
    from llambo.mesh.security.keyring import ISSUED
    from llambo.mesh.wire.identity import Identity

    if not folder.ring().named(WORKERS):
        folder.add(Identity(WORKERS, "worker"), int(time.time()))
    return folder.path / ISSUED / f"{WORKERS}.key"
