"""docs/cli.md: what `--help` says, of every command.

python -m llambo.cli.docs > docs/cli.md
python -m llambo.cli.docs --check           exit 1 if the file says something else
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from llambo.cli import main
from llambo.cli.services import broker, worker

#: As wide on every machine.
COLUMNS = 80
FILE = Path("docs/cli.md")
HEAD = """# The command line

What `--help` says, of every command. Made by `python -m llambo.cli.docs`; do not edit.
"""

COMMANDS = {"llambo": main.main, "llambo-broker": broker.main, "llambo-worker": worker.main}


def document() -> str:
    parts = [HEAD]
    for name, command in COMMANDS.items():
        for context in contexts(name, command):
            parts.append(f"## {context.command_path}\n\n```text\n{context.get_help()}\n```\n")
    return "\n".join(parts)


def contexts(name: str, command: click.Command, parent: click.Context | None = None) -> Iterator[click.Context]:
    """The command and everything below it, each in the context its help is shown in."""
    context = command.context_class(
        command, parent, info_name=name, terminal_width=COLUMNS, color=False, **command.context_settings
    )
    yield context
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None, f"{child} is listed"
            yield from contexts(child, found, context)


def check() -> int:
    if FILE.is_file() and FILE.read_text(encoding="utf-8") == document():
        return 0
    click.echo(f"{FILE} is not current; run: python -m llambo.cli.docs > {FILE}", err=True)
    return 1


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(check())
    click.echo(document(), nl=False)
