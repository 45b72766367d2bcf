"""Extras of the package: parts of llambo that are installed apart, what of them is missing, and how to get it."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import llambo

#: For work on llambo itself.
DEVELOPMENT = ("dev", "fuzz")
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)[^;]*;.*\bextra == [\"'](?P<extra>[\w-]+)[\"']")


def packages() -> dict[str, dict[str, bool]]:
    """The extras that the installed package of llambo declares, and whether each distribution of them is installed."""
    from importlib import metadata  # noqa: PLC0415  # takes longer to import than the rest of a command

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
    from importlib import metadata  # noqa: PLC0415

    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def install_command(*requirements: str) -> str:
    """What installs into the environment that this process runs in. A `pip` in the path may belong to another one."""
    return " ".join([_installer(), *map(shlex.quote, requirements)])


def extra_command(extra: str) -> str:
    """What installs an extra of llambo. The name alone would not do: llambo is not on PyPI."""
    return f"{install_command()} {requirement(extra)}"


def requirement(extra: str) -> str:
    """llambo with this extra, as words for pip: from where this llambo was installed."""
    return requirement_of(_origin(), Path(llambo.__file__).parents[1], extra)


def requirement_of(origin: dict[str, Any], checkout: Path, extra: str) -> str:
    """`origin`: what the installer has written into direct_url.json; empty: nothing."""
    url, vcs = str(origin.get("url", "")), origin.get("vcs_info", {})
    if vcs:
        revision = vcs.get("requested_revision") or vcs.get("commit_id", "")
        return shlex.quote(f"llambo[{extra}] @ {vcs.get('vcs', 'git')}+{url}{f'@{revision}' if revision else ''}")
    path = unquote(urlsplit(url).path) if url.startswith("file:") else ""
    if path and Path(path).exists():
        editable = "--editable " if origin.get("dir_info", {}).get("editable") else ""
        return editable + shlex.quote(f"{path}[{extra}]")
    if url and not path:
        return shlex.quote(f"llambo[{extra}] @ {url}")
    return shlex.quote(f"{checkout if (checkout / 'pyproject.toml').is_file() else 'FOLDER-OF-THE-CLONE'}[{extra}]")


def _origin() -> dict[str, Any]:
    from importlib import metadata  # noqa: PLC0415

    try:
        text = metadata.distribution("llambo").read_text("direct_url.json")
        found = json.loads(text or "{}")
    except (metadata.PackageNotFoundError, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
