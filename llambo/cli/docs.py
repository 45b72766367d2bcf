"""docs/cli.md: what `--help` says, of every command. What several commands have in common is printed once.

python -m llambo.cli.docs > docs/cli.md
python -m llambo.cli.docs --check           exit 1 if the file says something else
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from llambo.cli import main
from llambo.cli.kit.command import aside_help
from llambo.cli.services import broker, worker

#: As wide on every machine.
COLUMNS = 80
FILE = Path("docs/cli.md")
HEAD = """# The command line

What `--help` says, of every command. Made by `python -m llambo.cli.docs`; do not edit. An option that several commands
have is described once, under [Common options](#common-options); the commands list it after `Also:`.

{commands}
"""

COMMANDS = {"llambo": main.main, "llambo-broker": broker.main, "llambo-worker": worker.main}
#: Programs that are commands of `llambo` as well.
ALONE = (broker.main, worker.main)
#: How lists of commands begin.
LISTS = ("Commands:", *(f"{heading}:\n" for heading in main.SECTIONS))
#: An option that so many commands have, with the same description, is a common one.
COMMON = 3
#: In a cell of a table.
PIPE = r"\|"
#: The first line of an option, in a block of options.
_OPTION = re.compile(r"  (-\S.*)")


def document() -> str:
    helps = {
        context.command_path: "\n\n".join(filter(None, (context.get_help(), aside_help(context)))).split("\n\n")
        for name, command in COMMANDS.items()
        for context in contexts(name, command)
        if not (context.parent and context.command in ALONE)  # described by that name
    }
    counts = Counter(_plain(entry) for blocks in helps.values() for block in blocks for entry in _entries(block))
    common = {entry for entry, count in counts.items() if count >= COMMON}
    links = ", ".join(
        f"[{path.removeprefix('llambo ')}](#{path.replace(' ', '-')})" for path in helps if path.count(" ") < 2
    )
    parts = [
        HEAD.format(commands="\n".join(textwrap.wrap(links, 120, break_on_hyphens=False))),
        _common_options(common),
    ]
    shown: dict[str, str] = {}
    for path, blocks in helps.items():
        # The sections that follow are the list of commands.
        kept = [block for block in blocks if not block.startswith(LISTS)]
        body = "\n\n".join(_short(block, path, common, shown) for block in kept)
        parts.append(f"## {path}\n\n```text\n{body}\n```\n")
    return "\n".join(parts)


def _common_options(common: set[str]) -> str:
    rows = []
    for entry in sorted(common, key=lambda entry: entry.split("--")[1]):
        names, _, text = entry.partition("  ")
        rows.append(f"| `{names.replace('|', PIPE)}` | {text} |")
    return "\n".join(["## Common options\n", "| option | |", "| --- | --- |", *rows, ""])


def _short(block: str, path: str, common: set[str], shown: dict[str, str]) -> str:
    """The block without common options. One that an earlier command has word for word is a reference to it."""
    head = block.split("\n")[0]
    if head in ("Exit codes:", "The fake engine:"):
        first = shown.setdefault(_plain(block), path)
        return block if first == path else f"{head} as for `{first}`"
    entries = _entries(block)
    also = [entry for entry in entries if _plain(entry) in common]
    if not also:
        return block
    kept = [entry for entry in entries if entry not in also]
    names = ", ".join(_plain(entry).split("  ")[0].split(" ")[0].rstrip(",") for entry in also)
    return "\n".join([head, *kept, f"  Also: {names}"])


def _entries(block: str) -> list[str]:
    """The options of a block of options, each with its lines; none if the block is something else."""
    head, *lines = block.split("\n")
    if not head.endswith(("Options:", "Settings:")):
        return []
    entries: list[str] = []
    for line in lines:
        if _OPTION.match(line):
            entries.append(line)
        else:
            entries[-1] += f"\n{line}"
    return entries


def _plain(text: str) -> str:
    """Whatever the width of its columns: names, two spaces, description."""
    names, _, rest = re.sub(r"\n +", "   ", text.strip()).partition("  ")
    return f"{names}  {' '.join(rest.split())}"


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
