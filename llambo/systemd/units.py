"""What `llambo systemd install` writes, as text: the one source are the files beside this one, which say /opt/llambo.

Pure: it is told the paths of the machine, and gives back which file goes where with what in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import PurePath

#: Where the programs are, in the files as they lie here.
PROGRAMS = "/opt/llambo/bin"
#: First of the four ports, and the address, in the socket unit as it lies here.
PORT, HOST = 7330, "127.0.0.1"
UNITS = (
    "llambo-broker.service", "llambo-broker.socket", "llambo-worker@.service", "llambo-gateway.service",
    "llambo-fleet.service", "llambo.target", "llambo.slice", "llambo-workers.slice",
)  # fmt: skip
#: Starts units and programs, and calls ssh: there is nothing that could be taken from it.
FREE = "llambo-fleet.service"
#: Those that are confined.
SERVICES = tuple(name for name in UNITS if name.endswith(".service") and name != FREE)
#: Written by `--bind`, and never by an install without it.
LISTEN = "llambo-broker.socket.d/listen.conf"
#: A service does not see what is below these, unless it is shown to it.
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - they are only compared with
#: What only the manager of the whole system can do: other users, namespaces, credentials, priorities upwards.
NOT_FOR_USERS = frozenset({
    "AmbientCapabilities", "CapabilityBoundingSet", "IOWeight", "LoadCredential", "OOMScoreAdjust", "PrivateDevices",
    "PrivateIPC", "PrivateMounts", "PrivateTmp", "PrivateUsers", "ProcSubset", "ProtectClock", "ProtectControlGroups",
    "ProtectHome", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables",
    "ProtectProc", "ProtectSystem", "RemoveIPC", "SetCredential", "User",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Of this machine. `shown`: folders that a service has to see to run the programs at all."""

    programs: str = PROGRAMS
    shown: tuple[str, ...] = ()
    #: For one person's own manager, below his home.
    user: bool = False
    #: Folders, as they are without --root.
    units: str = "/etc/systemd/system"
    settings: str = "/etc/llambo"


@dataclass(frozen=True, slots=True)
class File:
    path: str
    text: str
    #: It is the administrator's from the moment it is there, and not written again.
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
        lines = _show(lines, hidden(place.shown))
    return "\n".join(lines) + "\n"


def listen(place: Place, host: str, port: int) -> File:
    """The ports at another address. An empty line first: otherwise these come on top of those of the unit."""
    shown = f"[{host}]" if ":" in host else host
    ports = [f"ListenStream={shown}:{port + number}" for number in range(4)]
    text = "\n".join(["# Written by `llambo systemd install --bind`.", "", "[Socket]", "ListenStream=", *ports, ""])
    return File(f"{place.units}/{LISTEN}", text)


def hidden(folders: Iterable[str]) -> list[str]:
    """Those that a service would not see, without those that are in another of them."""
    found: list[str] = []
    for folder in sorted(set(folders)):
        path = PurePath(folder)
        if any(path.is_relative_to(top) for top in HIDDEN) and not any(path.is_relative_to(seen) for seen in found):
            found.append(folder)
    return found


def directives(text: str) -> list[tuple[str, str]]:
    """What a unit says, in order; sections, comments and empty lines left out."""
    said = []
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith(("#", ";", "[")):
            said.append((name.strip(), value.strip()))
    return said


def _show(lines: list[str], folders: list[str]) -> list[str]:
    """With an empty folder in place of the hidden ones, of which these parts are put back."""
    if not folders:
        return lines
    shown = ["# The programs are here.", *[f"BindReadOnlyPaths={folder}" for folder in folders]]
    at = lines.index("ProtectHome=yes")
    return [*lines[:at], "ProtectHome=tmpfs", *shown, *lines[at + 1 :]]


def _for_user(lines: list[str]) -> list[str]:
    kept: list[str] = []
    comment: list[str] = []
    for line in lines:
        if line.startswith("#"):
            comment.append(line)
        elif line.partition("=")[0] in NOT_FOR_USERS:
            continue
        else:
            # What a comment says is about the lines below it; with none of them left it has nothing to say.
            kept += [*(comment if line else []), line]
            comment = []
    renamed = {
        "WantedBy=multi-user.target": "WantedBy=default.target",
        "RestartPreventExitStatus=2 EXEC USER GROUP CREDENTIALS": "RestartPreventExitStatus=2 EXEC",
    }
    return [renamed.get(line, line) for line in kept]


def _text(folder: str, name: str) -> str:
    return files("llambo.systemd").joinpath(folder, name).read_text(encoding="utf-8")
