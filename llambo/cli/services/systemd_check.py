"""What is wrong with units, settings and keys, before a service finds out."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llambo.mesh.link.sockets import is_loopback, split
from llambo.mesh.security import keys
from llambo.mesh.security.keyring import Folder
from llambo.mesh.settings import settings
from llambo.mesh.wire.errors import LlamboError
from llambo.systemd import units
from llambo.systemd.units import Place

#: A service is not to be more exposed than this, on systemd's scale of 10. Redis has 1.2, nginx 9.6.
EXPOSURE = 1.5
_EXPOSURE = re.compile(r"exposure level for \S+: (\d+(?:\.\d+)?)")
#: How long systemd-analyze may take.
ANALYZE_S = 60
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Finding(NamedTuple):
    good: bool
    what: str
    text: str = ""


def everything(place: Place, root: Path) -> Iterator[Finding]:
    yield from _current(place, root)
    folder = _below(root, place.units)
    if all((folder / name).is_file() for name in units.UNITS):
        yield from _verified(place, folder)
        if not place.user:
            yield from _exposed(folder)
    yield from _settings(place, _below(root, place.settings))
    yield from _doors(place, root)


def _current(place: Place, root: Path) -> Iterator[Finding]:
    again = "llambo systemd install" + (" --user" if place.user else "")
    for file in units.to_write(place):
        path = _below(root, file.path)
        if file.example:
            continue
        if not path.is_file():
            yield Finding(False, str(path), f"is not there: {again}")
        elif path.read_text(encoding="utf-8") != file.text:
            yield Finding(False, str(path), f"is not what this version writes here: {again}")
        else:
            yield Finding(True, str(path))


# --- by systemd -----------------------------------------------------------------------------------------


def _verified(place: Place, folder: Path) -> Iterator[Finding]:
    names = [name.replace("@.", "@check.") for name in units.UNITS]
    with tempfile.TemporaryDirectory() as runtime:
        done = _analyze(
            ["--user"] * place.user + ["verify", "--man=no", *names],
            # The colon at the end: and where units are otherwise.
            {"SYSTEMD_UNIT_PATH": f"{folder}:", "XDG_RUNTIME_DIR": os.environ.get("XDG_RUNTIME_DIR", runtime)},
        )
    if done is None:
        yield Finding(False, "systemd-analyze verify", "there is no systemd-analyze here, so nothing was verified")
        return
    ours = [line for line in done.splitlines() if "llambo" in line]
    yield from (Finding(False, "systemd-analyze verify", line) for line in ours)
    if not ours:
        yield Finding(True, "systemd-analyze verify")


def _exposed(folder: Path) -> Iterator[Finding]:
    for name in units.SERVICES:
        done = _analyze(["security", "--offline=true", "--no-pager", str(folder / name)], {})
        found = _EXPOSURE.search(done or "")
        if found is None:
            yield Finding(False, f"systemd-analyze security {name}", "it says nothing")
        else:
            text = f"exposure {found[1]}, at most {EXPOSURE} is wanted"
            yield Finding(float(found[1]) <= EXPOSURE, f"systemd-analyze security {name}", text)


def _analyze(arguments: list[str], environ: dict[str, str]) -> str | None:
    program = shutil.which("systemd-analyze")
    if program is None:
        return None
    done = subprocess.run(
        [program, *arguments], check=False, capture_output=True, text=True, timeout=ANALYZE_S,
        env={**os.environ, "LC_ALL": "C", **environ},
    )  # fmt: skip
    return done.stdout + done.stderr


# --- by us ----------------------------------------------------------------------------------------------


def _settings(place: Place, folder: Path) -> Iterator[Finding]:
    toml = folder / settings.FILE_NAME
    for path in [toml, *sorted(folder.glob("*.env"))]:
        if path.is_file():
            problems = [*_problems(path, toml, place)]
            yield from (Finding(False, str(path), problem) for problem in problems)
            if not problems:
                yield Finding(True, str(path))
    for path in sorted(folder.glob("worker*.key")):
        try:
            key = keys.read(path)
        except LlamboError as error:
            yield Finding(False, str(path), error.text)
        else:
            good = key.role == "worker"
            yield Finding(good, str(path), f"the key of {key.name}" + ("" if good else f", which is a {key.role}"))


def _problems(path: Path, toml: Path, place: Place) -> Iterator[str]:
    environ: dict[str, str] = {}
    try:
        if path != toml:
            environ = variables(path.read_text(encoding="utf-8"))
            held = environ.get(settings.BY_NAME["key"].env, "").startswith(keys.PREFIX)
            if held and stat.S_IMODE(path.stat().st_mode) & 0o077:
                yield f"there is a key in it, and others can read it: chmod 600 {path}"
        loaded = settings.load({}, environ=environ, places=[toml])
    except (LlamboError, ValueError) as error:
        yield str(error)
        return
    except OSError as error:
        yield f"cannot be read: {error.strerror}"
        return
    yield from loaded.warnings
    watchdog_ms = _watchdog_ms(place)
    if path.name.startswith("worker") and 2 * loaded.number("stall_ms") >= watchdog_ms:
        yield (
            f"stall_ms is {loaded.number('stall_ms')}, and has to be less than half of WatchdogSec, which is "
            f"{watchdog_ms // 1000} s: set that higher in a drop-in, or this lower"
        )


def _doors(place: Place, root: Path) -> Iterator[Finding]:
    """On more than this machine a broker listens with keys only."""
    folder = _below(root, place.settings)
    try:
        text = (folder / "broker.env").read_text(encoding="utf-8") if (folder / "broker.env").is_file() else ""
        loaded = settings.load({}, environ=variables(text), places=[folder / settings.FILE_NAME])
        hosts = [split(f"tcp://{address}")[0] for address in _listening(_below(root, place.units))]
    except (LlamboError, ValueError, OSError):
        return  # and has been told of
    said = loaded.text("keys")
    if said:
        found = Folder(_below(root, str(Path(said).expanduser()))).exists
        yield Finding(found, said, "" if found else f"there are no keys: llambo keys init --keys {said}")
    elif others := sorted({host for host in hosts if not is_loopback(host)}):
        text = (
            f"without keys it will not listen at {', '.join(others)}: LLAMBO_KEYS={place.settings}/keys in broker.env"
        )
        yield Finding(False, "llambo-broker.socket", text)


def _listening(folder: Path) -> list[str]:
    """What the socket unit and its drop-ins come to. An empty line takes back what was before it."""
    unit = folder / "llambo-broker.socket"
    found: list[str] = []
    for path in [unit, *sorted(folder.glob(f"{unit.name}.d/*.conf"))]:
        for name, value in units.directives(path.read_text(encoding="utf-8")) if path.is_file() else ():
            if name == "ListenStream":
                found = [*found, value] if value else []
    return found


def variables(text: str) -> dict[str, str]:
    """As the manager reads an EnvironmentFile: NAME=value, comments, quotes around a value."""
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith(("#", ";")):
            continue
        name, equals, value = line.partition("=")
        if not equals or not _NAME.fullmatch(name.strip()):
            raise ValueError(f"line {number} is not NAME=value")
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        found[name.strip()] = value
    return found


def _watchdog_ms(place: Place) -> int:
    said = dict(units.directives(units.unit("llambo-worker@.service", place)))
    return int(said["WatchdogSec"]) * 1_000


def _below(root: Path, path: str) -> Path:
    return root / path.lstrip("/")
