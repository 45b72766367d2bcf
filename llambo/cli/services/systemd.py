"""`llambo systemd`: units for this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llambo.cli.kit.command import Command, Group
from llambo.cli.kit.exits import Exit
from llambo.cli.kit.failure import Failure

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

    Units are written anew each time: what you change belongs into drop-ins (`systemctl edit`). Settings are yours,
    and are left as they are.
    """
    from llambo.systemd import units

    place = _place(user)
    files = units.to_write(place)
    if bind is not None or port is not None:
        files.append(units.listen(place, bind or units.HOST, port or units.PORT))
    for file in files:
        click.echo(_write(file, root))
    click.echo("\n".join(["", "next:", *_next(user, root)]))


@click.command(cls=Command, examples=CHECK_EXAMPLES)
@USER
@ROOT
def check(user: bool, root: Path) -> None:
    """Verify units, settings and keys: whether they are current, and whether systemd and llambo understand them."""
    from llambo.cli.services.systemd_check import everything

    bad = 0
    for finding in everything(_place(user), root):
        bad += not finding.good
        click.echo(f"{'ok ' if finding.good else 'BAD'}  {finding.what}{f': {finding.text}' if finding.text else ''}")
    if bad:
        raise Failure(f"{bad} {'thing is' if bad == 1 else 'things are'} not as it should be", "", Exit.ERROR)


def _place(user: bool) -> Place:
    from llambo.systemd.units import Place

    # Not resolved: the environment's python is a link to one that knows nothing of us.
    programs = Path(sys.executable).absolute().parent
    for name in ("llambo-broker", "llambo-worker"):
        if not (programs / name).is_file():
            raise Failure(
                f"there is no {name} beside {sys.executable}",
                "install llambo into an environment of its own: python3 -m venv /opt/llambo; /opt/llambo/bin/pip "
                "install 'llambo[llama]'",
            )
    if not user:
        return Place(str(programs), shown=_shown())
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.environ.get("HOME", "/"), ".config")
    return Place(str(programs), user=True, units=f"{config}/systemd/user", settings=f"{config}/llambo")


def _shown() -> tuple[str, ...]:
    """All that the programs are made of: the environment, its Python, and where llambo itself is."""
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


def _next(user: bool, root: Path) -> list[str]:
    if root != Path("/"):
        return ["  (on the machine that this is for) llambo systemd check"]
    control = "systemctl --user" if user else "systemctl"
    first = [] if user else ["  systemd-sysusers && systemd-tmpfiles --create"]
    return [
        *first,
        f"  {control} daemon-reload",
        f"  {control} enable --now llambo.target llambo-broker     on the machine of the broker",
        f"  {control} enable --now llambo.target llambo-worker@NAME",
        f"  llambo systemd check{' --user' if user else ''}",
    ]
