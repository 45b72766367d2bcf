"""Extras of the package: parts of llambo that are installed apart, what of them is missing, and how to get it."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

#: For work on llambo itself.
DEVELOPMENT = ("dev", "fuzz")
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)[^;]*;.*\bextra == [\"'](?P<extra>[\w-]+)[\"']")


def packages() -> dict[str, dict[str, bool]]:
    """The extras that the installed package of llambo declares, and whether each distribution of them is installed."""
    from importlib import metadata  # takes longer to import than the rest of a command

    try:
        declared = metadata.requires("llambo") or []
    except metadata.PackageNotFoundError:  # it runs from a checkout that was never installed
        return {}
    found: dict[str, dict[str, bool]] = {}
    for requirement in filter(None, map(_REQUIREMENT.match, declared)):
        if requirement["extra"] not in DEVELOPMENT:
            found.setdefault(requirement["extra"], {})[requirement["name"]] = _installed(requirement["name"])
    return found


def _installed(distribution: str) -> bool:
    from importlib import metadata

    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def install_command(*requirements: str) -> str:
    """What installs into the environment that this process runs in. A `pip` in the path may belong to another one."""
    return " ".join([_installer(), *map(shlex.quote, requirements)])


def _installer() -> str:
    here, python = Path(sys.prefix), shlex.quote(sys.executable)
    if (here / "pipx_metadata.json").exists():
        return "pipx runpip llambo install"
    if importlib.util.find_spec("pip") is None:  # as in environments that uv makes
        bootstrap = f"{python} -m ensurepip && {python} -m pip install"
        return f"uv pip install --python {python}" if shutil.which("uv") else bootstrap
    ours = shutil.which("pip")
    pip = "pip" if ours and Path(ours).parent == Path(sys.executable).parent else f"{python} -m pip"
    managed = sys.prefix == sys.base_prefix and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()
    return f"{pip} install --break-system-packages" if managed else f"{pip} install"
