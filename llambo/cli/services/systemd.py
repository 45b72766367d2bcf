"""`llambo systemd`: writes units for this machine, and finds what is wrong with them before a service does."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from llambo.cli.kit.command import Command, Group
from llambo.cli.kit.failure import Exit, Failure
from llambo.mesh.service.extras import requirement
from llambo.mesh.wire.errors import LlamboError
from llambo.systemd import units

if TYPE_CHECKING:
    from llambo.systemd.units import File, Place

EXAMPLES = """
sudo llambo systemd install        write the units, and examples of settings
llambo systemd check               verify what is there
"""
INSTALL_EXAMPLES = """
sudo llambo systemd install
sudo llambo systemd install --bind 0.0.0.0   a broker for the network
llambo systemd install --user                for your own service manager
llambo systemd install --root ./image        into a folder, for a package
"""
CHECK_EXAMPLES = """
llambo systemd check
llambo systemd check --user
"""
USER = click.option("--user", is_flag=True, help="For your own service manager, not the machine's.")
ROOT = click.option(
    "--root",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/"),
    help="Below this folder.",
)
#: The highest exposure allowed for a service, on systemd's scale of 10. Redis has 1.2, nginx 9.6.
EXPOSURE = 1.5
_EXPOSURE = re.compile(r"exposure level for \S+: (\d+(?:\.\d+)?)")
#: How long systemd-analyze may take.
ANALYZE_S = 60
#: Where systemd runs the machine.
RUNNING = Path("/run/systemd/system")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@click.group(
    cls=Group,
    lazy={name: f"llambo.cli.services.systemd:{name}" for name in ("install", "check")},
    examples=EXAMPLES,
)
def systemd() -> None:
    """Broker and workers as services of systemd: `systemctl start llambo-worker@tiny-01`."""


@click.command(cls=Command, examples=INSTALL_EXAMPLES)
@USER
@ROOT
@click.option("--bind", metavar="ADDRESS", help="Where the broker's socket listens, if not on loopback.")
@click.option("--port", metavar="NUMBER", type=click.IntRange(1, 65_532), help="First of its four ports.")
def install(user: bool, root: Path, bind: str | None, port: int | None) -> None:
    """Write the units for the programs as they are installed here, and examples of settings beside them.

    Units are overwritten each time: put your changes into drop-ins (`systemctl edit`). Settings belong to you and are
    not overwritten.
    """
    place = place_of(user)
    files = units.to_write(place)
    if bind is not None or port is not None:
        files.append(units.listen(place, bind or units.HOST, port or units.PORT))
    for file in files:
        click.echo(_write(file, root))
    click.echo("\n".join(["", "next:", *next_steps(user, root)]))


@click.command(cls=Command, examples=CHECK_EXAMPLES)
@USER
@ROOT
def check(user: bool, root: Path) -> None:
    """Verify units, settings and keys: whether they are up to date, and whether systemd and llambo understand them."""
    bad = 0
    for finding in everything(place_of(user), root):
        bad += not finding.good
        click.echo(f"{'ok ' if finding.good else 'BAD'}  {finding.what}{f': {finding.text}' if finding.text else ''}")
    if bad:
        raise Failure(
            f"{bad} {'thing is' if bad == 1 else 'things are'} not as {'it' if bad == 1 else 'they'} should be",
            "",
            Exit.ERROR,
        )


# --- install --------------------------------------------------------------------------------------------


def place_of(user: bool) -> Place:
    # Not resolved: the python of a virtual environment is a link to one that does not find llambo.
    programs = Path(sys.executable).absolute().parent
    for name in ("llambo-broker", "llambo-worker"):
        if not (programs / name).is_file():
            raise Failure(
                f"there is no {name} beside {sys.executable}",
                "install llambo into an environment of its own: python3 -m venv /opt/llambo; /opt/llambo/bin/pip "
                f"install {requirement('llama')}",
            )
    if not user:
        return units.Place(str(programs), visible=_folders_of_programs())
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.environ.get("HOME", "/"), ".config")
    return units.Place(str(programs), user=True, units=f"{config}/systemd/user", settings=f"{config}/llambo")


def _folders_of_programs() -> tuple[str, ...]:
    """What the programs need to run: the environment, its Python, and the folder of llambo itself."""
    import llambo.mesh

    ours = Path(str(llambo.mesh.__file__)).resolve().parent.parent
    return str(Path(sys.prefix).resolve()), str(Path(sys.base_prefix).resolve()), str(ours)


def _write(file: File, root: Path) -> str:
    path = root / file.path.lstrip("/")
    try:
        before = path.read_text(encoding="utf-8") if path.is_file() else None
        if before == file.text or (before is not None and file.example):
            return f"kept     {path}"
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(file.text, encoding="utf-8")
        draft.chmod(0o644)
        draft.replace(path)
    except OSError as error:
        hint = "run it with sudo, or with --user for your own manager" if isinstance(error, PermissionError) else ""
        raise Failure(f"{path} cannot be written: {error.strerror}", hint) from error
    return f"{'written' if before is None else 'changed'}  {path}"


def next_steps(user: bool, root: Path) -> list[str]:
    if root != Path("/"):
        return ["  (on the machine that this is for) llambo systemd check"]
    if not RUNNING.is_dir():
        return ["  systemd does not run here, so nothing starts these: `llambo up` runs a mesh without it"]
    control = "systemctl --user" if user else "systemctl"
    first = [] if user else ["  systemd-sysusers && systemd-tmpfiles --create"]
    return [
        *first,
        f"  {control} daemon-reload",
        f"  {control} enable --now llambo.target llambo-broker     on the machine of the broker",
        f"  {control} enable --now llambo.target llambo-worker@NAME",
        f"  llambo systemd check{' --user' if user else ''}",
    ]


# --- check ----------------------------------------------------------------------------------------------


class Checked(NamedTuple):
    good: bool
    what: str
    text: str = ""


def everything(place: Place, root: Path) -> Iterator[Checked]:
    yield from _up_to_date(place, root)
    folder = _below(root, place.units)
    if all((folder / name).is_file() for name in units.UNITS):
        yield from _verified(place, folder)
        if not place.user:
            yield from _exposed(folder)
    yield from _settings(place, _below(root, place.settings))
    yield from _listening_without_keys(place, root)


def _up_to_date(place: Place, root: Path) -> Iterator[Checked]:
    again = "llambo systemd install" + (" --user" if place.user else "")
    for file in units.to_write(place):
        path = _below(root, file.path)
        if file.example:
            continue
        if not path.is_file():
            yield Checked(False, str(path), f"is missing: {again}")
        elif path.read_text(encoding="utf-8") != file.text:
            yield Checked(False, str(path), f"is not what this version writes here: {again}")
        else:
            yield Checked(True, str(path))


# What systemd itself finds.


def _verified(place: Place, folder: Path) -> Iterator[Checked]:
    names = [name.replace("@.", "@check.") for name in units.UNITS]
    with tempfile.TemporaryDirectory() as runtime:
        output = _analyze(
            ["--user"] * place.user + ["verify", "--man=no", *names],
            # The colon at the end adds the usual folders.
            {"SYSTEMD_UNIT_PATH": f"{folder}:", "XDG_RUNTIME_DIR": os.environ.get("XDG_RUNTIME_DIR", runtime)},
        )
    if output is None:
        yield Checked(False, "systemd-analyze verify", "there is no systemd-analyze here, so nothing was verified")
        return
    ours = [line for line in output.splitlines() if "llambo" in line]
    yield from (Checked(False, "systemd-analyze verify", line) for line in ours)
    if not ours:
        yield Checked(True, "systemd-analyze verify")


def _exposed(folder: Path) -> Iterator[Checked]:
    for name in units.SERVICES:
        output = _analyze(["security", "--offline=true", "--no-pager", str(folder / name)], {})
        found = _EXPOSURE.search(output or "")
        if found is None:
            yield Checked(False, f"systemd-analyze security {name}", "its output names no exposure level")
        else:
            text = f"exposure {found[1]}, at most {EXPOSURE} is wanted"
            yield Checked(float(found[1]) <= EXPOSURE, f"systemd-analyze security {name}", text)


def _analyze(arguments: list[str], environ: dict[str, str]) -> str | None:
    program = shutil.which("systemd-analyze")
    if program is None:
        return None
    done = subprocess.run(
        [program, *arguments], check=False, capture_output=True, text=True, timeout=ANALYZE_S,
        env={**os.environ, "LC_ALL": "C", **environ},
    )  # fmt: skip
    return done.stdout + done.stderr


# What llambo finds in settings and keys.


def _settings(place: Place, folder: Path) -> Iterator[Checked]:
    from llambo.mesh.security import keys
    from llambo.mesh.settings import settings

    toml = folder / settings.FILE_NAME
    for path in [toml, *sorted(folder.glob("*.env"))]:
        if path.is_file():
            problems = [*_problems(path, toml, place)]
            yield from (Checked(False, str(path), problem) for problem in problems)
            if not problems:
                yield Checked(True, str(path))
    for path in sorted(folder.glob("worker*.key")):
        try:
            key = keys.read(path)
        except LlamboError as error:
            yield Checked(False, str(path), error.text)
        else:
            good = key.role == "worker"
            yield Checked(good, str(path), f"the key of {key.name}" + ("" if good else f", which is a {key.role}"))


def _problems(path: Path, toml: Path, place: Place) -> Iterator[str]:
    from llambo.mesh.security import keys
    from llambo.mesh.settings import settings

    environ: dict[str, str] = {}
    try:
        if path != toml:
            environ = variables(path.read_text(encoding="utf-8"))
            has_key = environ.get(settings.BY_NAME["key"].env, "").startswith(keys.PREFIX)
            if has_key and stat.S_IMODE(path.stat().st_mode) & 0o077:
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


def _listening_without_keys(place: Place, root: Path) -> Iterator[Checked]:
    """A broker without keys refuses to listen on an address that other machines reach."""
    from llambo.mesh.link.sockets import is_loopback, split
    from llambo.mesh.security.keyring import Folder
    from llambo.mesh.settings import settings

    folder = _below(root, place.settings)
    try:
        text = (folder / "broker.env").read_text(encoding="utf-8") if (folder / "broker.env").is_file() else ""
        loaded = settings.load({}, environ=variables(text), places=[folder / settings.FILE_NAME])
        hosts = [split(f"tcp://{address}")[0] for address in _listen_streams(_below(root, place.units))]
    except (LlamboError, ValueError, OSError):
        return  # `_problems` has reported it
    key_folder = loaded.text("keys")
    if key_folder:
        found = Folder(_below(root, str(Path(key_folder).expanduser()))).exists
        yield Checked(found, key_folder, "" if found else f"there are no keys: llambo keys init --keys {key_folder}")
    elif others := sorted({host for host in hosts if not is_loopback(host)}):
        text = (
            f"without keys it will not listen at {', '.join(others)}: LLAMBO_KEYS={place.settings}/keys in broker.env"
        )
        yield Checked(False, "llambo-broker.socket", text)


def _listen_streams(folder: Path) -> list[str]:
    """Of the socket unit and its drop-ins. An empty value resets the list, as systemd defines it."""
    unit = folder / "llambo-broker.socket"
    found: list[str] = []
    for path in [unit, *sorted(folder.glob(f"{unit.name}.d/*.conf"))]:
        for name, value in units.directives(path.read_text(encoding="utf-8")) if path.is_file() else ():
            if name == "ListenStream":
                found = [*found, value] if value else []
    return found


def variables(text: str) -> dict[str, str]:
    """As the service manager reads an EnvironmentFile: NAME=value, comments, quotes around a value."""
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
    settings = dict(units.directives(units.unit("llambo-worker@.service", place)))
    return int(settings["WatchdogSec"]) * 1_000


def _below(root: Path, path: str) -> Path:
    return root / path.lstrip("/")
