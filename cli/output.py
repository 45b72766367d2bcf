"""How lists and numbers are shown: rich tables on a terminal, aligned text in a pipe, JSON when asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

Row = Sequence[Any]


def show_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def table(columns: Sequence[str], rows: Sequence[Row], *, nothing: str = "") -> None:
    """`nothing` is said on stderr when there are no rows, so that a script reads an empty list."""
    if not rows:
        click.echo(nothing or "nothing to show", err=True)
        return
    texts = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(columns, texts, rows)
    else:
        _plain_table(columns, texts, rows)


def facts(pairs: Sequence[tuple[str, Any]]) -> None:
    """Names and values, one pair a line."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        click.echo(f"{name:<{width}}  {value}")


def _plain_table(columns: Sequence[str], texts: list[list[str]], rows: Sequence[Row]) -> None:
    # A cell is never empty, so that `awk '{print $3}'` counts right.
    lines = [[title.upper() for title in columns], *[[cell or "-" for cell in row] for row in texts]]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    numeric = _numeric(rows)
    for line in lines:
        cells = [
            f"{cell:>{width}}" if right else f"{cell:<{width}}"
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _rich_table(columns: Sequence[str], texts: list[list[str]], rows: Sequence[Row]) -> None:
    # Late: rich takes longer to import than the mesh to answer.
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for title, right in zip(columns, _numeric(rows), strict=True):
        shown.add_column(title, justify="right" if right else "left", overflow="fold")
    for row in texts:
        shown.add_row(*map(escape, row))
    Console().print(shown)


def _numeric(rows: Sequence[Row]) -> list[bool]:
    return [all(isinstance(cell, Number) for cell in column) for column in zip(*rows, strict=True)]


class Number(str):
    """A text that stands to the right, because it is read as a number."""

    __slots__ = ()


def number(value: Any, unit: str = "") -> Number:
    return Number(f"{value}{unit}")


def duration(ms: float) -> Number:
    """A time in the unit a person would choose."""
    if ms < 1_000:
        return Number(f"{ms:.0f} ms")
    seconds = ms / 1_000
    if seconds < 100:
        return Number(f"{seconds:.1f} s")
    minutes, hours = seconds / 60, seconds / 3_600
    return Number(f"{minutes:.0f} min" if minutes < 100 else f"{hours:.0f} h")


def size(count: int) -> Number:
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1_024 and len(units) > 1:
        value /= 1_024
        units.pop(0)
    return Number(f"{value:.4g} {units[0]}")
