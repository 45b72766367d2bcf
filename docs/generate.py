"""Writes the parts of the documentation that follow from the code.

A generated part stands between two comments, and everything around them is left alone:

    <!-- generated: settings -->
    ...
    <!-- /generated -->

    python docs/generate.py           write them
    python docs/generate.py --check   exit 1 if one of them is not current
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llambo.mesh.service.prometheus import table
from llambo.mesh.settings.settings_table import SECTIONS

ROOT = Path(__file__).resolve().parent.parent
# Run as a script, Python looks for modules in docs/ and not beside it.
sys.path.insert(0, str(ROOT))

from docs import protocol_parts, python_parts  # noqa: E402

_PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- /generated -->)", re.DOTALL)


#: The broker's path of a request, from its submit to its END, in the order in which it is best read.
BROKER_PATH = [
    "events",
    "core",
    "records/state",
    "records/request",
    "requests/admission",
    "records/queue",
    "records/schedule",
    "requests/dispatching",
    "requests/delivery",
    "records/transcript",
    "requests/ending",
]
PACKAGE = ROOT / "llambo"


# --- what is generated -------------------------------------------------------------------------------


def settings() -> str:
    """Every setting, by section of the file."""
    lines = []
    for section, known in SECTIONS.items():
        lines += [f"\n`[{section}]`\n", "| key | flag | environment | default | |", "| --- | --- | --- | --- | --- |"]
        for key, row in known.items():
            default = row.show(row.default) or "(empty)"
            lines.append(f"| `{key}` | `{row.flag}` | `{row.env}` | {default} | {row.help} |")
    return "\n".join(lines).strip()


def broker_metrics() -> str:
    from llambo.broker.report.metrics_page import TABLE

    return table(TABLE)


def gateway_metrics() -> str:
    from llambo.gateway.gateway_metrics import TABLE

    return table(TABLE)


def process_metrics() -> str:
    from llambo.mesh.service.host import PROCESS_METRICS

    return table(PROCESS_METRICS)


def fleet_keys() -> str:
    """What may stand in fleet.toml, by table; the settings of workers and of the broker are in llambo config."""
    from llambo.fleet import schema

    tables = (
        ("[fleet]", schema.FLEET),
        ("[hosts.NAME]", schema.HOST),
        ("[classes.NAME]", schema.CLASS),
        ("[broker]", schema.BROKER_KEYS),
        ("[scale] or [classes.NAME.scale]", schema.SCALE),
    )
    lines = []
    for title, known in tables:
        lines += [f"\n`{title}`\n", "| key | default | |", "| --- | --- | --- |"]
        for key in known:
            default = key.setting.show(key.setting.default) or "(empty)"
            lines.append(f"| `{key.name}` | {default} | {key.setting.help} |")
    return "\n".join(lines).strip()


def link_states() -> str:
    from llambo.mesh.link.link_core import LINK_STEPS

    return diagram(LINK_STEPS)


def client_states() -> str:
    from llambo.mesh.client.client_requests import CLIENT_STEPS

    return diagram(CLIENT_STEPS)


def request_states() -> str:
    from llambo.broker.records.request import REQUEST_STEPS

    return diagram(REQUEST_STEPS)


def run_states() -> str:
    from llambo.worker.agent.runs import RUN_STEPS

    return diagram(RUN_STEPS)


def engine_states() -> str:
    from llambo.worker.agent.engine_life import ENGINE_STEPS

    return diagram(ENGINE_STEPS)


def concept(path: Path) -> str:
    """The first sentence of a file's docstring."""
    opening = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return re.split(r"(?<=\.)\s", " ".join(opening.split()))[0].rstrip(":.")


def broker_path() -> str:
    """The reading order of the broker: what each file is about, and how long it is."""
    lines, total = ["| file | its one concept | lines |", "| --- | --- | ---: |"], 0
    for name in BROKER_PATH:
        path = PACKAGE / "broker" / f"{name}.py"
        length = len(path.read_text(encoding="utf-8").splitlines())
        lines.append(f"| `broker/{name}.py` | {concept(path)} | {length} |")
        total += length
    return "\n".join([*lines, f"| all | | {total} |"])


def rooms() -> str:
    """Every room of the package: what it is for, and its files."""
    lines = ["| room | what it holds | files |", "| --- | --- | --- |"]
    for init in sorted(PACKAGE.rglob("__init__.py"), key=lambda path: path.parent.parts):
        folder = init.parent
        files = ", ".join(f"`{path.stem}`" for path in sorted(folder.glob("*.py")) if not path.stem.startswith("__"))
        name = str(folder.relative_to(PACKAGE.parent)).removeprefix("llambo/")
        if folder != PACKAGE:
            lines.append(f"| `{name}/` | {concept(init)} | {files} |")
    return "\n".join(lines)


# --- commands ----------------------------------------------------------------------------------------


def diagram(steps: Mapping[Any, Mapping[Any, str]]) -> str:
    """A Mermaid state diagram of a table of legal steps, whose first state is where life begins."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {next(iter(steps)).value}"]
    for state, after in steps.items():
        lines += [f"    {state.value} --> {target.value}: {why}" for target, why in after.items()]
        if not after:
            lines.append(f"    {state.value} --> [*]")
    return "\n".join([*lines, "```"])


GENERATORS: dict[str, Callable[[], str]] = {
    "broker-path": broker_path,
    "broker-metrics": broker_metrics,
    "client-states": client_states,
    "engine-states": engine_states,
    "gateway-metrics": gateway_metrics,
    "fleet-keys": fleet_keys,
    "link-states": link_states,
    "process-metrics": process_metrics,
    "request-states": request_states,
    "rooms": rooms,
    "run-states": run_states,
    "settings": settings,
    **protocol_parts.GENERATORS,
    **python_parts.GENERATORS,
}


# --- where it goes -----------------------------------------------------------------------------------


def fill(text: str, path: Path) -> str:
    """The text of a document with its generated parts made anew."""

    def made(part: re.Match[str]) -> str:
        if part[2] not in GENERATORS:
            sys.exit(f"{path}: there is no generator for {part[2]!r}; known: {', '.join(sorted(GENERATORS))}")
        return f"{part[1]}{GENERATORS[part[2]]()}\n{part[3]}"

    return _PART.sub(made, text)


def main() -> None:
    check = sys.argv[1:] == ["--check"]
    stale = []
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]):
        old = path.read_text(encoding="utf-8")
        new = fill(old, path)
        if new != old:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale and check:
        sys.exit(f"not current: {', '.join(stale)}; run `make docs`")
    print(f"wrote {', '.join(stale)}" if stale else "generated documentation is current")


if __name__ == "__main__":
    main()
