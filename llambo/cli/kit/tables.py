"""How lists and numbers are shown: rich tables on a terminal, aligned text in a pipe, JSON when asked for."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

import click

from llambo.cli.kit.std_streams import json_text, paint
from llambo.mesh.wire.errors import printable
from llambo.mesh.wire.naming import how_to_match, is_in_class, what_differs
from llambo.mesh.wire.reports import ModelVariant, RequestRow, WorkerRow, waiting

Row = Sequence[object]

#: A last column that is wider than this is folded before others are left out.
FOLDED = 24
_BREAK = re.compile(r" *[\n\t][ \n\t]*")


def show_json(value: object) -> None:
    click.echo(json_text(value, indent=2))


def table(
    columns: Sequence[str], rows: Sequence[Row], *, nothing: str = "", fixed: int = 0, spare: Sequence[str] = ()
) -> None:
    """`nothing` is printed on stderr when there are no rows, so that a script reads an empty list.

    On a terminal the first `fixed` columns are never folded; where it is narrow, those that are `spare` are left out,
    the first of them first.
    """
    if not rows:
        click.echo(nothing or "nothing to show", err=True)
        return
    texts = [[one_line(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(columns, texts, rows, fixed, spare)
    else:
        _plain_table(columns, texts, rows)


def facts(pairs: Sequence[tuple[str, object]]) -> None:
    """Names and values, one pair a line."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        click.echo(f"{name:<{width}}  {value}")


def one_line(text: str) -> str:
    """A text that others chose, such as a name, as part of a line: without line breaks, and as wide as it is shown."""
    return _BREAK.sub(" ", printable(text))


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


def _rich_table(
    columns: Sequence[str], texts: list[list[str]], rows: Sequence[Row], fixed: int, spare: Sequence[str]
) -> None:
    # Late: rich takes longer to import than the mesh to answer.
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, shown = Console(), Table(box=box.SIMPLE_HEAD, header_style="bold")
    chosen = _fitting(columns, texts, spare, console.width)
    numeric = _numeric(rows)
    for at in chosen:
        justify: Literal["left", "right"] = "right" if numeric[at] else "left"
        shown.add_column(columns[at], justify=justify, overflow="fold", no_wrap=at < fixed)
    for row in texts:
        shown.add_row(*[escape(row[at]) for at in chosen])
    with console.capture() as drawn:
        console.print(shown)
    paint(drawn.get())


def _fitting(columns: Sequence[str], texts: list[list[str]], spare: Sequence[str], width: int) -> list[int]:
    """Which columns a terminal of this width has room for. Required columns are always shown."""
    from rich.cells import cell_len

    chosen = list(range(len(columns)))
    # The box of a column takes three more, and the last one, a text, may well be folded.
    widths = [3 + max(cell_len(line[at]) for line in (columns, *texts)) for at in chosen]
    widths[-1] = min(widths[-1], FOLDED)
    for title in spare:
        if sum(widths[at] for at in chosen) + 1 <= width:
            break
        chosen.remove(columns.index(title))
    return chosen


def _numeric(rows: Sequence[Row]) -> list[bool]:
    return [all(isinstance(cell, NumberText) for cell in column) for column in zip(*rows, strict=True)]


class NumberText(str):
    """A text that is aligned to the right, because it is read as a number."""

    __slots__ = ()


def number(value: object, unit: str = "") -> NumberText:
    return NumberText(f"{value}{unit}")


def plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def duration(ms: float) -> NumberText:
    """A time in the unit a person would choose."""
    if ms < 1_000:
        return NumberText(f"{ms:.0f} ms")
    seconds = ms / 1_000
    if seconds < 100:
        return NumberText(f"{seconds:.1f} s")
    minutes, hours = seconds / 60, seconds / 3_600
    return NumberText(f"{minutes:.0f} min" if minutes < 100 else f"{hours:.0f} h")


def size(count: int) -> NumberText:
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1_024 and len(units) > 1:
        value /= 1_024
        units.pop(0)
    return NumberText(f"{value:.4g} {units[0]}")


# --- rows of the broker's reports, as `llambo workers`, `llambo requests` and `llambo top` show them ---------


def busy_text(row: WorkerRow) -> str:
    return f"{row.busy}{f'+{row.busy_elsewhere}' if row.busy_elsewhere else ''}/{row.slots}"


def worker_note(row: WorkerRow) -> str:
    slow = f"slow: {row.slow}" if row.slow else ""
    restarts = f"engine restarted {row.engine_restarts} times" if row.engine_restarts else ""
    return ", ".join(filter(None, (row.node_class, slow, row.note, row.library, restarts)))


def request_note(row: RequestRow) -> str:
    place = f"{row.ahead} ahead" if row.state == "waiting" else ""
    place = waiting(row.waits_for, "waits") if row.waits_for else place
    return ", ".join(filter(None, (place, "detached" if row.detached else "")))


def warn_of_variants(models: Mapping[str, Sequence[ModelVariant]]) -> None:
    """On stderr: between which workers answers cannot move, though they serve a model of the same name."""
    for model, variants in models.items():
        if variants and not is_in_class(model, models):
            click.echo(f"llambo: {cannot_move(model, variants)}", err=True)
            click.echo(f"  {same_command(variants)}", err=True)


def cannot_move(model: str, variants: Sequence[ModelVariant]) -> str:
    has = what_differs([each.fingerprint for each in variants])
    groups = [f"{', '.join(each.workers)} ({what})" for each, what in zip(variants, has, strict=True)]
    return f"answers of {model} cannot move between {' and '.join(groups)}"


def same_command(variants: Sequence[ModelVariant]) -> str:
    """What lets them move."""
    return f"start all of them with {how_to_match([each.fingerprint for each in variants])}"


def variants_of(rows: Sequence[WorkerRow]) -> dict[str, list[ModelVariant]]:
    """By model, as `ModelRow.variants`."""
    alike: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for model in row.plain_models:
            if model in row.fingerprints:
                alike.setdefault(model, {}).setdefault(row.fingerprints[model], []).append(row.worker)
    return {
        model: [ModelVariant(fingerprint=fingerprint, workers=names) for fingerprint, names in found.items()]
        for model, found in alike.items()
        if len(found) > 1
    }
