"""What `llambo doctor` looks at: each probe returns facts about this machine, and none of them changes anything.

`collect` runs the probes in threads, all at once, and waits for each until its deadline. What may end a process, such
as an instruction that a hypervisor forbids, is tried in a child.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shlex
import shutil
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llambo.cli.doctor import amx_child, doctor_core
from llambo.cli.doctor.facts import (
    ClockFacts,
    CpuFacts,
    DiskFacts,
    Extra,
    Facts,
    KeyFile,
    LimitFacts,
    ModelFacts,
    ModelFile,
    SettingsFacts,
    UnitFacts,
    Unknown,
)
from llambo.cli.doctor.reach import look_at_brokers, look_at_ports
from llambo.cli.kit.failure import Failure
from llambo.cli.kit.tables import plural
from llambo.mesh.security import keys
from llambo.mesh.service import host
from llambo.mesh.settings import settings as settings_files
from llambo.mesh.settings.settings_table import BY_ENV
from llambo.mesh.wire.errors import LlamboError

if TYPE_CHECKING:
    from llambo.mesh.settings.settings import Settings
    from llambo.worker.llama.binding import LibraryReport
    from llambo.worker.models.gpus import Gpu

#: How long a probe may take. Loading a library from a slow disk takes long; systemd verifies units in seconds.
DEADLINE_S = 15.0
DEADLINES_S = {"library": 70.0, "systemd": 70.0}
#: How long a child may take that tries an instruction, or a program of the system.
CHILD_S = 10.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where the probes look."""

    #: Those in force; the defaults if they cannot be read.
    settings: Settings
    environ: Mapping[str, str]


def collect(names: set[str], place: Place, before: Facts) -> Facts:
    """`before` with the facts of these probes. A probe that does not end in time is left behind, as its thread is."""
    found: dict[str, Any] = {}
    threads = {name: threading.Thread(target=_probe, args=(name, place, found), daemon=True) for name in names}
    for thread in threads.values():
        thread.start()
    began = time.monotonic()
    for name, thread in threads.items():
        deadline_s = DEADLINES_S.get(name, DEADLINE_S)
        thread.join(max(0.0, began + deadline_s - time.monotonic()))
        found.setdefault(name, Unknown(f"it did not end within {deadline_s:g} s"))
    return replace(before, **found)


def _probe(name: str, place: Place, found: dict[str, Any]) -> None:
    try:
        found[name] = PROBES[name](place)
    except Exception as error:  # noqa: BLE001  # a fault of one probe is a finding, and the others are shown
        found[name] = Unknown(f"{type(error).__name__}: {error}")


# --- settings ------------------------------------------------------------------------------------------


def look_at_settings(flags: Mapping[str, Any], config: str | None) -> tuple[SettingsFacts, Settings]:
    """The settings in force; the defaults, with the reason, if they cannot be read."""
    try:
        loaded = settings_files.load(flags, config=config)
    except LlamboError as error:
        return SettingsFacts(error=error.text, command=_correction(config)), settings_files.load(environ={}, places=[])
    seen = SettingsFacts(
        str(loaded.file or ""),
        sum(source != "default" for source in loaded.sources.values()),
        frozenset(BY_ENV) & set(os.environ),
        loaded.warnings,
        loaded.text("engine"),
        loaded["gpu_layers"],  # type: ignore[arg-type]  # as the table of settings has it
    )
    return seen, loaded


def _correction(config: str | None) -> str:
    """Which part is wrong: a variable, or else the file."""
    for name, value in sorted(os.environ.items()):
        if name in BY_ENV and not _loads({name: value}, []):
            return f"unset {name}"
    for path in [Path(config)] if config else settings_files.search_path(os.environ):
        if path.is_file() and not _loads({}, [path]):
            editor = "${EDITOR:-vi}" if os.access(path, os.W_OK) else "sudoedit"
            return f"{editor} {shlex.quote(str(path.absolute()))}"
    return f"unset {settings_files.CONFIG_ENV}" if settings_files.CONFIG_ENV in os.environ else "llambo config"


def _loads(environ: Mapping[str, str], places: list[Path]) -> bool:
    try:
        settings_files.load(environ=environ, places=places)
    except LlamboError:
        return False
    return True


# --- llama.cpp, the processor, models -------------------------------------------------------------------


def look_at_library(place: Place) -> LibraryReport:
    from llambo.worker.llama import binding

    return binding.examine(place.settings.text("llama_lib"))


def look_at_gpus(place: Place) -> tuple[Gpu, ...]:
    from llambo.worker.models import gpus

    return tuple(gpus.gpus())


def look_at_cpu(place: Place) -> CpuFacts:
    flags: frozenset[str] = frozenset()
    with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                flags = frozenset(value.split())
                break
    amx = try_amx() if "amx_tile" in flags else None
    return CpuFacts(platform.machine(), host.physical_cores(), host.cpus(), flags, amx)


def try_amx(command: Sequence[str] = (sys.executable, "-m", amx_child.__name__)) -> str | None:
    """How a child process ended that used AMX; empty if that works, None if it could not be tried."""
    done = subprocess.run(command, capture_output=True, timeout=CHILD_S, check=False)
    if done.returncode == amx_child.NOT_PERMITTED:
        return "was not permitted to by the kernel"
    return None if done.returncode > 0 else "" if done.returncode == 0 else host.exit_text(done.returncode)


def look_at_models(place: Place) -> ModelFacts:
    from llambo.worker.models import model_files

    missing = remedy = ""
    named = [place.settings.text("model"), *place.settings.text("models").split(",")]
    for wanted in map(str.strip, named) if place.settings.text("engine") != "fake" else ():
        try:
            if wanted and not Path(wanted).expanduser().is_dir():
                model_files.resolve(wanted, place.settings.aliases, place.settings.text("models_dir"))
        except model_files.NoSuchModel as error:
            if not missing:
                missing, remedy = str(error), error.hint
    found = model_files.on_this_host(place.settings.text("models_dir"), aliases=place.settings.aliases)
    files = tuple(ModelFile(each.model, each.size_bytes, each.problem) for each in found)
    return ModelFacts(missing, remedy, files)


# --- the machine ---------------------------------------------------------------------------------------


FAMILIES = {
    "debian": "debian",
    "ubuntu": "debian",
    "fedora": "fedora",
    "rhel": "fedora",
    "suse": "suse",
    "arch": "arch",
}


def family() -> str:
    """The distributions whose package manager and package names this one has; empty if it is not known."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return ""
    names = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    return next((FAMILIES[name] for name in names if name in FAMILIES), "")


def look_at_limits(place: Place) -> LimitFacts:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    address = resource.getrlimit(resource.RLIMIT_AS)[0]
    return LimitFacts(
        files=2**20 if files == resource.RLIM_INFINITY else files,
        memory_bytes=host.memory_bytes(),
        free_bytes=host.free_memory_bytes(),
        machine_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        cpu_quota=host.cpu_quota(),
        cores=host.physical_cores(),
        address_bytes=0 if address == resource.RLIM_INFINITY else address,
    )


def look_at_disk(place: Place) -> tuple[DiskFacts, ...]:
    """The folders into which models are put, one of each file system."""
    home = Path(place.environ.get("HOME", "/"))
    folders = [Path(place.environ.get("XDG_CACHE_HOME") or home / ".cache")]
    if named := place.settings.text("models_dir"):
        folders.insert(0, Path(named).expanduser())
    found: dict[int, DiskFacts] = {}
    for folder in folders:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        usage = shutil.disk_usage(there)
        found.setdefault(there.stat().st_dev, DiskFacts(str(there), usage.free, usage.total))
    return tuple(found.values())


#: From sys/timex.h: `adjtimex` returns this if the clock is not synchronised.
TIME_ERROR = 5
#: modes, offset, freq, maxerror: the beginning of `struct timex`, which has 208 bytes.
_TIMEX = struct.Struct("@iqqq")


def look_at_clock(place: Place) -> ClockFacts:
    room, year = ctypes.create_string_buffer(512), time.gmtime().tm_year
    managed = Path("/run/systemd/system").exists() and shutil.which("timedatectl")
    command = "sudo timedatectl set-ntp true" if managed else ""
    state = ctypes.CDLL(None).adjtimex(room)  # with no modes set it only reads
    if state < 0:
        return ClockFacts(year, None, 0.0, command)
    return ClockFacts(year, state != TIME_ERROR, _TIMEX.unpack_from(room)[3] / 1_000, command)


# --- keys ----------------------------------------------------------------------------------------------


def look_at_keys(place: Place) -> tuple[KeyFile, ...]:
    return (*_own_key(place), *_key_folders(place), *_certificate(place))


def _own_key(place: Place) -> Iterator[KeyFile]:
    """The key that clients and workers use here. It is a file, or the text itself in a variable or in llambo.toml."""
    setting, source = place.settings.text("key").strip(), place.settings.sources["key"]
    if setting.startswith(keys.PREFIX):
        path = place.settings.file if source == str(place.settings.file) else None
        mode = stat.S_IMODE(path.stat().st_mode) if path else 0o600
        try:
            key = keys.from_line(setting)
        except LlamboError as error:
            yield KeyFile(str(path or source), "a key", mode, error.text, "llambo keys export NAME")
        else:
            yield KeyFile(str(path or source), f"the key of {key.name}, {_a(key.role)}", mode)
    elif setting:
        yield _key_file(Path(setting).expanduser())


def _a(role: str) -> str:
    return f"an {role}" if role[0] in "aeiou" else f"a {role}"


def _key_file(path: Path) -> KeyFile:
    again = f"llambo keys export NAME --output {shlex.quote(str(path))}"
    try:
        found = path.stat()
    except OSError as error:
        return KeyFile(str(path), "a key", error=f"cannot be read: {error.strerror}", command=again)
    mode = stat.S_IMODE(found.st_mode) if stat.S_ISREG(found.st_mode) else 0o600
    if mode & 0o077:
        return KeyFile(str(path), "a key", mode)
    try:
        key = keys.read(path)
    except LlamboError as error:
        return KeyFile(str(path), "a key", mode, error.text.removeprefix(f"{path}: "), again)
    return KeyFile(str(path), f"the key of {key.name}, {_a(key.role)}", mode)


def _key_folders(place: Place) -> Iterator[KeyFile]:
    """Of a broker and of a gateway on this host. Others than their owner cannot look into them."""
    from llambo.mesh.security.keyring import BROKER_FILE, ISSUED, RING_FILE, Folder, default_folder

    named = {place.settings.text("keys"), place.settings.text("http_keys")} - {""}
    for path in sorted({Path(each).expanduser() for each in named} or {default_folder(place.environ)}):
        folder = Folder(path)
        try:
            if not folder.exists:
                if named:
                    yield KeyFile(str(path), "keys", error="has no keys", command=f"llambo keys init --keys {path}")
                continue
            files = [path / BROKER_FILE, path / RING_FILE, *sorted((path / ISSUED).glob("*.key"))]
            modes = {file: stat.S_IMODE(file.stat().st_mode) for file in files}
            wrong = {file: mode for file, mode in modes.items() if mode & 0o077}
            yield from (KeyFile(str(file), "a key of the broker's folder", mode) for file, mode in wrong.items())
            if not wrong:
                yield from _ring(folder)
        except OSError as error:
            text = f"cannot be looked at: {error.strerror}; `sudo llambo doctor keys` can"
            yield KeyFile(str(path), "keys", error=text)
        except LlamboError as error:
            yield KeyFile(str(path), "keys", error=error.text, command=f"llambo keys list --keys {path}")


def _ring(folder: Any) -> Iterator[KeyFile]:
    folder.broker()
    entries = folder.ring().entries
    expired = sorted({each.identity.name for each in entries if not each.valid(time.time())})
    yield KeyFile(str(folder.path), f"keys of a broker and of {plural(len(entries), 'peer')}")
    if expired:
        yield KeyFile(str(folder.path), "keys", error=f"these keys have expired: {', '.join(expired)}")


def _certificate(place: Place) -> Iterator[KeyFile]:
    cert, key = place.settings.text("tls_cert"), place.settings.text("tls_key")
    if not cert:
        return
    path = Path(key or cert).expanduser()
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        # A key with a password would be asked for on the terminal.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key or None, password=lambda: "")
    except (OSError, ssl.SSLError) as error:
        text = f"cannot be used for TLS with {cert}: {error.strerror or error}"
        yield KeyFile(str(path), "the key of the certificate", error=text, command=f"openssl x509 -noout -in {cert}")
    else:
        yield KeyFile(str(path), "the key of the certificate", mode)


# --- packages ------------------------------------------------------------------------------------------


def look_at_extras(place: Place) -> tuple[Extra, ...]:
    """What the installed package declares. Extras with a library of llama.cpp are one, and belong to the library."""
    from llambo.mesh.service import extras
    from llambo.worker.llama import binding

    libraries, found = {distribution for distribution, *_ in binding.PACKAGES}, []
    for name, needed in extras.packages().items():
        if name == doctor_core.LLAMA and binding.missing(place.settings.text("llama_lib")):
            continue  # a finding of its own
        if name == doctor_core.LLAMA or not libraries & needed.keys():
            missing = {package for package, here in needed.items() if not here and package not in libraries}
            found.append(Extra(name, tuple(sorted(missing))))
    return tuple(found)


# --- systemd -------------------------------------------------------------------------------------------


def look_at_systemd(place: Place) -> tuple[UnitFacts, ...]:
    """Of the machine's manager and of this user's, where units of llambo are installed."""
    from llambo.cli.services import systemd
    from llambo.systemd import units

    found = []
    for user in (False, True):
        try:
            where = systemd.place_of(user)
        except Failure:
            continue  # not an environment that units can run programs of
        if not any(Path(where.units, name).exists() for name in units.UNITS):
            continue
        what = "your service manager" if user else "the service manager"
        command = "llambo systemd check --user" if user else "sudo llambo systemd check"
        folder = Path(where.settings)
        if not all(os.access(path, os.R_OK) for path in (folder, *folder.glob("*"))):
            found.append(UnitFacts(what, command, unreadable=True, failed=_failed_units(user)))
            continue
        checks = list(systemd.everything(where, Path("/")))
        bad = tuple(f"{each.what} {each.text}" for each in checks if not each.good)
        found.append(UnitFacts(what, command, len(checks), bad=bad, failed=_failed_units(user)))
    return tuple(found)


def _failed_units(user: bool) -> tuple[str, ...]:
    """None if no manager runs here."""
    program = shutil.which("systemctl")
    if program is None:
        return ()
    command = [program, *["--user"] * user, "list-units", "--failed", "--plain", "--no-legend", "llambo*"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_S, check=False)
    return tuple(line.split()[0] for line in done.stdout.splitlines() if line.strip())


#: By the name of the field in `Facts`.
PROBES: dict[str, Callable[[Place], Any]] = {
    "library": look_at_library,
    "gpus": look_at_gpus,
    "cpu": look_at_cpu,
    "models": look_at_models,
    "limits": look_at_limits,
    "disk": look_at_disk,
    "clock": look_at_clock,
    "keys": look_at_keys,
    "extras": look_at_extras,
    "systemd": look_at_systemd,
    "ports": lambda place: look_at_ports(place.settings),
    "brokers": lambda place: look_at_brokers(place.settings, place.environ),
}
