"""What a node is begun with: its settings as the words of a command line."""

from __future__ import annotations

import sys

from llambo.fleet.model import NodeClass
from llambo.mesh.settings_table import SECTIONS


def environ(kept: NodeClass, *, broker: str) -> dict[str, str]:
    """A worker's as variables. Its name is its unit's, and its key a credential."""
    told = {
        SECTIONS[section][key].env: SECTIONS[section][key].show(value)
        for section, said in kept.settings.items()
        for key, value in said.items()
    }
    return {**told, SECTIONS["worker"]["class"].env: kept.name, SECTIONS["mesh"]["broker"].env: broker}


def words(kept: NodeClass, name: str, *, broker: str = "", key: str = "", keys: str = "") -> list[str]:
    """`broker`: where a worker finds it; `key`: what it shows there; `keys`: what a broker looks it up in."""
    found = [sys.executable, "-m", f"llambo.cli.{'broker' if kept.is_broker else 'worker'}"]
    for section, told in kept.settings.items():
        for key_name, value in told.items():
            row = SECTIONS[section][key_name]
            found += [row.flag, row.show(value)]
    if kept.is_broker:
        return [*found, *(["--keys", keys] if keys else [])]
    found += ["--name", name, "--class", kept.name]
    found += ["--broker", broker] if broker else []
    return [*found, *(["--key", key] if key else [])]
