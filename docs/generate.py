"""Writes the parts of the documentation that follow from the code.

A generated part stands between two comments, and everything around them is left alone:

    <!-- generated: settings -->
    ...
    <!-- /generated -->

    python docs/generate.py           write them
    python docs/generate.py --check   exit 1 if one of them is not current
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from llambo.mesh.settings_table import SECTIONS

ROOT = Path(__file__).resolve().parent.parent
_PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- /generated -->)", re.DOTALL)

#: Text width of `--help` in docs/cli.md, whatever terminal this runs in.
HELP_COLUMNS = 100


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


def link_states() -> str:
    from llambo.mesh.link_core import LINK_STEPS

    return diagram(LINK_STEPS)


def client_states() -> str:
    from llambo.mesh.client_requests import CLIENT_STEPS

    return diagram(CLIENT_STEPS)


def request_states() -> str:
    from llambo.broker.requests import REQUEST_STEPS

    return diagram(REQUEST_STEPS)


def run_states() -> str:
    from llambo.worker.runs import RUN_STEPS

    return diagram(RUN_STEPS)


def cli() -> str:
    """The help of every command, as the terminal shows it."""
    from llambo.cli import broker, main, worker

    parts = []
    for name, command in (("llambo", main.main), ("llambo-broker", broker.main), ("llambo-worker", worker.main)):
        parts += _helps(command, click.Context(command, info_name=name, max_content_width=HELP_COLUMNS))
    return "\n".join(parts).strip()


def _helps(command: click.Command, context: click.Context) -> list[str]:
    context.terminal_width = HELP_COLUMNS
    parts = [f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                parts += _helps(child, click.Context(child, parent=context, info_name=name))
    return parts


def diagram(steps: Mapping[Any, Mapping[Any, str]]) -> str:
    """A Mermaid state diagram of a table of legal steps, whose first state is where life begins."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {next(iter(steps)).value}"]
    for state, after in steps.items():
        lines += [f"    {state.value} --> {target.value}: {why}" for target, why in after.items()]
        if not after:
            lines.append(f"    {state.value} --> [*]")
    return "\n".join([*lines, "```"])


GENERATORS: dict[str, Callable[[], str]] = {
    "cli": cli,
    "client-states": client_states,
    "link-states": link_states,
    "request-states": request_states,
    "run-states": run_states,
    "settings": settings,
}


# --- where it goes -----------------------------------------------------------------------------------


def fill(text: str, path: Path) -> str:
    """The text of a document with its generated parts made anew."""

    def made(part: re.Match[str]) -> str:
        if part[2] not in GENERATORS:
            sys.exit(f"{path}: nobody generates {part[2]!r}; known: {', '.join(sorted(GENERATORS))}")
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
