"""What `llambo systemd install` writes, as text. The templates are the files in `units/` and `etc/` beside this one,
with the programs in /opt/llambo.

Pure: from the paths of the machine it makes a list of files, with where each goes and what is in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import PurePath

#: Where the programs are, in the templates.
PROGRAMS = "/opt/llambo/bin"
#: First of the four ports, and the address, in the template of the socket unit.
PORT, HOST = 7330, "127.0.0.1"
UNITS = (
    "llambo-broker.service", "llambo-broker.socket", "llambo-worker@.service", "llambo-gateway.service",
    "llambo-fleet.service", "llambo.target", "llambo.slice", "llambo-workers.slice",
)  # fmt: skip
#: Not confined: it starts units and programs, and calls ssh, with all rights of its user.
UNCONFINED = "llambo-fleet.service"
#: Those that are confined.
SERVICES = tuple(name for name in UNITS if name.endswith(".service") and name != UNCONFINED)
#: Written by `install --bind`; an install without it leaves the file alone.
LISTEN = "llambo-broker.socket.d/listen.conf"
#: A confined service does not see what is below these, unless a directive makes it visible.
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - only compared with
#: What only the system manager can do: other users, namespaces, credentials, higher priorities.
NOT_FOR_USERS = frozenset({
    "AmbientCapabilities", "CapabilityBoundingSet", "IOWeight", "LoadCredential", "OOMScoreAdjust", "PrivateDevices",
    "PrivateIPC", "PrivateMounts", "PrivateTmp", "PrivateUsers", "ProcSubset", "ProtectClock", "ProtectControlGroups",
    "ProtectHome", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables",
    "ProtectProc", "ProtectSystem", "RemoveIPC", "SetCredential", "User",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Paths of one machine. `visible`: folders that a service has to see to run the programs at all."""

    programs: str = PROGRAMS
    visible: tuple[str, ...] = ()
    #: For a user's own service manager, below the home folder.
    user: bool = False
    #: Folders, without --root.
    units: str = "/etc/systemd/system"
    settings: str = "/etc/llambo"


@dataclass(frozen=True, slots=True)
class File:
    path: str
    text: str
    #: An example of settings: written once, and never overwritten, as the administrator edits it.
    example: bool = field(default=False, kw_only=True)


def to_write(place: Place) -> list[File]:
    written = [File(f"{place.units}/{name}", unit(name, place)) for name in UNITS]
    if not place.user:
        written += [
            File(f"/etc/{kind}.d/llambo.conf", _text("etc", f"{kind}.conf")) for kind in ("sysusers", "tmpfiles")
        ]
    examples = ["llambo.toml", "broker.env", "worker-example.env"]
    return written + [File(f"{place.settings}/{name}", _text("etc", name), example=True) for name in examples]


def unit(name: str, place: Place) -> str:
    lines = _text("units", name).replace(f"={PROGRAMS}/", f"={place.programs}/").splitlines()
    if place.user:
        lines = _for_user(lines)
    elif name in SERVICES:
        lines = _with_visible(lines, hidden_folders(place.visible))
    return "\n".join(lines) + "\n"


def listen(place: Place, host: str, port: int) -> File:
    """The ports at another address. The empty value first removes those of the unit."""
    bracketed = f"[{host}]" if ":" in host else host
    ports = [f"ListenStream={bracketed}:{port + number}" for number in range(4)]
    text = "\n".join(["# Written by `llambo systemd install --bind`.", "", "[Socket]", "ListenStream=", *ports, ""])
    return File(f"{place.units}/{LISTEN}", text)


def hidden_folders(folders: Iterable[str]) -> list[str]:
    """Those of the folders that a service would not see. One that is inside another is left out."""
    found: list[str] = []
    for folder in sorted(set(folders)):
        path = PurePath(folder)
        if any(path.is_relative_to(top) for top in HIDDEN) and not any(path.is_relative_to(seen) for seen in found):
            found.append(folder)
    return found


def directives(text: str) -> list[tuple[str, str]]:
    """Names and values in a unit, in order, without sections, comments and empty lines."""
    found = []
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith(("#", ";", "[")):
            found.append((name.strip(), value.strip()))
    return found


def _with_visible(lines: list[str], folders: list[str]) -> list[str]:
    """An empty folder takes the place of each hidden one, and these folders are mounted into it."""
    if not folders:
        return lines
    mounts = ["# The programs are here.", *[f"BindReadOnlyPaths={folder}" for folder in folders]]
    at = lines.index("ProtectHome=yes")
    return [*lines[:at], "ProtectHome=tmpfs", *mounts, *lines[at + 1 :]]


def _for_user(lines: list[str]) -> list[str]:
    result: list[str] = []
    comment: list[str] = []
    for line in lines:
        if line.startswith("#"):
            comment.append(line)
        elif line.partition("=")[0] in NOT_FOR_USERS:
            continue
        else:
            # A comment is about the lines below it up to an empty line. If none of them is left, it goes too.
            result += [*(comment if line else []), line]
            comment = []
    renamed = {
        "WantedBy=multi-user.target": "WantedBy=default.target",
        "RestartPreventExitStatus=2 EXEC USER GROUP CREDENTIALS": "RestartPreventExitStatus=2 EXEC",
    }
    return [renamed.get(line, line) for line in result]


def _text(folder: str, name: str) -> str:
    return files("llambo.systemd").joinpath(folder, name).read_text(encoding="utf-8")
